"""Is everything finite, on every rank? Asked with one small all-reduce, and read once."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def name_scalars(output: Any) -> dict[str, Tensor | float]:  # noqa: ANN401 - whatever a training step returns
    """Find the numbers in what a training step returned; tensors of more than one element (logits, ...) are no metrics.

    Args:
        output: a loss, or a mapping with `loss` in it.

    Returns:
        Scalar tensors and floats by name.
    """
    items = output.items() if isinstance(output, Mapping) else [("loss", output)]
    return {
        str(name): value
        for name, value in items
        if isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point())
    }


def has_nonfinite(values: Iterable[Tensor | float], device: torch.device) -> Tensor:
    """Tell whether any number is not finite, without waiting for a device.

    Args:
        values: scalars.
        device: where the answer lies.

    Returns:
        An int32 of shape `[1]`: 0 or 1.
    """
    flags = []
    for value in values:
        number = value.detach() if isinstance(value, Tensor) else value
        if isinstance(number, Tensor) and number.device.type != "cpu":
            flags.append(torch.isfinite(number).reshape(()).to(device))
        elif not math.isfinite(number):
            return torch.ones(1, dtype=torch.int32, device=device)
    if not flags:
        return torch.zeros(1, dtype=torch.int32, device=device)
    return torch.stack(flags).all().logical_not().to(torch.int32).reshape(1)


def is_any_rank(flag: Tensor) -> bool:
    """Agree over all ranks; this is where the host waits.

    Args:
        flag: int32 `[1]` of this rank, changed in place.

    Returns:
        Whether it is 1 on any rank.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def gradient_flag(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Tell whether any gradient is not finite.

    Args:
        parameters: those without a gradient are left out.
        device: where the answer lies.

    Returns:
        An int32 of shape `[1]`: 0 or 1.
    """
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(1, dtype=torch.int32, device=device)
    # The largest magnitude, and no sum of squares: that overflows where every gradient is finite.
    largest = get_total_norm(gradients, math.inf)
    return torch.isfinite(largest).logical_not().to(device, torch.int32).reshape(1)


def nonfinite_gradients(module: nn.Module) -> list[str]:
    """Name the parameters whose gradient is not finite, the ones nearest to the loss first.

    Args:
        module: their owner.
    """
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    return [name for name, gradient in reversed(named) if not torch.isfinite(_local(gradient)).all()]


def gather_objects(value: Any) -> list[Any]:  # noqa: ANN401
    """Collect a small object from every rank; all of them have to call this.

    Args:
        value: of this rank.

    Returns:
        Those of all ranks, in their order.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _local(gradient: Tensor) -> Tensor:
    """The part of a gradient that lies here, and of a sparse one its values."""
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient.coalesce().values() if gradient.is_sparse else gradient
