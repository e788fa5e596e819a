"""Is everything finite, on every rank? Asked with one small all-reduce, and read once."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


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
        flag: of this rank, one number, changed in place.

    Returns:
        Whether it is not 0 on any rank.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


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
