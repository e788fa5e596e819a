"""Where the tokens of a ragged batch stand, and what the prompts see: as the family itself lays each row out.

Legend: b batch, s columns of the padded prompts, n columns in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.model import BaseModel
from sat_lightning.nn.masks import MaskLike

Visibility = Literal["causal", "full"] | None


class Layout(NamedTuple):
    """Positions of all columns, and masks."""

    position_ids: Tensor | None
    """`[b|1, n]` or, with several rows of positions, `[b|1, r, n]`."""
    prompt_mask: MaskLike
    """Of the prompts: "causal", None (full), or 1 and 0 `[b, 1, s, s]`."""
    later_mask: MaskLike
    """Of every later token: "causal" or None, which for one token are the same."""


def lay_out(model: BaseModel, rows: Sequence[list[int]], num_columns: int, visibility: Visibility = None) -> Layout:
    """Ask the family for positions and mask of each row without padding, and align them to the right.

    Args:
        model: the family.
        rows: the prompts.
        num_columns: n.
        visibility: what a prompt's tokens see, where the family does not say: those before them, or all of the prompt.

    Raises:
        InputError: if the family's own mask is full and nothing is said: later tokens cannot be seen from a cache.
    """
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    places = _positions(model, rows, num_columns, longest, device)
    masks: list[MaskLike] = [_own_mask(model, row, visibility, device) for row in rows]
    if not isinstance(masks[0], Tensor):
        return Layout(places, masks[0], masks[0])
    joined = torch.zeros(len(rows), 1, longest, longest, dtype=torch.int64, device=device)
    for index, mask in enumerate(masks):
        if isinstance(mask, Tensor):
            begin = longest - len(rows[index])
            joined[index, :, begin:, begin:] = mask[0] if mask.dim() == 4 else mask
    return Layout(places, joined, None)


def _positions(
    model: BaseModel, rows: Sequence[list[int]], num_columns: int, longest: int, device: torch.device
) -> Tensor | None:
    found = []
    for row in rows:
        # What follows is not known yet; the prompt's last token again moves no place that the prompt decides.
        ids = torch.tensor([row + [row[-1]] * (num_columns - longest)], device=device)
        found.append(model.make_position_ids(ids))
        if all(len(row) == longest for row in rows) and found[0] is not None and found[0].dim() == 2:
            break
    if found[0] is None:
        return None
    return torch.cat([F.pad(places, (num_columns - places.shape[-1], 0)) for places in found if places is not None])


def _own_mask(model: BaseModel, row: list[int], visibility: Visibility, device: torch.device) -> MaskLike:
    if visibility is not None:
        return "causal" if visibility == "causal" else None
    mask = model.make_attention_mask(torch.tensor([row], device=device))
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-2] == 1 < len(row)):
        raise InputError(
            f"In a {type(model).__name__} every token sees those behind it, which are not written yet. Pass "
            "visibility='causal' (a token sees those before it) or visibility='full' (the prompt sees all of itself)."
        )
    return mask
