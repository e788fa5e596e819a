"""What changes logits before a token is chosen: pure functions, vectorised over rows, none of which asks the device.

Legend: b rows, n columns of tokens, v vocabulary, w words.

`logits` are `[b, v]` float; a new tensor comes back. `tokens` are `[b, n]` ids, -1 where there is none. What is banned
becomes -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

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


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.

    Nguyen et al., Turning Up the Heat: Min-p Sampling, 2024.
    """
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)


def keep_typical(logits: Tensor, typical_p: float) -> Tensor:
    """Keep the fewest tokens, those whose surprise is nearest the entropy first, of `typical_p` probability; 0, 1: all.

    Meister et al., Locally Typical Sampling, 2022.
    """
    if not 0 < typical_p < 1:
        return logits
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -torch.where(probs > 0, probs * log_probs, 0).sum(-1, keepdim=True)
    _, indices = (-log_probs - entropy).abs().sort(dim=-1, stable=True)
    probs = probs.gather(-1, indices)
    is_removed = probs.cumsum(-1) - probs >= typical_p
    return logits.masked_fill(torch.zeros_like(is_removed).scatter(-1, indices, is_removed), -torch.inf)


def sat_repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide the logits of tokens that occur in `tokens` by `penalty`, whatever their sign: SAT's form.

    A negative logit grows likelier by it; `signed_repetition_penalty` has no such flaw.
    """
    return torch.where(_count(logits, tokens) > 0, logits / penalty, logits)


def signed_repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens that occur in `tokens` by `penalty`, and multiply negative ones.

    The form of Hugging Face, after Keskar et al., CTRL, 2019.
    """
    punished = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(_count(logits, tokens) > 0, punished, logits)


def count_penalty(logits: Tensor, tokens: Tensor, frequency: float, presence: float) -> Tensor:
    """Subtract `frequency` for each time a token occurs in `tokens`, and `presence` once if it occurs at all."""
    counts = _count(logits, tokens)
    return logits - frequency * counts - presence * (counts > 0)


def ban_mask(logits: Tensor, is_banned: Tensor) -> Tensor:
    """Ban what a mask `[v]` or `[b, v]` says."""
    return logits.masked_fill(is_banned, -torch.inf)


def mask_of_slices(slices: Iterable[Any], like: Tensor) -> Tensor:
    """Turn slices, ids or lists of ids of the vocabulary into a mask `[v]` for logits like these."""
    is_banned = torch.zeros(like.shape[-1], dtype=torch.bool, device=like.device)
    for part in slices:
        is_banned[part] = True
    return is_banned


def ban_repeated_ngrams(logits: Tensor, tokens: Tensor, size: int, first_column: int = 0) -> Tensor:
    """Ban every token that would end an n-gram which a row already has.

    Args:
        logits: `[b, v]`.
        tokens: `[b, n]`, the newest in the last column.
        size: of the n-grams; 0 bans nothing, 1 bans every token that occurred.
        first_column: only n-grams that end in this column or a later one count.

    Returns:
        Logits `[b, v]`.
    """
    if size == 0 or tokens.shape[1] < size:
        return logits
    grams = tokens.unfold(1, size, 1)[:, max(first_column - size + 1, 0) :]  # [b, n - size + 1, size]
    newest = tokens[:, None, tokens.shape[1] - size + 1 :]
    is_repeated = (grams[..., :-1] == newest).all(-1) & (grams >= 0).all(-1)
    return ban_mask(logits, _count(logits, torch.where(is_repeated, grams[..., -1], -1)) > 0)


def pack_words(words: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Put words of one token or more into tensors for `ban_words`.

    Args:
        words: ids of each.
        device: where the tensors go.

    Returns:
        All but the last token of each, `[w, longest - 1]` with -1 on the left, and the last `[w]`.
    """
    longest = max(len(word) for word in words)
    heads = [[-1] * (longest - len(word)) + list(word[:-1]) for word in words]
    lasts = [word[-1] for word in words]
    return torch.tensor(heads, device=device, dtype=torch.int64), torch.tensor(lasts, device=device)


def ban_words(logits: Tensor, tokens: Tensor, heads: Tensor, lasts: Tensor) -> Tensor:
    """Ban the last token of each word whose other tokens a row ends with; see `pack_words`."""
    width = heads.shape[1]
    missing = tokens.new_full((len(tokens), max(width - tokens.shape[1], 0)), -2)  # equals no token of a word
    newest = torch.cat([missing, tokens], dim=1)[:, missing.shape[1] + tokens.shape[1] - width :]
    is_begun = ((newest[:, None] == heads) | (heads < 0)).all(-1)  # [b, w]
    return ban_mask(logits, _count(logits, torch.where(is_begun, lasts, -1)) > 0)


def _count(logits: Tensor, tokens: Tensor) -> Tensor:
    """Count each of the vocabulary in each row of tokens, `[b, v]`; places without a token go to an extra column."""
    vocab_size = logits.shape[-1]
    places = torch.where(tokens < 0, vocab_size, tokens)
    counts = logits.new_zeros(len(logits), vocab_size + 1, dtype=torch.float32)
    return counts.scatter_add(1, places, torch.ones_like(places, dtype=torch.float32))[:, :-1]
