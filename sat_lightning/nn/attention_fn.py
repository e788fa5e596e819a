"""The core of attention, by whichever kernel: softmax(query key^T) value.

Legend: b batch, h heads, k key/value heads, s query length, t key length, d head size.

Every backend computes ``softmax((q k^T / sqrt(d) + w) * m - 10000 (1 - m)) v`` with mask m and log attention weights w.
`eager` writes that line out. The others need a mask of 0 and 1, where the line becomes a bias (and a query of 0 where
nothing is visible, so that it averages all values); what is known of a mask is in `sat_lightning.nn.masks`.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.errors import InputError
from sat_lightning.nn.blocked_attention import blocked_attention, is_blocked_faster
from sat_lightning.nn.masks import MASKED_SCORE, lower_right_causal


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    attention_dropout: nn.Module | None = None,
    log_attention_weights: Tensor | None = None,
    scaling_attention_score: bool = True,
    **kw: object,
) -> Tensor:
    """Attention written out: the definition every backend equals.

    Args:
        query: `[b, h, s, d]`.
        key: `[b, k, t, d]`, k divides h; query head j reads key head j // (h / k).
        value: `[b, k, t, d]`.
        attention_mask: `[s, t]` or `[b|1, 1, s|1, t]` (or one element), 1 is visible, fractions are taken literally.
        attention_dropout: applied to the weights.
        log_attention_weights: added to the scores before masking, broadcast to `[b, h, s, t]`.
        scaling_attention_score: divide the scores by sqrt(d).
        **kw: ignored.

    Returns:
        `[b, h, s, d]`.
    """
    if scaling_attention_score:
        query = query / math.sqrt(query.shape[-1])
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    scores = query @ key.transpose(-1, -2)  # [b, h, s, t]
    if log_attention_weights is not None:
        scores = scores + log_attention_weights
    scores = scores * attention_mask + MASKED_SCORE * (1.0 - attention_mask)
    weights = F.softmax(scores, dim=-1)
    if attention_dropout is not None:
        weights = attention_dropout(weights)
    return weights @ value


def attention_fn_default(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_dropout: nn.Module | None = None,
    log_attention_weights: Tensor | None = None,
    scaling_attention_score: bool = True,
    causal_mask: Tensor | None = None,
    full_mask: Tensor | None = None,
    binary_masks: tuple[Tensor, ...] = (),
    appended_keys: int = 0,
    attention_backend: str = "auto",
    **kw: object,
) -> Tensor:
    """Attend by the fastest kernel that what is known of the mask allows; the result is `[b, h, s, d]`.

    Args:
        query: this and the next six as in `standard_attention`; dropout acts while it is training.
        key: see above.
        value: see above.
        attention_mask: see above; None is full.
        attention_dropout: see above.
        log_attention_weights: see above.
        scaling_attention_score: see above.
        causal_mask: the mask object known to be lower triangular; with s < t the last query sees every key.
        appended_keys: how many of the last keys a causal mask is not about: every query sees them.
        full_mask: the mask object known to hide nothing, as None does.
        binary_masks: mask objects known to hold only 0 and 1.
        attention_backend: `auto`, `eager`, `sdpa`, `flash` or `flex`.
        **kw: ignored.

    Raises:
        InputError: if the mask does not fit the keys, or the backend cannot serve the call.
    """
    if query.shape[2] == 1 and attention_backend == "auto" and log_attention_weights is None and not attention_dropout:
        if attention_mask is None or attention_mask is full_mask or attention_mask is causal_mask:
            return _attend_one(query, key, value, scaling_attention_score)
    mask, is_causal, is_exact = _read_mask(attention_mask, query, key, causal_mask, full_mask, binary_masks)
    if is_causal and appended_keys:
        # In front of the others they are what the last query, and each before it, sees anyway.
        key, value = key.roll(appended_keys, 2), value.roll(appended_keys, 2)
        log_attention_weights = _roll(log_attention_weights, appended_keys)
    plan = _Plan(mask, is_causal, log_attention_weights, scaling_attention_score, _acting_prob(attention_dropout))
    if attention_backend == "flex":
        return _flex(query, key, value, plan)
    if attention_backend == "eager" or not is_exact:  # no fused kernel scales the scores by fractions in a mask
        exact = _tensor_mask(plan, query, key)
        return standard_attention(query, key, value, exact, attention_dropout, plan.weights, plan.is_scaled)
    return _fused(query, key, value, plan, attention_backend)


def _fused(query: Tensor, key: Tensor, value: Tensor, plan: _Plan, backend: str) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_wide = plan.is_causal and plan.weights is None and num_queries < num_keys <= 2 * num_queries
    if is_wide and not _is_masked_faster(query):
        # Queries in front, of which nothing is kept, make it square: what fused kernels know how to leave out.
        query = F.pad(query, (0, 0, num_keys - num_queries, 0))
        return _fused(query, key, value, plan, backend)[:, :, -num_queries:]
    if backend == "flash":
        return _flash(query, key, value, plan)
    if backend == "auto" and _is_plain(plan) and is_blocked_faster(query, key):
        scale = 1.0 / math.sqrt(query.shape[-1]) if plan.is_scaled else 1.0
        return blocked_attention(query, key, value, is_causal=plan.is_causal, scale=scale)
    return _sdpa(query, key, value, plan)


def _is_masked_faster(query: Tensor) -> bool:
    """Say whether a mask costs less than more queries: measured on CPUs in fp32, by 10 to 40 % up to 512 tokens."""
    return query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[2] <= 512


def _roll(weights: Tensor | None, count: int) -> Tensor | None:
    return weights if weights is None or weights.shape[-1] == 1 else weights.roll(count, -1)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, is_scaled: bool) -> Tensor:
    """Attend from one query to all keys: a step of a generation, where every Python call is felt."""
    scale, is_grouped = None if is_scaled else 1.0, key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=is_grouped)


def _acting_prob(dropout: nn.Module | None) -> float:
    return float(dropout.p) if dropout is not None and dropout.training else 0.0  # type: ignore[arg-type]


def _read_mask(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    causal_mask: Tensor | None,
    full_mask: Tensor | None,
    binary_masks: tuple[Tensor, ...],
) -> tuple[Tensor | None, bool, bool]:
    """Return the mask if a tensor is needed, whether it is causal, and whether it is known to be only 0 and 1."""
    if mask is None or mask is full_mask:
        return None, False, True
    if mask is causal_mask:
        return None, query.shape[2] > 1, True
    _check_mask(mask, query, key)
    return mask, False, any(mask is known for known in binary_masks)


class _Plan(NamedTuple):
    """What decides a kernel's arguments."""

    mask: Tensor | None
    is_causal: bool
    weights: Tensor | None
    is_scaled: bool
    dropout_prob: float


