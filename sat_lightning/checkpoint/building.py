"""Building a model that is about to be filled: nothing is drawn, and memory that is not written costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class NoRandomFill(TorchFunctionMode):
    """Leaves parameters as they were allocated where an initialiser would fill them at random."""

    _FILLS = frozenset({
        torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.bernoulli_,
        torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.trunc_normal_, torch.nn.init.xavier_normal_,
        torch.nn.init.xavier_uniform_, torch.nn.init.kaiming_normal_, torch.nn.init.kaiming_uniform_,
        torch.nn.init.orthogonal_,
    })  # fmt: skip

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if func in self._FILLS and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
