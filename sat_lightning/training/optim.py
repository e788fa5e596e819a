"""AdamW as transformers are trained with it, in one piece, in 8 bits or with its moments in the memory of the CPU."""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from sat_lightning.errors import ConfigError, nearest
from sat_lightning.training.groups import ParameterRule, group_parameters, scale_learning_rates, split_parameters
from sat_lightning.training.schedules import (
    COOLDOWN_SHAPES,
    ENDLESS_SCHEDULES,
    SCHEDULES,
    CooldownShape,
    Schedule,
    StepSchedule,
    schedule_factor,
)

__all__ = [
    "SCHEDULES",
    "OptimConfig",
    "OptimizerFactory",
    "ParameterRule",
    "Schedule",
    "check_kind",
    "group_parameters",
    "make_adamw",
    "make_schedule",
    "schedule_factor",
    "scale_learning_rates",
    "split_parameters",
]

OptimizerFactory = Callable[[Iterable], Optimizer]
Kind = Literal["adamw", "adamw_8bit", "adamw_offload"]
KINDS = ("adamw", "adamw_8bit", "adamw_offload")
_FUSED_DEVICES = ("cpu", "cuda")
_OF_ADAMW = ("learning_rate", "weight_decay", "betas", "epsilon", "kind")
_CHOICES = {"schedule": SCHEDULES, "cooldown_shape": COOLDOWN_SHAPES, "kind": KINDS}
_FRACTIONS = ("minimum_ratio", "warmup_ratio", "cooldown_ratio", "auto_warmup_rate")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The default optimizer, AdamW, and the groups and the schedule of any optimizer.

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
    kind: Kind = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits (needs bitsandbytes and a GPU); `adamw_offload` keeps them on the host
    of a single GPU, whose CPU makes the step (needs torchao; under ZeRO use the strategy's own offloading)."""
    schedule: Schedule = "cosine"
    """How the learning rate falls from its peak to `minimum_ratio` of it at the last step, see `schedule_factor`."""
    minimum_ratio: float = 0.1
    """Learning rate of the last step, as a fraction of the peak; without effect under `constant` and `sat_linear`."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly to its peak."""
    warmup_ratio: float = 0.0
    """The same as a fraction of the schedule; give one of the two."""
    decay_steps: int | None = None
    """Optimizer steps after which the schedule has ended. Default: the length of the run."""
    steps_before: int = 0
    """Steps of the schedule that an earlier run, of which only the weights are loaded, has made already."""
    cooldown_ratio: float = 0.1
    """Length of the fall at the end of `wsd`, as a fraction of the schedule."""
    cooldown_shape: CooldownShape = "linear"
    """Shape of the fall at the end of `wsd`."""
    auto_warmup_steps: int = 0
    """Steps after the start, and after each resumption, whose rate is at most `auto_warmup_rate` of the peak."""
    auto_warmup_rate: float = 0.05
    """See `auto_warmup_steps`."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it, see `group_parameters`; 0.75 is common."""
    groups: tuple[ParameterRule, ...] = ()
    """Rules that give parameters another learning rate or weight decay, or freeze them; the first to fit counts."""

    def __post_init__(self) -> None:
        """Refuse values out of range, naming them and the cure."""
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f"optim: unknown {name} {value!r}, known are {', '.join(known)}.{nearest(str(value), known)}"
                )
        for name in ("learning_rate", "epsilon", "layer_decay"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, it must be above 0.")
        for name in ("weight_decay", "warmup_steps", "steps_before", "auto_warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, it cannot be negative.")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim: {name} is {getattr(self, name)}, a fraction from 0 to 1.")
        if self.layer_decay > 1:
            raise ConfigError(f"optim: layer_decay is {self.layer_decay}, a factor from 0 to 1.")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError(f"optim: decay_steps is {self.decay_steps}, it must be at least 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim: betas are {self.betas}, two numbers from 0 up to (not including) 1.")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"optim: warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio} are both set. Set one."
            )
        self._check_exponential()

    def _check_exponential(self) -> None:
        shape = self.cooldown_shape if self.schedule == "wsd" else self.schedule
        if shape == "exponential" and self.minimum_ratio == 0:
            raise ConfigError("optim: minimum_ratio is 0, which an exponential fall never reaches. Set it above 0.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OptimConfig":
        """Read what `dataclasses.asdict` wrote, or some of it; a checkpoint may have turned tuples into lists."""
        rules = tuple(r if isinstance(r, ParameterRule) else ParameterRule(**r) for r in values.get("groups", ()))
        fields_of_run: dict[str, Any] = {**values, "betas": tuple(values.get("betas", cls.betas)), "groups": rules}
        return cls(**fields_of_run)

    @property
    def unused_with_own_optimizer(self) -> list[str]:
        """Fields of AdamW that were changed, which an optimizer of the user's own does not read."""
        return [f.name for f in fields(self) if f.name in _OF_ADAMW and getattr(self, f.name) != f.default]


def make_schedule(optimizer: Optimizer, config: OptimConfig, num_steps: float) -> StepSchedule:
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
    length = config.decay_steps or num_steps + config.steps_before
    if math.isinf(length) and (config.schedule not in ENDLESS_SCHEDULES or config.warmup_ratio):
        raise ConfigError(
            f"optim: a {config.schedule} schedule needs the length of the run, and this one has none. Set "
            "trainer.max_steps or trainer.max_epochs, or use schedule 'constant' with warmup_steps."
        )
    warmup_steps = config.warmup_steps or config.warmup_ratio and config.warmup_ratio * length
    if config.warmup_steps > length:
        raise ConfigError(
            f"optim: warmup_steps is {config.warmup_steps}, longer than the run of {int(length)} steps. Lower it, "
            "raise trainer.max_steps, or give warmup_ratio, a fraction of the run."
        )
    factor = partial(
        _factor_after,
        steps_before=config.steps_before,
        num_steps=length,
        # SwissArmyTransformer's rise may end between two steps.
        warmup_steps=warmup_steps if config.schedule.startswith("sat_") else round(warmup_steps),
        schedule=config.schedule,
        minimum_ratio=config.minimum_ratio,
        cooldown_ratio=config.cooldown_ratio,
        cooldown_shape=config.cooldown_shape,
    )
    return StepSchedule(optimizer, factor, config.auto_warmup_steps, config.auto_warmup_rate)


def _factor_after(step: int, *, steps_before: int, **curve: Any) -> float:  # noqa: ANN401
    return schedule_factor(step + steps_before, **curve)


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization").

    Its variants: moments in 8 bits are those of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization").

    Args:
        groups: parameter groups.
        config: learning rate, decay, betas, epsilon and kind.
        fused: use the kernel that does the whole update in one pass, where every parameter's device has it.

    Returns:
        The optimizer.

    Raises:
        ConfigError: the library of a kind is not installed, or the parameters are not on a GPU as it needs them.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.kind == "adamw":
        can_fuse = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
        return torch.optim.AdamW(groups, **settings, fused=True if fused and can_fuse else None)
    optimizers: Any = _import_optimizers(config.kind)
    if any(p.device.type != "cuda" for p in parameters):
        raise ConfigError(f"optim: kind {config.kind} needs all parameters on a GPU. Use kind adamw on other devices.")
    if config.kind == "adamw_8bit":
        return optimizers.AdamW8bit(groups, **settings)
    # It makes an optimizer of its own for each parameter, which multiplies groups: names would no longer be unique.
    unnamed = [{key: value for key, value in group.items() if key != "name"} for group in groups]
    return optimizers.CPUOffloadOptimizer(unnamed, torch.optim.AdamW, fused=True, **settings)


def check_kind(kind: Kind, trainer: Any) -> None:  # noqa: ANN401
    """Refuse an offloaded optimizer where a strategy would split or copy what it offloads.

    Args:
        kind: of AdamW.
        trainer: of the run.

    Raises:
        ConfigError: the run has more than one device, or a strategy of its own.
    """
    name = type(trainer.strategy).__name__
    if kind == "adamw_offload" and name != "SingleDeviceStrategy":
        raise ConfigError(
            f"optim: kind adamw_offload is for one device, and the strategy is {name}. Set trainer.devices to 1, or "
            "use kind adamw with trainer.strategy zero_2_offload."
        )


def _import_optimizers(kind: str) -> Any:  # noqa: ANN401 - a module that may not be installed
    package = {"adamw_8bit": "bitsandbytes", "adamw_offload": "torchao"}[kind]
    try:
        return importlib.import_module(f"{package}.optim")
    except ImportError as error:
        raise ConfigError(
            f"optim: kind {kind} needs {package}, which cannot be imported ({error}). Run: pip install {package}, or "
            "use kind adamw."
        ) from error
