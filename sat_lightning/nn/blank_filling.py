"""Positions and mask of a text with a blank, from its ids alone (GLM, Du et al. 2021, arXiv:2103.10360).

Legend: b batch, s length.

    ids        [PAD]  I  like  [MASK]  <start>  green  tea
    row 0        0    0   1      2        2       2     2     place in the text; inside the blank, of the blank
    row 1        0    0   0      0        1       2     3     place inside the blank
    sees               context: all of it     context and what came before
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.nn.masks import waiting_keys


def require_whole_text(kw: dict[str, Any]) -> None:
    """Refuse to lay out tokens whose earlier ones are in a cache: where the blank is cannot be seen from the last ones.

    Args:
        kw: keywords of the model call.
    """
    if length := waiting_keys(kw):
        raise InputError(
            f"The cache holds {length} tokens, so positions and mask cannot be read from the new ids alone: pass "
            "position_ids [batch, 2, length] and attention_mask. blank_filling(all the ids, ...) gives both; take the "
            "new rows."
        )


def _first(is_here: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first true place of each row `[b, 1]`, and whether there is one."""
    return is_here.int().argmax(-1, keepdim=True), is_here.any(-1, keepdim=True)


def blank_filling(
    input_ids: Tensor, *, start_id: int, mask_ids: Sequence[int], pad_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Lay out each row: a context, in it a blank, and from `start_id` on what fills it.

    Args:
        input_ids: `[b, s]`.
        start_id: the token after which the blank is filled. A row without it is all context in its positions, and
            causal in its mask.
        mask_ids: tokens that can be the blank; the first of them that a row holds is its blank.
        pad_id: padding on the left, seen by nobody and seeing nothing.

    Returns:
        Positions `[b, 2, s]`, and the mask `[b, 1, s, s]`, bool, True is visible.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)[None]  # [1, s]
    start, has_start = _first(input_ids == start_id)
    blank = (start - 1).clamp(min=0)
    for mask_id in reversed(mask_ids):
        place, is_there = _first(input_ids == mask_id)
        blank = torch.where(is_there, place, blank)
    padding = torch.zeros_like(start) if pad_id is None else (input_ids == pad_id).int().cumprod(-1).sum(-1, True)
    fills = has_start & (places >= start)
    outer = (torch.where(fills, blank, places) - padding).clamp(min=0)
    inner = torch.where(fills, places - start + 1, torch.zeros_like(places))
    context = torch.where(has_start, start, torch.zeros_like(start))[:, :, None]
    queries, keys = places[:, :, None], places[:, None, :]
    is_visible = (keys <= queries) | (keys < context)
    is_visible &= (keys >= padding[:, :, None]) & (queries >= padding[:, :, None])
    return torch.stack([outer, inner], dim=1), is_visible[:, None]
