"""Weights laid out as a CPU's matrix products read them fastest, for the time of a generation.

Legend: n rows, i inputs, o outputs of a linear.

A weight `[o, i]` as training keeps it is laid out anew in every product. Laid out once, products of a few rows take a
half to a third of the time, which is most of a step of a generation. The copies need as much memory as the weights. A
single row in a compiled step needs none: loops made for it read a weight as it lies at about the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Copies above this many bytes are made only when asked for, and none for fewer tokens than these.
MAX_BYTES, MIN_TOKENS = 2 << 30, 32
#: A matrix of fewer numbers than these is multiplied faster than the kernel for copies is called.
_MIN_NUMBERS = 1 << 14

#: Those whose copies serve at the moment, the newest last.
_SERVING: Final[list[PackedWeights]] = []


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, weight, bias)` by the copy that serves; to a compiler it is one operator."""
    if torch.compiler.is_compiling():
        return torch.ops.sat_lightning.multiply_packed(x, weight, bias)
    return _multiply(x, weight, bias)


def multiply_vector(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, weight, bias)`; one row is compiled to loops that read a weight as it lies."""
    if x.numel() != x.shape[-1] or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    row = x.float().as_strided(x.shape[-1:], (1,))  # so that the compiler stores it: not anew for each output
    result = (row * weight.float()).sum(-1)
    result = result if bias is None else result + bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], -1)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _SERVING[-1].multiply(x, weight, bias) if _SERVING else F.linear(x, weight, bias)


_LIBRARY = torch.library.Library("sat_lightning", "FRAGMENT")
_LIBRARY.define("multiply_packed(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("multiply_packed", _multiply, "CPU")
_LIBRARY._register_fake("multiply_packed", F.linear)


class PackedWeights:
    """Copies of weights, each made when it is first used; none for a single row whose step is compiled to loops.

    Args:
        num_rows: n of the products to come.
        is_compiled: whether inductor compiles them.
    """

    def __init__(self, num_rows: int, is_compiled: bool = False) -> None:
        self.num_rows, self.makes_copies = num_rows, num_rows > 1 or not is_compiled
        self.function = multiply if self.makes_copies else multiply_vector
        """Serves like `F.linear`."""
        self._copies: dict[int, Tensor] = {}
        self._weights: list[Tensor] = []  # kept alive, so that each has its id for itself

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `F.linear(x, weight, bias)`."""
        if x.dtype is not weight.dtype:
            return F.linear(x, weight, bias)
        copy = self._copies.get(id(weight))
        if copy is None:
            copy = self._copies[id(weight)] = self._copy(weight.detach()) if self.makes_copies else weight.detach()
            self._weights.append(weight)
        if copy.layout is torch.strided:
            return F.linear(x, copy, bias)
        return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")

    @contextmanager
    def serve(self, model: nn.Module) -> Iterator[None]:
        """Let every plain linear of a model multiply by its copy."""
        kinds = {m: type(m) for m in model.modules() if isinstance(m, nn.Linear) and _is_plain(m)}
        for linear in kinds:  # a compiler knows a class again, as it would no function made here
            linear.__class__ = _PackedLinear if self.makes_copies else _VectorLinear
        _SERVING.append(self)
        try:
            yield
        finally:
            _SERVING.remove(self)
            for linear, kind in kinds.items():
                linear.__class__ = kind

    def _copy(self, weight: Tensor) -> Tensor:
        """Return the weight in the layout that measures fastest for its shape; it may be its own."""
        if weight.numel() < _MIN_NUMBERS:
            return weight
        num_outputs, num_inputs = weight.shape
        is_vector = self.num_rows == 1 and weight.dtype is torch.float32
        if is_vector and torch.get_num_threads() == 1 and num_outputs > num_inputs:
            return weight.t().contiguous().t()  # one thread alone is fastest down the columns of a tall matrix
        return torch.ops.mkldnn._reorder_linear_weight(weight, self.num_rows)


class _PackedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return multiply(input, self.weight, self.bias)


class _VectorLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return multiply_vector(input, self.weight, self.bias)


def plan_products(
    model: nn.Module, num_rows: int, num_tokens: int, wish: bool | None, backend: str | None
) -> PackedWeights | None:
    """Say how a generation multiplies: None, where other ways are not known, not asked for, or do not pay.

    Args:
        model: whose weights.
        num_rows: prompts at a time.
        num_tokens: written at most.
        wish: the user's word, or None.
        backend: which compiler makes the step, or None.
    """
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if wish is False or not num_rows or any(p.device.type != "cpu" for p in parameters):
        return None
    if torch.is_autocast_enabled("cpu") or not dtypes <= {torch.float32, torch.bfloat16}:
        return None
    packed = PackedWeights(num_rows, backend == "inductor")
    if not packed.makes_copies:
        return packed
    is_worthwhile = num_tokens >= MIN_TOKENS and sum(p.nbytes for p in parameters) <= MAX_BYTES
    return packed if (wish or is_worthwhile) and _has_kernels(torch.bfloat16 in dtypes) else None


def _has_kernels(needs_bfloat16: bool) -> bool:
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return hasattr(ops, "_reorder_linear_weight") and (not needs_bfloat16 or ops._is_mkldnn_bf16_supported())


def _is_plain(linear: nn.Linear) -> bool:
    """Say whether a linear is just one: not wrapped, not a tensor of another kind, not a part of one."""
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    is_whole = type(weight) is nn.Parameter and weight.shape == shape and weight.is_contiguous()
    return is_whole and "forward" not in vars(linear) and type(linear).forward is nn.Linear.forward
