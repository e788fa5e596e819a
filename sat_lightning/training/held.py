"""What a training step logs, held back until its batch is known to be good."""

from typing import Any

import lightning as L

from sat_lightning.training.steps import StepModule


class HeldLogs:
    """Stands in the place of a module's `log`.

    Args:
        module: of the run.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._module: Any = module
        self._log = module.log
        self._calls: list[tuple[str | None, tuple[Any, ...], dict[str, Any]]] | None = None

    def log(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Log, or keep for later."""
        if self._calls is None:
            self._log(*args, **kwargs)
        else:
            self._calls.append((self._module._current_fx_name, args, kwargs))

    def hold(self) -> None:
        """Keep what is logged from now on."""
        self._calls = []

    def drop(self) -> None:
        """Forget what was kept, and keep no more."""
        self._calls = None

    def release(self) -> None:
        """Log what was kept, as if its time were now, and keep no more."""
        calls, self._calls = self._calls or [], None
        now = self._module._current_fx_name
        for name, args, kwargs in calls:
            self._module._current_fx_name = name
            self._log(*args, **kwargs)
        self._module._current_fx_name = now


def set_counting(module: L.LightningModule, is_on: bool) -> None:
    """Let a module of ours add a batch to its means before the backward pass, as ever, or leave that to the caller.

    Args:
        module: others are left alone.
        is_on: as ever.
    """
    if isinstance(module, StepModule):
        module.counts_before_backward = is_on


def count_batch(module: L.LightningModule) -> None:
    """Add a batch, which is known to be good now, to the means of a module of ours.

    Args:
        module: others are left alone.
    """
    if isinstance(module, StepModule):
        now, module._current_fx_name = module._current_fx_name, "on_before_backward"
        module.count_batch()
        module._current_fx_name = now


def forget_batch(module: L.LightningModule) -> None:
    """Let no batch be added to the means of a module of ours.

    Args:
        module: others are left alone.
    """
    if isinstance(module, StepModule):
        module.step_values = {}
