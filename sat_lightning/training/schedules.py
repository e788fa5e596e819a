"""How the learning rate moves: pure functions of the optimizer step, the same in a resumed run as in a whole one."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Schedule = Literal[
    "cosine", "linear", "exponential", "constant", "wsd", "inverse_sqrt", "sat_linear", "sat_cosine"
]  # fmt: skip
CooldownShape = Literal["linear", "cosine", "exponential", "sqrt"]

SCHEDULES = ("cosine", "linear", "exponential", "constant", "wsd", "inverse_sqrt", "sat_linear", "sat_cosine")
COOLDOWN_SHAPES = ("linear", "cosine", "exponential", "sqrt")
ENDLESS_SCHEDULES = ("constant", "inverse_sqrt")
"""Schedules that need no length of the run."""

_FALLS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, floor: floor + (1 - floor) * (1 - progress),
    "cosine": lambda progress, floor: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)),
    "exponential": lambda progress, floor: floor**progress,
    "sqrt": lambda progress, floor: floor + (1 - floor) * (1 - math.sqrt(progress)),
}


def schedule_factor(
    step: int,
    num_steps: float,
    warmup_steps: float,
    schedule: Schedule = "cosine",
    minimum_ratio: float = 0.1,
    cooldown_ratio: float = 0.1,
    cooldown_shape: CooldownShape = "linear",
) -> float:
    """Return the learning rate of one optimizer step, as a fraction of its peak.

    The rise is `(step + 1) / warmup_steps`, so that the first step already moves. Then:

    - `cosine`, `linear`, `exponential` fall from the peak, right after the rise, to `minimum_ratio` in the last step.
      Cosine is that of Loshchilov and Hutter 2017 (SGDR), without restarts.
    - `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM) keeps the peak until the last `cooldown_ratio` of the
      run, and falls there. The shape `sqrt`, `1 - sqrt(progress)`, is that of Haegele et al. 2024.
    - `inverse_sqrt` (Vaswani et al. 2017) is `sqrt(warmup_steps / (step + 1))`, and never below `minimum_ratio`.
    - `constant` keeps the peak.
    - `sat_linear` and `sat_cosine` are those of SwissArmyTransformer, to continue its runs: the fall is as long as the
      whole run but starts after the rise, so that it does not quite end. `sat_linear` heads for 0, whatever
      `minimum_ratio` is, and stays there (SwissArmyTransformer's goes on below 0).

    Args:
        step: counted from 0.
        num_steps: optimizer steps of the run; not read under `constant` and `inverse_sqrt`.
        warmup_steps: steps of the rise.
        schedule: shape of the fall.
        minimum_ratio: where the fall ends, and what every step beyond it has; above 0 under `exponential`.
        cooldown_ratio: length of the fall of `wsd`, as a fraction of `num_steps`.
        cooldown_shape: shape of the fall of `wsd`.

    Returns:
        A number from 0 to 1.
    """
    if step + 1 <= warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        return max(minimum_ratio, math.sqrt(max(1.0, warmup_steps) / (step + 1)))
    if schedule.startswith("sat_"):
        progress = min(1.0, (step + 1 - warmup_steps) / num_steps)
        return 1 - progress if schedule == "sat_linear" else _FALLS["cosine"](progress, minimum_ratio)
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, num_steps - 1 - round(cooldown_ratio * num_steps))
    shape = cooldown_shape if schedule == "wsd" else schedule
    progress = min(1.0, max(0.0, (step - start) / max(1, num_steps - 1 - start)))
    return _FALLS[shape](progress, minimum_ratio)


class StepSchedule(LRScheduler):
    """A schedule that is a function of the step alone, but for a careful restart.

    Args:
        optimizer: its learning rates are the peaks.
        factor: the fraction of the peak at a step, counted from 0.
        auto_warmup_steps: in so many steps after the start, and after every loading of a checkpoint, no rate is above
            `auto_warmup_rate` of its peak: SwissArmyTransformer's automatic warm-up, while optimizer moments settle.
        auto_warmup_rate: see there.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Callable[[int], float],
        auto_warmup_steps: int = 0,
        auto_warmup_rate: float = 0.05,
    ) -> None:
        self.factor = factor
        self.auto_warmup_steps = auto_warmup_steps
        self.auto_warmup_rate = auto_warmup_rate
        self.started_at = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of the current step for each parameter group."""
        factor = self.factor(self.last_epoch)
        if self.last_epoch < self.started_at + self.auto_warmup_steps:
            factor = min(factor, self.auto_warmup_rate)
        return [peak * factor for peak in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands; what it looks like is the configuration's."""
        return {name: getattr(self, name) for name in ("last_epoch", "base_lrs", "_last_lr", "_step_count")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, and give the optimizer the rate of its step.

        Like the curve, the peaks are those of this run's configuration; if the state had others, a warning says so.

        Args:
            state_dict: of `state_dict`; what else a scheduler of torch wrote there is left.
        """
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        peaks, saved = _plain(self.base_lrs), _plain(state_dict["base_lrs"])
        if peaks != saved:
            rank_zero_warn(f"optim: the checkpoint's peak learning rates were {saved}; this run goes on with {peaks}.")
        self.started_at = self.last_epoch
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _plain(rates: Iterable[float | Tensor]) -> list[float]:
    return list(dict.fromkeys(float(rate) for rate in rates))
