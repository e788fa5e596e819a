"""Attention of short sequences on a CPU, where matrix products in blocks beat the fused kernel.

Legend: b batch, h heads, n = b * h, s length, d head size, l queries of a block, g heads of a group.

Scores are made for a group of heads and a block of queries at a time, always in the same memory, which so stays in
cache; a causal block stops at its last visible key. Nothing of size `s * s` is kept: backward makes the scores again.
PyTorch's fused kernel computes whole rows in its causal form up to 256 keys, and has slow products in bf16; in fp32 it
is the better one, and serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Scores in memory at a time, unless one block of one head has more.
_NUM_SCORES = 1 << 20
_MAX_LENGTH = 2048


def is_blocked_faster(query: Tensor, key: Tensor) -> bool:
    """Say whether `blocked_attention` serves these shapes, and measures faster than the fused kernel.

    Args:
        query: `[b, h, s, d]`.
        key: `[b, h, t, d]`.

    Returns:
        True for self-attention on a CPU in bf16, up to 2048 tokens. In fp32 it wins 2 % of a step on one thread, and
        loses 6 % on two.
    """
    if query.device.type != "cpu" or query.shape != key.shape:
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # torch.func cannot look into an operator with a backward of its own
    return query.dtype == torch.bfloat16 and query.shape[2] <= _MAX_LENGTH and _has_bfloat16_products()


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """Return `softmax(scale * query key^T) value`, and its gradients, in the memory of one block.

    Args:
        query: `[b, h, s, d]`, any strides; no queries that see nothing.
        key: `[b, h, s, d]`.
        value: `[b, h, s, d]`.
        is_causal: whether a query sees only keys up to its own place.
        scale: factor of the scores.

    Returns:
        `[b, h, s, d]`.
    """
    query_rows, key_rows, value_rows = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (query, key, value))
    return _forward(query_rows, key_rows, value_rows, is_causal, scale).view(query.shape)


# Operators, so that a compiler takes each as a whole: it would unroll the loops.
@torch.library.custom_op(
    "sat_lightning::blocked_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) -> Tensor",
)
def _forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
    output = torch.empty_like(query)
    for heads, queries, keys, weights, _ in _blocks(query, key, is_causal, scale, num_buffers=1):
        torch.bmm(weights, value[heads, keys], out=output[heads, queries])
    return output


@torch.library.custom_op(
    "sat_lightning::blocked_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor query, Tensor key, Tensor value, bool is_causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    for heads, queries, keys, weights, grad_scores in _blocks(query, key, is_causal, scale, num_buffers=2):
        grad, part = grad_output[heads, queries], (heads, keys)
        # The first block of a group sees every key: it overwrites what the later ones add to.
        beta = 0 if queries.stop == query.shape[1] else 1
        torch.bmm(grad, value[part].transpose(1, 2), out=grad_scores)
        _add_product(grad_value[part], weights.transpose(1, 2), grad, beta)
        torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, grad_scores.dtype, grad_input=grad_scores)
        _add_product(grad_query[heads, queries], grad_scores, key[part], 0, scale)
        _add_product(grad_key[part], grad_scores.transpose(1, 2), query[heads, queries], beta, scale)
    return grad_query, grad_key, grad_value


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_output: Tensor) -> Any:
    gradients = _backward(grad_output.contiguous(), *ctx.saved_tensors, ctx.is_causal, ctx.scale)
    return *gradients, None, None


_forward.register_fake(lambda query, key, value, is_causal, scale: torch.empty_like(query))
_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_fake(
    lambda grad_output, query, key, value, is_causal, scale: tuple(torch.empty_like(x) for x in (query, key, value))
)


def _blocks(
    query: Tensor, key: Tensor, is_causal: bool, scale: float, num_buffers: int
) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """Yield heads, queries, keys, attention weights `[g, l, keys]` and a buffer of their shape, last queries first."""
    num_heads, length = query.shape[:2]
    # At most four blocks up to 1024 tokens: sums over blocks are rounded to the dtype of the gradients.
    size = max(64, min(256, -(-length // 4))) if is_causal else length
    group = max(1, min(num_heads, _NUM_SCORES // (size * length)))
    buffers = query.new_empty(num_buffers, group * size * length)
    hidden = query.new_full((size, size), float("-inf")).triu_(1) if is_causal else None
    for first in range(0, num_heads, group):
        heads = slice(first, min(first + group, num_heads))
        for start in reversed(range(0, length, size)):
            queries = slice(start, min(start + size, length))
            keys = slice(0, queries.stop if is_causal else length)
            shape = (heads.stop - heads.start, queries.stop - queries.start, keys.stop)
            scores, other = (buffers[i][: shape[0] * shape[1] * shape[2]].view(shape) for i in (0, -1))
            _add_product(scores, query[heads, queries], key[heads, keys].transpose(1, 2), 0, scale)
            if hidden is not None:
                scores[:, :, start:].add_(hidden[: shape[1], : shape[1]])
            yield heads, queries, keys, torch.softmax(scores, -1, out=scores), other


def _add_product(target: Tensor, left: Tensor, right: Tensor, beta: int, alpha: float = 1.0) -> None:
    torch.baddbmm(target, left, right, beta=beta, alpha=alpha, out=target)


@cache
def _has_bfloat16_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
