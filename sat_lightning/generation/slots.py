"""A text with slots: which tokens are given, where they stand, and what they see.

Legend: n tokens and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.model import BaseModel
from sat_lightning.nn.linear import Embedding
from sat_lightning.nn.masks import MaskLike

Layout = tuple[Tensor, Any, Any]


def get_masks_and_position_ids_default(seq: Tensor) -> Layout:
    """Lay a text out from left to right.

    Args:
        seq: `[n]`.

    Returns:
        Tokens `[1, n]`, the mask `[1, 1, n, n]` in which each token sees those before it, and positions `[1, n]`.
    """
    length = len(seq)
    mask = torch.ones(length, length, device=seq.device).tril()
    return seq[None], mask[None, None], torch.arange(length, device=seq.device)[None]


def get_masks_and_position_ids_glm(seq: Tensor, mask_position: int, context_length: int) -> Layout:
    """Lay out a context that sees itself, and behind it what fills one of its blanks (GLM, arXiv:2103.10360).

    Args:
        seq: `[n]`.
        mask_position: place of the blank that is filled.
        context_length: how many tokens the context has; the token after it begins the filling.

    Returns:
        Tokens `[1, n]`, the mask `[1, 1, n, n]`, and positions `[1, 2, n]`: in the text, and inside the blank.
    """
    tokens, mask, positions = get_masks_and_position_ids_default(seq)
    mask[..., :context_length] = 1
    is_context = positions < context_length
    outer = positions.masked_fill(~is_context, mask_position)
    inner = (positions - context_length + 1).masked_fill(is_context, 0)
    return tokens, mask, torch.stack([outer, inner], dim=1)


@dataclass(frozen=True, eq=False)
class Slots:
    """What is known of a text before the first slot is filled."""

    ids: list[int]
    """Given ids, negative in slots."""
    prompt: Tensor
    """`[1|b, context]` tokens before the first slot."""
    attention_mask: MaskLike
    """A tensor `[.., n, n]`, or "causal"."""
    position_ids: Tensor | None
    """`[.., n]`."""
    log_attention_weights: Tensor | None
    """`[.., n|1, n|1]`."""

    @classmethod
    def read(
        cls, model: Any, seq: Tensor, get_layout: Callable[..., Layout], log_attention_weights: Tensor | None
    ) -> Slots:  # noqa: ANN401
        """Check a text, and lay it out.

        Args:
            model: the one that will write.
            seq: `[n]`, negative in slots.
            get_layout: `get_masks_and_position_ids`.
            log_attention_weights: as in `filling_sequence`.
        """
        ids = _read_ids(seq, model.config.vocab_size if isinstance(model, BaseModel) else None)
        if isinstance(model, BaseModel):
            seq = seq.to(next(model.parameters()).device)
        if get_layout is get_masks_and_position_ids_default and isinstance(model, BaseModel):
            tokens, mask, positions = _layout_of_family(model, seq)
        else:
            tokens, mask, positions = get_layout(seq)
            _check_positions(model, positions)
        context = next(place for place, token in enumerate(ids) if token < 0)
        return cls(ids, tokens[..., :context].long(), _exact(mask), positions, log_attention_weights)

    def __len__(self) -> int:
        """Count tokens and slots."""
        return len(self.ids)

    @property
    def num_rows(self) -> int:
        """Rows that the layout tells apart; 1 if it is the same for all."""
        scores = [x for x in (self.attention_mask, self.log_attention_weights) if isinstance(x, Tensor) and x.dim() > 3]
        places = [x for x in (self.prompt, self.position_ids) if isinstance(x, Tensor) and x.dim() > 1]
        return max(x.shape[0] for x in (*scores, *places))

    def part(self, first: int, start: int, stop: int) -> dict[str, Any]:
        """Return the keywords of a call.

        Args:
            first: the oldest position that is seen.
            start: the first token fed.
            stop: where the feed ends.
        """
        positions = None if self.position_ids is None else self.position_ids[..., start:stop]
        mask = self.attention_mask
        return {
            "position_ids": positions,
            "attention_mask": _cut(mask, first, start, stop) if isinstance(mask, Tensor) else mask,
            "log_attention_weights": _cut(self.log_attention_weights, first, start, stop),
        }

    def check_memory(self, mems: Tensor | None, next_position: int, num_rows: int) -> None:
        """Refuse mems that cannot be continued."""
        if mems is None:
            return
        if mems.dim() != 4 or mems.shape[1] not in (1, num_rows):
            raise InputError(
                f"mems has shape {list(mems.shape)}; for {num_rows} row(s) it must be [num_layers, {num_rows}, length, "
                "2 * key/value heads * head size], as an earlier call returned it."
            )
        context = self.prompt.shape[1]
        if next_position >= context:
            raise InputError(
                f"mems hold {next_position} positions and seq has {context} tokens before its first slot: none is left "
                f"to feed. Pass mems[:, :, :{context - 1}], or a longer seq."
            )


def _read_ids(seq: Tensor, vocab_size: int | None) -> list[int]:
    found = f"a {type(seq).__name__}"
    if isinstance(seq, Tensor):
        found = f"{str(seq.dtype).removeprefix('torch.')} {list(seq.shape)}"
    if not isinstance(seq, Tensor) or seq.dim() != 1 or seq.is_floating_point():
        raise InputError(
            f"seq is {found}; it must be a tensor [length] of ids, one text with -1 in the slots to fill. For several "
            "texts use generate."
        )
    ids = seq.tolist()
    if not ids:
        raise InputError("seq is empty; it must begin with a given token, and have a slot (-1) to fill.")
    if ids[0] < 0:
        raise InputError(
            f"seq begins with a slot ({ids[0]}): nothing is given that it could follow. Put a token first, such as the "
            "one that begins a text."
        )
    if min(ids) >= 0:
        raise InputError(f"none of the {len(ids)} places of seq is a slot: put -1 where a token is to be written.")
    worst = max(ids)
    if vocab_size is not None and worst >= vocab_size:
        raise InputError(
            f"seq[{ids.index(worst)}] is {worst}, outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})."
        )
    return ids


def _layout_of_family(model: BaseModel, seq: Tensor) -> Layout:
    """Return positions and mask as the family makes them of ids alone; where it sees all, tokens see those before."""
    mask = model.make_attention_mask(seq[None])
    if not isinstance(mask, Tensor):
        mask = "causal"
    elif mask.shape[-2] == 1 < len(seq):
        mask = mask & get_masks_and_position_ids_default(seq)[1].bool()
    return seq[None], mask.int() if isinstance(mask, Tensor) else mask, model.make_position_ids(seq[None])


def _exact(mask: Any) -> Any:  # noqa: ANN401
    """Make a mask of nothing but 0 and 1 an integer one, which every kernel serves; the values are looked at once."""
    is_float = isinstance(mask, Tensor) and mask.is_floating_point()
    return mask.to(torch.int8) if is_float and bool(((mask == 0) | (mask == 1)).all()) else mask


def _check_positions(model: Any, position_ids: Any) -> None:  # noqa: ANN401
    if not isinstance(model, BaseModel) or not isinstance(position_ids, Tensor) or not model.hooks.looks_up_positions:
        return
    rows, largest = model.config.max_sequence_length, int(position_ids.max())
    if isinstance(model.transformer.position_embeddings, Embedding) and largest >= rows:
        raise InputError(
            f"position_ids reach {largest}, and the model's table has {rows} positions (max_sequence_length). Shorten "
            "the text, or build the model with more."
        )


def _cut(x: Tensor | None, first: int, start: int, stop: int) -> Tensor | None:
    """Cut `[.., n|1, n|1]` to the queries that are fed and the keys that they see."""
    if x is None:
        return None
    x = x if x.dim() < 2 or x.shape[-2] == 1 else x[..., start:stop, :]
    return x if x.shape[-1] == 1 else x[..., first:stop]
