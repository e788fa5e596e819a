"""Linears and embeddings, initialised once by the rule they are given, and the dispatch of `linear_forward`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from sat_lightning.hooks import HookTable

InitMethod = Callable[[Tensor], object]


def normal_init(std: float) -> InitMethod:
    """Return an initialiser: normal with mean 0 and the given standard deviation."""
    return partial(nn.init.normal_, mean=0.0, std=std)


def scaled_normal_init(std: float, num_layers: int) -> InitMethod:
    """Return the initialiser of linears that write to the residual stream: std / sqrt(2 * num_layers) (GPT-2)."""
    return normal_init(std / math.sqrt(2.0 * num_layers))


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts by `init_method` and whose bias starts at 0.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether to add one.
        init_method: fills the weight in place.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, init_method: InitMethod) -> None:
        self._init_method = init_method  # before nn.Linear calls reset_parameters: nothing is initialised twice
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Fill weight and bias by their rules."""
        self._init_method(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchLinear(nn.Conv2d):
    """A linear over squares of pixels that do not overlap, as a convolution; its weight starts by `init_method`.

    Args:
        in_channels: channels of the image.
        out_channels: features of a square.
        size: side of a square.
        bias: whether to add one; it starts at 0.
        init_method: fills the weight in place.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, bias: bool, init_method: InitMethod) -> None:
        self._init_method = init_method
        super().__init__(in_channels, out_channels, size, stride=size, bias=bias)

    def reset_parameters(self) -> None:
        """Fill weight and bias by their rules."""
        self._init_method(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose table starts by `init_method`."""

    #: Whether several parts of a model read it.
    is_shared: bool = False

    def __init__(self, num_embeddings: int, embedding_dim: int, init_method: InitMethod) -> None:
        self._init_method = init_method
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Fill the table by its rule."""
        self._init_method(self.weight)


def apply_linear(module: nn.Module, name: str, x: Tensor, /, *, hooks: HookTable, **kw: object) -> Tensor:
    """Run the linear `module.<name>`, or the `linear_forward` hook with it, if anybody speaks there."""
    linear = getattr(module, name)
    return linear(x) if hooks.linear_forward is None else run_linear(linear, name, x, hooks=hooks, **kw)


def run_linear(linear: nn.Module, name: str, x: Tensor, /, *, hooks: HookTable, **kw: object) -> Tensor:
    """Run a linear of a mixin, or the `linear_forward` hook with it: adapters reach what mixins add."""
    if hooks.linear_forward is None:
        return linear(x)
    return hooks.linear_forward(x, linear=linear, name=name, hooks=hooks, **kw)


def drop_out(dropout: nn.Module, x: Tensor) -> Tensor:
    """Drop features while training; outside it nothing is called, as for one token a call is dear."""
    return dropout(x) if dropout.training else x
