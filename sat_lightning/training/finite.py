"""Is everything finite, on every rank? What ranks ask each other in each batch: one small all-reduce, read once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
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
        if isinstance(number, Tensor) and not _lies_on_host(number):
            flags.append(torch.isfinite(number).reshape(()).to(device))
        elif not math.isfinite(number):
            return torch.ones(1, dtype=torch.int32, device=device)
    if not flags:
        return torch.zeros(1, dtype=torch.int32, device=device)
    return torch.stack(flags).all().logical_not().to(torch.int32).reshape(1)


def read_highest(numbers: Sequence[Tensor]) -> list[int]:
    """Agree on numbers over all ranks, with one all-reduce and one read; this is where the host waits.

    Args:
        numbers: of this rank, on one device, int32 of shape `[1]`; they may be changed in place.

    Returns:
        The highest that any rank has, for each.
    """
    whole = numbers[0] if len(numbers) == 1 else torch.cat(list(numbers))
    if has_ranks():
        torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX)
    return list(whole.tolist())


def has_ranks() -> bool:
    """Tell whether there are other processes to agree with."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_ranks(numbers: Tensor, strategy: Strategy) -> Tensor:
    """Add up over all ranks, without the barrier of Lightning's `reduce`.

    Args:
        numbers: of this rank; they may be changed in place.
        strategy: of the trainer; every rank has to call this.
    """
    if not has_ranks():
        return strategy.reduce(numbers, reduce_op="sum")
    torch.distributed.all_reduce(numbers)
    return numbers


class DelayedHighest:
    """The highest number that any rank has, asked for now and read when asked for the next time.

    So nobody waits: the all-reduce, and a GPU's work before it, have all the time between.

    Args:
        device: of the process group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wait: Callable[[], object] | None = None
        self._highest = torch.zeros(1, dtype=torch.int32)

    def exchange(self, number: int) -> int:
        """Tell the ranks a number, unless one other than 0 was told; all of them have to call this equally often.

        Args:
            number: of this rank.

        Returns:
            The highest of those told the last time; 0 the first time.
        """
        if before := self.read():
            return before
        # A full tensor is a kernel; one made from a list would be a copy, for which the host waits.
        told = torch.full((1,), number, dtype=torch.int32, device=self._device)
        work: Any = torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX, async_op=True)
        if self._device.type == "cuda":
            work.wait()  # the stream waits, and not the host
            self._highest = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(told, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._wait = event.synchronize
        else:
            self._highest, self._wait = told, work.wait
        return 0

    def read(self) -> int:
        """Return the highest number of those told the last time; 0 if none are left to be read."""
        if self._wait is None:
            return 0
        self._wait()
        self._wait = None
        return int(self._highest)


def _lies_on_host(number: Tensor) -> bool:
    """Whether reading it waits for no device."""
    return number.device.type == "cpu"


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
