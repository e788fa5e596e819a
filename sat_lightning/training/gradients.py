"""Whether the gradients of a window are finite, under each strategy, and how they are dropped."""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sat_lightning.training.steps import StepModule


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
            if getattr(optimizer, "compute_grad_norm", False) and not self.is_left_to_scaler:
                # The norm that it takes anyway tells; it need not look at every gradient, and ask all ranks, before.
                optimizer.check_overflow = lambda partition_gradients=True: None
        scaler: Any = getattr(optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # `stuck_scale` tells, under all stages

    @property
    def stuck_scale(self) -> float | None:
        """DeepSpeed's loss scale, if it cannot fall further and gradients still overflow."""
        optimizer: Any = getattr(self._engine, "optimizer", None)
        if not getattr(optimizer, "overflow", False):
            return None
        scaler: Any = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        lowest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None)
        return None if lowest is None or scaler.cur_scale > lowest else float(scaler.cur_scale)

    @property
    def is_left_to_scaler(self) -> bool:
        """Whether fp16's loss scale is on: whoever adapts it looks for overflows, and drops those steps by itself."""
        if getattr(self._strategy.precision_plugin, "scaler", None) is not None:
            return True
        return self._engine is not None and bool(self._engine.fp16_enabled())

    @property
    def is_left_to_engine(self) -> bool:
        """Whether DeepSpeed looks by itself, in its step, and tells with `is_bad_after_step`."""
        return hasattr(getattr(self._engine, "optimizer", None), "overflow")

    def find_bad(self, optimizer: Optimizer) -> Tensor:
        """Look, without waiting for the device.

        Args:
            optimizer: that is about to step.

        Returns:
            An int32 of shape `[1]`: 0 if every gradient of this rank is finite.
        """
        if self._engine is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        else:
            parameters = list(self._engine.module.parameters())
        return _flag(parameters, self._strategy.root_device).to(torch.int32).reshape(1)

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


def forgets_backward(trainer: L.Trainer) -> bool:
    """Tell whether a backward pass of NaN leaves nothing behind but gradients, as far as anybody can see.

    Whether a batch is good can then be asked after its backward pass, together with whether its gradients are. Not so
    with hooks that see gradients and may keep what they see, with compression of gradients that feeds errors back, with
    fp8 that scales by what it saw, under anomaly detection, and where a module calls the optimizer in a way of its own.

    Args:
        trainer: that fits.
    """
    module: Any = trainer.lightning_module
    hooks = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
    seen = [getattr(c, name) for c in trainer.callbacks for name in hooks if is_overridden(name, c)]  # type: ignore[attr-defined]
    seen += [getattr(module, name) for name in (*hooks, "backward", "optimizer_step") if is_overridden(name, module)]
    if any(getattr(hook, "__func__", hook) is not StepModule.on_before_backward for hook in seen):
        return False
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None or torch.is_anomaly_enabled():
        return False
    keeps = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(part, name, None) for part in (*module.modules(), *module.parameters()) for name in keeps):
        return False
    return not any(type(part).__module__.startswith("transformer_engine") for part in module.modules())
