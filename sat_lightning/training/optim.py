"""AdamW as transformers are trained with it: what decays and what does not, and how the learning rate moves."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sat_lightning.errors import ConfigError, nearest

OptimizerFactory = Callable[[Iterable], Optimizer]
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = ("cosine", "linear", "constant")
_FUSED_DEVICES = ("cpu", "cuda")
_OF_ADAMW = ("learning_rate", "weight_decay", "betas", "epsilon")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The default optimizer, AdamW, and the schedule of any optimizer.

    Raises:
        ConfigError: a value is out of range, or both kinds of warm-up are given.
    """

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW; norms, biases and all other one-dimensional parameters have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    schedule: Schedule = "cosine"
    """How the learning rate falls from its peak to `minimum_ratio` of it at the last step."""
    minimum_ratio: float = 0.1
    """Learning rate of the last step, as a fraction of the peak; without effect under `constant`."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly to its peak."""
    warmup_ratio: float = 0.0
    """The same as a fraction of the run; give one of the two."""

    def __post_init__(self) -> None:
        """Refuse values out of range, naming them and the cure."""
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"optim: unknown schedule {self.schedule!r}, known are {', '.join(SCHEDULES)}."
                f"{nearest(str(self.schedule), SCHEDULES)}"
            )
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, it must be above 0.")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, it cannot be negative.")
        for name in ("minimum_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, a fraction from 0 to 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim: betas are {self.betas}, two numbers from 0 up to (not including) 1.")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"optim: warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio} are both set. Set one."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OptimConfig":
        """Read what `dataclasses.asdict` wrote; a checkpoint may have turned tuples into lists."""
        fields_of_run: dict[str, Any] = {**values, "betas": tuple(values["betas"])}
        return cls(**fields_of_run)

    @property
    def unused_with_own_optimizer(self) -> list[str]:
        """Fields of AdamW that were changed, which an optimizer of the user's own does not read."""
        return [f.name for f in fields(self) if f.name in _OF_ADAMW and getattr(self, f.name) != f.default]


def schedule_factor(
    step: int, num_steps: float, warmup_steps: int, schedule: Schedule = "cosine", minimum_ratio: float = 0.1
) -> float:
    """Return the learning rate of one optimizer step, as a fraction of its peak.

    The rise is `(step + 1) / warmup_steps`, so that the first step already moves; the fall starts at the peak right
    after the rise and ends at `minimum_ratio` in the last step. Cosine is that of Loshchilov and Hutter 2017 (SGDR),
    without restarts.

    Args:
        step: counted from 0.
        num_steps: optimizer steps of the run; not read under `constant`.
        warmup_steps: steps of the rise.
        schedule: shape of the fall.
        minimum_ratio: where the fall ends.

    Returns:
        A number from 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    height = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum_ratio + (1 - minimum_ratio) * height


def make_schedule(optimizer: Optimizer, config: OptimConfig, num_steps: float) -> LambdaLR:
    """Build the schedule of a run; it steps once per optimizer step.

    Args:
        optimizer: its learning rates are the peaks.
        config: shape and warm-up.
        num_steps: optimizer steps of the run, `math.inf` if it has no end.

    Returns:
        The schedule.

    Raises:
        ConfigError: the warm-up is longer than the run, or a falling schedule has no end to fall to.
    """
    if math.isinf(num_steps) and (config.schedule != "constant" or config.warmup_ratio):
        raise ConfigError(
            f"optim: a {config.schedule} schedule needs the length of the run, and this one has none. Set "
            "trainer.max_steps or trainer.max_epochs, or use schedule 'constant' with warmup_steps."
        )
    warmup_steps = round(config.warmup_ratio * num_steps) if config.warmup_ratio else config.warmup_steps
    if config.warmup_steps > num_steps:
        raise ConfigError(
            f"optim: warmup_steps is {config.warmup_steps}, longer than the run of {int(num_steps)} steps. Lower it, "
            "raise trainer.max_steps, or give warmup_ratio, a fraction of the run."
        )
    factor = partial(
        schedule_factor,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        schedule=config.schedule,
        minimum_ratio=config.minimum_ratio,
    )
    return LambdaLR(optimizer, factor)


def split_parameters(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Part the trainable parameters into those that weight decay shrinks and those that it leaves.

    Everything in a norm, every bias and all else that is one-dimensional (scales, gates) does not decay. A parameter
    that several modules share is listed once.

    Args:
        module: its parameters with `requires_grad`.

    Returns:
        Parameters by name: the decayed, the others.
    """
    undecayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name, _ in child.named_parameters(recurse=False)
        if name.endswith("bias") or "norm" in type(child).__name__.lower()
    }
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a parameter is an empty shell here, its true shape stands beside it.
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (no_decay if name in undecayed or num_dimensions <= 1 else decay)[name] = parameter
    return decay, no_decay


def group_parameters(module: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: `decay`, and `no_decay` whose `weight_decay` is 0.

    Args:
        module: see `split_parameters`.

    Returns:
        The groups that are not empty.

    Raises:
        ConfigError: nothing is trainable.
    """
    decay, no_decay = split_parameters(module)
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": list(decay.values())},
        {"name": "no_decay", "params": list(no_decay.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("No parameter is trainable, so there is nothing to optimize. Loosen trainable or frozen.")
    return groups


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization").

    Args:
        groups: parameter groups.
        config: learning rate, decay, betas and epsilon.
        fused: use the kernel that does the whole update in one pass, where every parameter's device has it.

    Returns:
        The optimizer.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    can_fuse = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True if fused and can_fuse else None,
    )