def _is_plain(plan: _Plan) -> bool:
    """Tell whether nothing but causality distinguishes one score from another."""
    return plan.mask is None and plan.weights is None and plan.dropout_prob == 0.0


def _sdpa(query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
    options: dict[str, Any] = {"dropout_p": plan.dropout_prob, "scale": None if plan.is_scaled else 1.0}
    if key.shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    sees_nothing = plan.is_causal and query.shape[2] > key.shape[2]  # the first queries of a lower-right mask
    if plan.weights is None and plan.mask is None and not sees_nothing:
        if plan.is_causal and query.shape[2] != key.shape[2]:
            options["attn_mask"] = lower_right_causal(query.shape[2], key.shape[2], query.device)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=plan.is_causal and "attn_mask" not in options, **options
        )
    mask = _tensor_mask(plan, query, key)
    # A row that sees nothing gets no bias and a query of 0: the same average, without the rounding of 10000 + log(t).
    sees = mask.amax(-1, keepdim=True)
    bias = (sees - mask) * MASKED_SCORE
    if plan.weights is not None:
        bias = bias + plan.weights.to(query.dtype) * mask
    return F.scaled_dot_product_attention(query * sees, key, value, attn_mask=bias, **options)


def _flex(query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if plan.dropout_prob > 0.0:
        raise InputError("attention_backend 'flex' has no dropout: set attention_dropout to 0 or choose 'sdpa'.")
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise InputError(
            "attention_backend 'flex' has no backward pass on CPU: choose 'sdpa', or run under torch.no_grad()."
        )
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    needs_mask = plan.mask is not None or plan.is_causal
    mask = _tensor_mask(plan, query, key).expand(shape) if needs_mask else None
    weights = plan.weights.expand(shape) if plan.weights is not None else None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if weights is not None:
            score = score + weights[b, h, s, t]
        if mask is not None:
            visible = mask[b, h, s, t]
            score = score * visible + MASKED_SCORE * (1.0 - visible)
        return score

    attend: Any = flex_attention if torch.compiler.is_compiling() else _eager_flex(query.is_cuda)
    return attend(
        query,
        key,
        value,
        score_mod=score_mod,
        scale=None if plan.is_scaled else 1.0,
        enable_gqa=key.shape[1] != query.shape[1],
    )


@cache
def _eager_flex(is_cuda: bool) -> Any:
    """Return flex attention for eager callers: on a GPU its kernel exists only compiled, once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if is_cuda else flex_attention


def _flash(query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
    if plan.weights is not None and plan.weights.requires_grad:
        raise InputError(
            "attention_backend 'flash' gives log_attention_weights no gradient: choose 'sdpa', or detach them."
        )
    needs_bias = not (plan.mask is None and plan.weights is None)
    if query.is_cuda and (needs_bias or plan.is_causal and query.shape[2] != key.shape[2]):
        raise InputError(
            "attention_backend 'flash' takes no mask tensor and no log_attention_weights on a GPU: only the full mask "
            "(None), and the causal one (-1) over as many keys as queries. Choose 'sdpa' or 'flex'."
        )
    if not query.is_cuda:  # older CPU kernels do not group queries
        key, value = (_repeat_heads(x, query.shape[1]) for x in (key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return _sdpa(query, key, value, plan)


def _tensor_mask(plan: _Plan, query: Tensor, key: Tensor) -> Tensor:
    if plan.is_causal:
        return lower_right_causal(query.shape[2], key.shape[2], query.device).to(query.dtype)
    return query.new_ones(1, 1) if plan.mask is None else plan.mask.to(query.dtype)


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    s, t = query.shape[2], key.shape[2]
    if mask.shape[-1] not in (1, t) or mask.shape[-2] not in (1, s):
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}, the scores are [{s}, {t}] (queries, keys). A hook that "
            "adds keys must extend the mask by as many columns."
        )


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give every query head its key/value head: `[b, k, t, d]` to `[b, h, t, d]`."""
    if x.shape[1] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)
