"""Attention masks: one tensor a forward, known by identity, never looked at.

Legend: b batch, s query length, t key length.

A mask is 1 where a query may look and 0 where not; a score becomes `score * mask - 10000 * (1 - mask)`, so a query that
may look nowhere averages all values and is never NaN. A mask without a zero hides nothing: as in SAT it is full, and
fractions count literally only beside a zero. Three facts about a mask are known because the backbone made it,
not because anybody inspected it, and travel as keywords to every `attention_fn`:

    causal_mask    the object that is exactly lower triangular, or None; of keys that a hook appends it says nothing:
                   `appended_keys` of the last keys are seen by every query
    full_mask      the object that hides nothing, or None
    binary_masks   objects that hold only 0 and 1 (they came as bool or integer, or were made here)

A hook that changes the mask makes a new tensor, which is none of these, and falls to the path that takes every value
literally. A hook that knows its new mask to be binary says so: `binary_masks=(*binary_masks, new_mask)`.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from sat_lightning.errors import InputError

MaskLike = Tensor | int | Literal["causal"] | None

#: A masked score is moved by this much: far enough for a weight of 0, near enough to stay finite in half precision.
MASKED_SCORE: Final = -10000.0


class Masks(NamedTuple):
    """The masks of one forward, and what is known of them."""

    attention_mask: Tensor
    """`[s, t]` or `[b, 1, s|1, t]`, in the dtype of the hidden states."""
    known: dict[str, Any]
    """`causal_mask`, `full_mask` and `binary_masks`."""


def make_masks(
    attention_mask: MaskLike,
    *,
    batch_size: int,
    query_length: int,
    like: Tensor,
    materialise: bool = True,
    known: dict[str, Any] | None = None,
) -> Masks:
    """Turn what a caller passed into a mask tensor and what is known of it.

    Args:
        attention_mask: None is full, a negative int or `"causal"` is lower triangular, else a tensor `[s, t]` or
            `[b, 1, s|1, t]` of bool (True is visible) or numbers (1 is visible, fractions are taken literally).
        batch_size: rows of the batch.
        query_length: s.
        like: a tensor with the device and dtype of the hidden states.
        materialise: whether the causal mask must be a real `[s, s]` tensor, because a hook may read it; otherwise a
            single NaN stands for it.
        known: what an earlier call of the same forward found, to be extended (cross attention has a mask of its own).

    Returns:
        The mask and the identities.

    Raises:
        InputError: for another type or shape.
    """
    found: dict[str, Any] = dict(known or {"causal_mask": None, "full_mask": None, "binary_masks": ()})
    if attention_mask is None:
        mask = found["full_mask"] if found["full_mask"] is not None else like.new_ones(1, 1)
        return Masks(mask, found | {"full_mask": mask})
    if isinstance(attention_mask, str) or isinstance(attention_mask, int):
        if attention_mask != "causal" and not (isinstance(attention_mask, int) and attention_mask < 0):
            raise InputError(
                f"attention_mask is {attention_mask!r}; pass None (full), -1 or 'causal', or a tensor [s, t]."
            )
        # NaN, so that whoever reads the stand-in after all hears of it: ones would let every token see the future.
        mask = like.new_ones(query_length, query_length).tril() if materialise else like.new_full((1, 1), float("nan"))
        return Masks(mask, found | {"causal_mask": mask})
    _check_shape(attention_mask, batch_size, query_length)
    mask = attention_mask.to(like)
    if attention_mask.is_floating_point():
        mask = torch.where((mask > 0).all(), torch.ones_like(mask), mask)
    else:
        found["binary_masks"] = (*found["binary_masks"], mask)
    return Masks(mask, found)


def _check_shape(mask: Tensor, batch_size: int, query_length: int) -> None:
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}; pass None, -1, 'causal' or a tensor.")
    shape = tuple(mask.shape)
    is_pairwise = mask.dim() == 2 and shape[0] in (1, query_length)
    is_batched = mask.dim() == 4 and shape[1] == 1 and shape[0] in (1, batch_size) and shape[2] in (1, query_length)
    if not (is_pairwise or is_batched):
        padding = (
            " For padding [b, t] pass attention_mask[:, None, None, :], in a causal model "
            "attention_mask[:, None, None, :].bool() & torch.ones(t, t, dtype=torch.bool).tril()."
        )
        cure = padding if mask.dim() == 2 else ""
        raise InputError(
            f"attention_mask has shape {list(shape)}; for {batch_size} rows of {query_length} tokens it must be "
            f"[{query_length}, t], [{batch_size}, 1, {query_length}, t] or [{batch_size}, 1, 1, t].{cure}"
        )


def lower_right_causal(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Return the bool mask `[s, t]` in which the last query sees every key, each earlier one a key less."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - query_length)


def waiting_keys(kw: dict[str, Any]) -> int:
    """Return how many keys of earlier tokens a cache inside this hook's `old_impl` will put before those at hand.

    The caches themselves hide their keywords from what they wrap; other things of these names are somebody else's.
    """
    mems = kw.get("mems")
    num_held = mems.shape[2] if isinstance(mems, Tensor) and mems.dim() == 4 else 0
    return num_held + int(getattr(kw.get("cache"), "length", 0))


def reach_back(mask: Tensor, num_past: int, num_new: int, kw: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Widen a mask that has columns for the new keys only, so that they see the whole past.

    Args:
        mask: `[.., s, t]`; one with more columns, or with one for all, is left as it is.
        num_past: keys put in front.
        num_new: keys that the mask knows of, appended ones among them.
        kw: keywords of the hook; what is known of the mask is known of the wider one.

    Returns:
        The mask and the keywords.
    """
    if mask.shape[-1] != num_new or mask.shape[-1] == 1 or not num_past:
        return mask, kw
    wide = torch.cat([mask.new_ones(*mask.shape[:-1], num_past), mask], dim=-1)
    if mask is kw.get("causal_mask"):
        kw = kw | {"causal_mask": wide}
    if any(mask is known for known in kw.get("binary_masks", ())):
        kw = kw | {"binary_masks": (*kw["binary_masks"], wide)}
    return wide, kw


def leave_out(mask: Tensor, num_gone: int, num_keys: int, kw: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Narrow a mask, and log attention weights, by the oldest keys, which a cache keeps no longer.

    Args:
        mask: `[.., s, t]`; one with columns for other than all keys is left as it is.
        num_gone: the oldest keys, which are left out.
        num_keys: the keys that there are.
        kw: keywords of the hook; what is known of the mask is known of the narrower one.

    Returns:
        The mask and the keywords.
    """
    weights = kw.get("log_attention_weights")
    if weights is not None and weights.shape[-1] == num_gone + num_keys:
        kw = kw | {"log_attention_weights": weights[..., num_gone:]}
    if mask.shape[-1] != num_gone + num_keys:
        return mask, kw
    near = mask[..., num_gone:]
    if mask is kw.get("causal_mask"):
        kw = kw | {"causal_mask": near}
    if any(mask is known for known in kw.get("binary_masks", ())):
        kw = kw | {"binary_masks": (*kw["binary_masks"], near)}
    return near, kw


def read_padding(attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
    """Read a mask `[b, t]`, 1 for a token and 0 for padding, as `[b, 1, 1, t]`; anything else passes unchanged.

    For encoders, whose callers mean padding by it. Where a batch has as many rows as tokens, `[b, t]` is padding too: a
    mask for pairs of tokens is then `[1, 1, s, t]`.
    """
    is_padding = isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape
    return attention_mask[:, None, None, :] if is_padding and isinstance(attention_mask, Tensor) else attention_mask
