"""Whether the gradients of a window are finite, under each strategy, and how they are dropped."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sat_lightning.training.finite import is_any_rank


class GradientCheck:
    """Looks at the gradients of a window, once all of them are there.

    Args:
        strategy: that holds them.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy: Any = strategy

    def prepare(self) -> None:
        """Have ZeRO 1 and 2 look too: they hold gradients where nobody else sees them."""
        optimizer: Any = getattr(self._engine, "optimizer", None)
        if hasattr(optimizer, "check_grad_overflow"):
            optimizer.check_grad_overflow = True

    @property
    def is_left_to_scaler(self) -> bool:
        """Whether fp16's loss scale is on: whoever adapts it looks for overflows, and drops those steps by itself."""
        if getattr(self._strategy.precision_plugin, "scaler", None) is not None:
            return True
        return self._engine is not None and bool(self._engine.fp16_enabled())

    def is_bad_before_step(self, optimizer: Optimizer) -> bool:
        """Look, and agree over all ranks.

        Args:
            optimizer: that is about to step.
        """
        engine = self._engine
        if hasattr(getattr(engine, "optimizer", None), "overflow"):
            return False  # it looks by itself, in its step
        if engine is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        else:
            parameters = list(engine.module.parameters())
        return is_any_rank(_flag(parameters, self._strategy.root_device))

    def is_bad_after_step(self) -> bool:
        """Tell whether DeepSpeed has found a gradient that is not finite and made no step; all ranks say the same."""
        return bool(getattr(getattr(self._engine, "optimizer", None), "overflow", False))

    def drop(self) -> None:
        """Forget the gradients; without DeepSpeed the next window clears them, and in its step it did so itself."""
        if self._engine is not None and not self.is_bad_after_step():
            self._engine.zero_grad()
            self._engine.micro_steps += 1

    def describe(self) -> str:
        """Name the parameters with a bad gradient, those nearest to the loss first; nothing where none is seen here."""
        named = [(name, p.grad) for name, p in self._strategy.lightning_module.named_parameters() if p.grad is not None]
        names = [name for name, gradient in reversed(named) if not torch.isfinite(_local(gradient)).all()]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def _engine(self) -> Any:  # noqa: ANN401
        """DeepSpeed's engine, if there is one."""
        model = self._strategy.model
        return model if hasattr(model, "is_gradient_accumulation_boundary") else None


def _flag(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """A number on a device: 0 if every gradient is finite."""
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    where = gradients[0].device
    if all(gradient.dtype is torch.float32 and gradient.device == where for gradient in gradients):
        found = torch.zeros((), device=where)
        # What the loss scaler of fp16 looks with: one kernel for all of them. Times 1 every number stays what it is.
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, torch.ones((), device=where))
        return found.to(device)
    # The largest magnitude, and no sum of squares: that overflows where every gradient is finite.
    return torch.isfinite(get_total_norm(gradients, math.inf)).logical_not().to(device, torch.float32)


def _local(gradient: Tensor) -> Tensor:
    """The part of a gradient that lies here, and of a sparse one its values."""
    if type(gradient) is Tensor and not gradient.is_sparse:
        return gradient
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient.coalesce().values() if gradient.is_sparse else gradient
