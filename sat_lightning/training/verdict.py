"""Whether a batch is good on every rank: the question that a guard asks once, and what travels with it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from sat_lightning.training.finite import has_nonfinite, has_ranks, name_scalars, read_highest
from sat_lightning.training.steps import StepModule

Values = dict[str, Tensor | float]


@dataclass
class BadBatch:
    """A batch, or the window that ends with it, that is left out."""

    found: dict[str, str]
    """What was not finite on this rank, for instance `{"loss": "nan"}`; it may be empty."""
    batches_ago: list[int]
    """Which are left out: 0 for the batch itself; for a bad gradient the good ones of its window, oldest first."""
    rerun: Callable[[], AbstractContextManager[Any]]
    """Computes the training step of the batch once more, as it was; every rank has to enter it."""
    is_window: bool = False
    """Whether a gradient was bad, which spoils everything that was accumulated."""


class Messenger(Protocol):
    """Who has a number for the other ranks in each batch, as `SaveOnSignal` does."""

    is_carried: bool

    @property
    def received(self) -> int:
        """The number of this rank."""

    def agree(self, number: int) -> None:
        """Take the highest of all ranks."""


class Verdict:
    """Asks all ranks about a batch, with one all-reduce, and reads the answer from the device once.

    Args:
        trainer: that fits.
        check_metrics: look at what the training step gives beside the loss.
        messenger: whose number travels along, if there is one.
    """

    def __init__(self, trainer: L.Trainer, check_metrics: bool, messenger: Messenger | None) -> None:
        self._module, self._device = trainer.lightning_module, trainer.strategy.root_device
        self._checks_metrics = check_metrics
        self._messenger = messenger if has_ranks() else None

    def carry(self, is_on: bool) -> None:
        """Begin, or end, to carry the messenger's number.

        Args:
            is_on: begin.
        """
        if self._messenger is not None:
            self._messenger.is_carried = is_on

    def values(self, output: Any) -> Values:  # noqa: ANN401
        """Return what has to be finite.

        Args:
            output: of the training step.
        """
        values = name_scalars(output)
        if not self._checks_metrics:
            return {name: value for name, value in values.items() if name == "loss"}
        return {**values, **self._module.step_values} if isinstance(self._module, StepModule) else values

    def ask(self, values: Values, *flags: Tensor) -> list[bool]:
        """Ask all ranks; this is where the host waits.

        Args:
            values: see there.
            flags: more to ask about; int32 of shape `[1]`, not 0 if something is bad.

        Returns:
            Whether any rank has a value that is not finite, and for each flag whether any rank's is not 0.
        """
        numbers = [has_nonfinite(values.values(), self._device), *flags]
        if self._messenger is None:
            return [number > 0 for number in read_highest(numbers)]
        numbers.append(torch.full_like(numbers[0], self._messenger.received))
        *answers, highest = read_highest(numbers)
        self._messenger.agree(highest)
        return [number > 0 for number in answers]


def describe(values: Values) -> dict[str, str]:
    """Name the values that are not finite on this rank, and tell what they are.

    Args:
        values: scalars by name.
    """
    numbers = {name: float(v.detach() if isinstance(v, Tensor) else v) for name, v in values.items()}
    return {name: f"{number:g}" for name, number in numbers.items() if not math.isfinite(number)}
