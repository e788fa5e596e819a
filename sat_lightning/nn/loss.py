"""Cross entropy of a linear head, without ever holding the logits of all tokens.

Legend: n tokens, c hidden size, v vocabulary.

The logits `[n, v]` and their gradient are the largest tensors of a training step, and nobody asks to see them. Here a
chunk of tokens passes through one buffer that serves the next chunk again: logits, softmax, gradient of the logits, and
from that its share of the gradients of hidden states and weight. The backward has nothing left to do but to scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sat_lightning.errors import InputError

Needs = tuple[bool, bool, bool]

#: Elements of the logits buffer, and the fewest tokens in a chunk: fewer make the matrix products slow.
_CPU_CHUNK, _DEVICE_CHUNK = (1 << 22, 256), (1 << 25, 1024)
#: Tokens whose gradient of the weight fp16 can sum up, and chunks whose sum is rounded no more often than it hurts.
_FP16_CHUNK, _MANY_CHUNKS = 1024, 8
#: Elements on which a CPU computes the statistics at a time: they stay in its cache.
_CPU_BLOCK = 1 << 21


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return `cross_entropy(linear(hidden_states, weight, bias), target_ids)` in the memory of one chunk of tokens.

    Statistics and loss are fp32 for half-precision inputs. The gradients exist once the forward is done ("sum" and
    "mean") or are recomputed from the inputs ("none"); second derivatives do not exist.

    Args:
        hidden_states: `[..., c]`, any strides.
        weight: `[v, c]`; may be tied to an embedding, or frozen.
        target_ids: `[...]`, the class of each row, or `ignore_index`.
        bias: `[v]`.
        ignore_index: rows with this target count neither in the loss nor in its mean, and get no gradient.
        chunk_size: tokens a chunk. Default: as many as fill a buffer of 4 million logits (32 million on a GPU).
        reduction: "mean" over the rows that count, "sum", or "none". A mean over no rows is 0 with gradients of 0 (and
            not NaN as in torch), so that a batch without targets leaves the weights alone.

    Returns:
        A scalar, or with "none" the losses in the shape of `target_ids`, 0 at ignored rows; fp32, or fp64 for fp64.

    Raises:
        InputError: for shapes that do not fit, or an unknown reduction.
    """
    _check(hidden_states, weight, target_ids, bias, chunk_size, reduction)
    hidden_states, weight, bias = _autocast(hidden_states, weight, bias)
    rows, targets = hidden_states.flatten(0, -2), target_ids.flatten()
    counts = targets != ignore_index
    targets = targets.where(counts, 0)
    counts = counts.to(_statistics_dtype(rows))
    size = chunk_size or _default_chunk_size(weight)
    if reduction == "none":
        return _TokenLosses.apply(rows, weight, bias, targets, counts, size).view(target_ids.shape)
    # Inside an autograd.Function gradients are off, so what they need must be known before.
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (rows, weight, bias))
    loss = _SummedLoss.apply(rows, weight, bias, targets, counts, size, needs)
    return loss if reduction == "sum" else loss / counts.sum().clamp(min=1.0)


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses; its gradients are by-products of the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, size: int, needs: Needs,
    ) -> Tensor:  # fmt: skip
        losses, *gradients = _chunked(rows, weight, bias, targets, counts, size, needs)
        ctx.save_for_backward(*gradients)
        ctx.needs = needs
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        # Not in place: a graph that is kept may run backward again.
        gradients = ctx.saved_tensors
        dtype = gradients[0].dtype  # the sums over tokens may be wider than the inputs
        scaled = [(g * grad_output).to(dtype) if need else None for g, need in zip(gradients, ctx.needs, strict=True)]
        return *scaled, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of each token; every token's gradient has a factor of its own, so backward computes them anew."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, size: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(rows, weight, bias, targets, counts)
        ctx.size = size
        return _chunked(rows, weight, bias, targets, counts, size, (False, False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rows, weight, bias, targets, counts = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        _, *gradients = _chunked(rows, weight, bias, targets, counts * grad_output, ctx.size, needs)
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


def _chunked(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factors: Tensor, size: int, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # To a compiler the loop is one opaque operator: unrolled it would take minutes to compile, and gain nothing.
    run = _chunked_operator if torch.compiler.is_compiling() else _losses_and_gradients
    return run(rows, weight, bias, targets, factors, size, *needs)


def _losses_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    size: int,
    needs_rows: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `losses * factors` `[n]`, and the gradients of their sum with the factors fixed; unneeded ones are empty.

    Rows are scaled where they are c wide, never where they are v wide.
    """
    num_rows, num_classes = rows.shape[0], weight.shape[0]
    outputs = _empty_outputs(rows, weight, bias, targets, factors, size, needs_rows, needs_weight, needs_bias)
    losses, grad_rows, grad_weight, grad_bias = outputs
    if num_rows == 0:
        grad_weight.zero_(), grad_bias.zero_()
    sums = [_make_sum(gradient, rows.dtype, num_rows > _MANY_CHUNKS * size) for gradient in (grad_weight, grad_bias)]
    narrow = factors.to(rows.dtype)[:, None]
    logits = rows.new_empty(min(size, num_rows), num_classes)
    for start in range(0, num_rows, size):
        part = slice(start, min(start + size, num_rows))
        chunk = logits[: part.stop - start]
        if bias is None:
            torch.mm(rows[part], weight.t(), out=chunk)
        else:
            torch.addmm(bias, rows[part], weight.t(), out=chunk)
        _losses_of(chunk, targets[part, None], losses[part], needs_rows or needs_weight or needs_bias)
        if needs_rows:
            torch.mm(chunk, weight, out=grad_rows[part])
        if needs_weight:
            _add_product(sums[0], chunk.t(), rows[part] * narrow[part], is_first=start == 0)
        if needs_bias:
            _add_product(sums[1][:, None], chunk.t(), narrow[part], is_first=start == 0)
    for gradient, total in zip((grad_weight, grad_bias), sums, strict=True):
        if total is not gradient:
            gradient.copy_(total)
    if needs_rows:
        grad_rows.mul_(narrow)
    losses.mul_(factors)
    return outputs


def _make_sum(gradient: Tensor, dtype: torch.dtype, has_many_parts: bool) -> Tensor:
    """Return where the parts of a gradient add up: in itself, or in fp32 where bf16 would round the last parts away."""
    is_narrow = has_many_parts and gradient.dtype == dtype and dtype.itemsize < 4
    return torch.empty_like(gradient, dtype=torch.float32) if is_narrow else gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)  # 0 overwrites whatever was there
    elif is_first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _losses_of(logits: Tensor, targets: Tensor, losses: Tensor, needs_gradient: bool) -> None:
    """Fill in the losses, and turn the logits into their gradient, softmax minus one-hot, where they stand."""
    dtype = _statistics_dtype(logits)
    step = max(1, _CPU_BLOCK // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]
    if dtype != logits.dtype:
        buffer = torch.empty(min(step, logits.shape[0]), logits.shape[1], dtype=dtype, device=logits.device)
    for start in range(0, logits.shape[0], step):
        source, target = logits[start : start + step], targets[start : start + step]
        block = source if dtype == logits.dtype else buffer[: source.shape[0]].copy_(source)
        target_logits = block.gather(1, target)[:, 0]
        largest = block.amax(1)
        torch.softmax(block, 1, out=block)
        # The largest class has a softmax of at least 1 / v, so its logarithm is exact where the target's underflows.
        losses[start : start + step] = largest - block.amax(1).log() - target_logits
        if needs_gradient:
            block.scatter_add_(1, target, torch.full_like(target, -1, dtype=dtype))
            if block is not source:
                source.copy_(block)


def _empty_outputs(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    size: int,
    needs_rows: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A sum over all tokens before the loss is scaled down passes the largest number of fp16.
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return (
        torch.empty_like(factors),
        rows.new_empty(rows.shape if needs_rows else 0),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if needs_bias else 0, dtype=dtype),
    )


_chunked_operator = torch.library.custom_op(
    "sat_lightning::chunked_linear_cross_entropy",
    _losses_and_gradients,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias, Tensor targets, Tensor factors, SymInt size, bool needs_rows, "
    "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
_chunked_operator.register_fake(_empty_outputs)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize < 4 else x.dtype


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast as autocast casts the inputs of a linear: it does not reach into an `autograd.Function`."""
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None else x.to(dtype) for x in tensors]


def _default_chunk_size(weight: Tensor) -> int:
    num_logits, fewest = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    size = max(fewest, num_logits // weight.shape[0])
    return min(size, _FP16_CHUNK) if weight.dtype == torch.float16 else size


def _check(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, size: int | None, reduction: str
) -> None:
    if hidden_states.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"hidden_states has {hidden_states.shape[-1]} features, weight {list(weight.shape)} reads "
            f"{weight.shape[-1]}. Give the weight of this model's head, [vocabulary, hidden size]."
        )
    if hidden_states.shape[:-1] != target_ids.shape:
        raise InputError(
            f"target_ids has shape {list(target_ids.shape)}, hidden_states {list(hidden_states.shape)}: there must be "
            f"one target a token, {list(hidden_states.shape[:-1])}. Shift targets by one place, do not cut the states."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias has shape {list(bias.shape)}, weight has {weight.shape[0]} rows. Give one bias a row.")
    if size is not None and size < 1:
        raise InputError(f"chunk_size is {size}; it counts tokens, so give at least 1, or None to choose.")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is '{reduction}'. Choose 'mean', 'sum' or 'none'.")
