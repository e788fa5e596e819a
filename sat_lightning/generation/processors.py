"""What changes logits before a token is chosen: pure functions, vectorised over rows, none of which asks the device.

Legend: b rows, n columns of tokens, v vocabulary, w words.

`logits` are `[b, v]` float; a new tensor comes back. `tokens` are `[b, n]` ids, -1 where there is none. What is banned
becomes -inf.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def top_k_logits(logits: Tensor, top_k: int = 0, top_p: float = 0.0, filter_value: float = -65504.0) -> Tensor:
    """SAT's name for `keep_top_k` and then `keep_top_p`; unlike SAT's, a `top_p` of 0 is off, and nothing is in place.

    Args:
        logits: `[..., v]`.
        top_k: see `keep_top_k`.
        top_p: see `keep_top_p`.
        filter_value: what a removed logit becomes.

    Returns:
        Logits of the same shape.
    """
    kept = keep_top_p(keep_top_k(logits, top_k), top_p)
    return logits.masked_fill(kept == -torch.inf, filter_value)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest logits of each row (those equal to the last of them too); 0 keeps all."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest largest logits whose probabilities add up to `top_p` or more; 0 and 1 keep all.

    Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.
    """
    if not 0 < top_p < 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    is_removed = probs.cumsum(-1) - probs >= top_p  # what the larger ones add up to
    return logits.masked_fill(torch.zeros_like(is_removed).scatter(-1, indices, is_removed), -torch.inf)


def sat_repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide the logits of tokens that occur in `tokens` by `penalty`, whatever their sign: SAT's form.

    A negative logit grows likelier by it; `signed_repetition_penalty` has no such flaw.
    """
    return torch.where(_occurs(logits, tokens), logits / penalty, logits)


def ban_slices(logits: Tensor, slices: Iterable[slice | int | list[int]]) -> Tensor:
    """Ban what each of `slices` selects from the vocabulary."""
    is_banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    for part in slices:
        is_banned[part] = True
    return logits.masked_fill(is_banned, -torch.inf)


def _occurs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Say which of the vocabulary each row holds, `[b, v]`; a place without a token counts for an extra column."""
    places = torch.where(tokens < 0, logits.shape[-1], tokens)
    found = torch.zeros(len(logits), logits.shape[-1] + 1, dtype=torch.bool, device=logits.device)
    return found.scatter(1, places, torch.ones_like(places, dtype=torch.bool))[:, :-1]
