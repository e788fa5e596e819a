"""What DeepSpeed is told: made from typed options and the Trainer's flags, held against a JSON if one is given."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_lightning.errors import ConfigError
from sat_lightning.training.zero_facts import RunFacts

DeepSpeedConfig = str | os.PathLike[str] | dict[str, Any]

STAGES = (0, 1, 2, 3)
_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """Settings of ZeRO that change speed and memory, never what is learned (the loss scale is for fp16 alone).

    Raises:
        ConfigError: a value is out of range.
    """

    reduce_bucket_size: int = 200_000_000
    """Elements of gradients that are reduced at once; never more than there are, whatever is said here."""
    allgather_bucket_size: int = 200_000_000
    """Elements of weights that stages 1 and 2 gather at once."""
    prefetch_bucket_size: int = 50_000_000
    """Elements of weights that stage 3 gathers ahead of the layer that needs them."""
    persistence_threshold: int = 100_000
    """Elements of the largest parameter that stage 3 leaves whole on every rank: splitting it would save nothing."""
    max_live_parameters: int = 1_000_000_000
    """Elements of weights that stage 3 keeps whole at a time."""
    overlap_comm: bool | None = None
    """Reduce gradients while others are computed. Default: where the device has streams."""
    pin_memory: bool = True
    """Page-lock what is offloaded to the host."""
    loss_scale: float = 0.0
    """Factor of the loss in fp16; 0 adapts it."""
    initial_scale_power: int = 16
    """The adapted loss scale begins at 2 to the power of this."""
    loss_scale_window: int = 1000
    """Steps without an overflow before the adapted loss scale doubles."""
    hysteresis: int = 2
    """Overflows before the adapted loss scale halves."""
    minimum_loss_scale: int = 1
    """Lower bound of the adapted loss scale."""

    def __post_init__(self) -> None:
        """Refuse values out of range, naming them and the cure."""
        for name in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "loss_scale_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"zero: {name} is {getattr(self, name)}, it must be at least 1.")
        for name in ("persistence_threshold", "max_live_parameters", "loss_scale", "initial_scale_power"):
            if getattr(self, name) < 0:
                raise ConfigError(f"zero: {name} is {getattr(self, name)}, it cannot be negative.")


def read_config(config: DeepSpeedConfig | None) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Args:
        config: a path, what such a file holds, or None.

    Returns:
        Its entries; none for None.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return json.loads(json.dumps(config))  # a copy, which nobody else changes
    path = Path(config)
    if not path.is_file():
        raise ConfigError(f"strategy: there is no DeepSpeed config {path}. Leave `config` out: none is needed.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"strategy: {path} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"strategy: {path} holds a {type(values).__name__}, it must hold an object.")
    return values


def resolve_stage(stage: int | None, given: dict[str, Any]) -> int:
    """Return the ZeRO stage that the argument and the JSON agree on.

    Args:
        stage: the argument; None if it was left out.
        given: the JSON.

    Raises:
        ConfigError: they differ, or there is no such stage.
    """
    said = given.get("zero_optimization", {}).get("stage", _AUTO if "zero_optimization" not in given else 0)
    if stage is not None and said not in (_AUTO, stage):
        raise _contradiction("zero_optimization.stage", said, "stage of the strategy", stage)
    found = stage if stage is not None else 2 if said == _AUTO else said
    if found not in STAGES:
        raise ConfigError(f"strategy: there is no ZeRO stage {found!r}, only 0 (none), 1, 2 and 3.")
    return int(found)


def zero_section(stage: int, options: ZeroOptions, offload: tuple[bool, bool], facts: RunFacts) -> dict[str, Any]:
    """Return the `zero_optimization` of a stage.

    Args:
        stage: 0 to 3.
        options: see there.
        offload: whether optimizer and parameters lie on the host.
        facts: of the run.
    """
    most = max(1, facts.num_trainable)
    overlaps = facts.has_streams if options.overlap_comm is None else options.overlap_comm
    section: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(options.reduce_bucket_size, most),
        "allgather_bucket_size": 2 * math.ceil(min(options.allgather_bucket_size, most) / 2),  # must be even
        "overlap_comm": overlaps,
        "contiguous_gradients": True,
    }
    if stage == 3:
        section["stage3_prefetch_bucket_size"] = options.prefetch_bucket_size
        section["stage3_param_persistence_threshold"] = options.persistence_threshold
        section["stage3_max_live_parameters"] = options.max_live_parameters
    for key, is_on in zip(("offload_optimizer", "offload_param"), offload, strict=True):
        if is_on:
            section[key] = {"device": "cpu", "pin_memory": options.pin_memory and facts.has_streams}
    return section


def precision_sections(precision: str, options: ZeroOptions, stage: int, *, offloads: bool) -> dict[str, Any]:
    """Return what a precision of the Trainer is in DeepSpeed's words; nothing is switched on that it does not say.

    Args:
        precision: `32-true`; `bf16-mixed` and `16-mixed`, weights in half precision beside a sharded fp32 copy that
            the optimizer updates; or `bf16-true`, nothing but bf16.
        options: for the loss scale.
        stage: without ZeRO, DeepSpeed sums up gradients in the precision of the weights, and knows no other way.
        offloads: whether the optimizer lies on the host.

    Raises:
        ConfigError: there is no such training.
    """
    if precision == "16-true" or (precision == "bf16-true" and (stage == 0 or offloads)):
        reason = "loses gradients" if precision == "16-true" else "exists for zero_1, zero_2 and zero_3 without offload"
        raise ConfigError(f"strategy: trainer.precision {precision} {reason}. Use {precision[:-5]}-mixed.")
    sections: dict[str, Any] = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    if precision == "bf16-true":
        sections["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    elif precision == "bf16-mixed":
        sections["bf16"] = {"enabled": True}
    elif precision == "16-mixed":
        sections["fp16"] = {
            "enabled": True,
            "loss_scale": options.loss_scale,
            "initial_scale_power": options.initial_scale_power,
            "loss_scale_window": options.loss_scale_window,
            "hysteresis": options.hysteresis,
            "min_loss_scale": options.minimum_loss_scale,
        }
    if stage > 0 and precision != "bf16-true":
        # bf16 adds up to 8 bits: small gradients of the later batches of a window would be lost.
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
    return sections


def engine_config(given: dict[str, Any], zero: dict[str, Any], options: ZeroOptions, facts: RunFacts) -> dict[str, Any]:
    """Return the whole configuration of DeepSpeed's engine.

    Args:
        given: the user's JSON; `"auto"`, or leaving out, asks for ours.
        zero: see `zero_section`.
        options: see there.
        facts: of the run.

    Raises:
        ConfigError: the JSON contradicts the Trainer or the module.
    """
    _refuse_contradictions(given, zero["stage"], facts)
    ours = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "gradient_accumulation_steps": facts.accumulate_grad_batches,
        "gradient_clipping": facts.gradient_clip_val or 0.0,
        "train_micro_batch_size_per_gpu": facts.micro_batch_size or 1,
        **precision_sections(facts.precision, options, zero["stage"], offloads="offload_optimizer" in zero),
    }
    merged = _merge(given, ours)
    # DeepSpeed computes it, and refuses what it could not.
    merged.pop("train_batch_size", None)
    merged.setdefault("steps_per_print", 2**31 - 1)
    return merged


def _refuse_contradictions(given: dict[str, Any], stage: int, facts: RunFacts) -> None:
    micro_batch_size = facts.micro_batch_size
    checks: list[tuple[str, Any, str, Any]] = [
        (
            "gradient_accumulation_steps",
            given.get("gradient_accumulation_steps", _AUTO),
            "trainer.accumulate_grad_batches",
            facts.accumulate_grad_batches,
        ),
    ]
    if facts.gradient_clip_val is not None:
        checks.append(
            (
                "gradient_clipping",
                given.get("gradient_clipping", _AUTO),
                "trainer.gradient_clip_val",
                facts.gradient_clip_val,
            )
        )
    if micro_batch_size is not None:
        said = given.get("train_micro_batch_size_per_gpu", _AUTO)
        checks.append(("train_micro_batch_size_per_gpu", said, "batch size of the data", micro_batch_size))
        whole = micro_batch_size * facts.accumulate_grad_batches * facts.world_size
        words = f"{micro_batch_size} samples x {facts.accumulate_grad_batches} batches x {facts.world_size} ranks"
        checks.append(("train_batch_size", given.get("train_batch_size", _AUTO), words, whole))
    for name, is_on in (("fp16", facts.precision.startswith("16")), ("bf16", facts.precision.startswith("bf16"))):
        said = given.get(name, {}).get("enabled", _AUTO)
        if said not in (_AUTO, is_on):
            raise _contradiction(f"{name}.enabled", said, "trainer.precision", facts.precision)
    for key, said, words, value in checks:
        if said not in (_AUTO, value):
            raise _contradiction(key, said, words, value)
    for key in ("optimizer", "scheduler"):
        if key in given and facts.configures_optimizer:
            raise _contradiction(
                key, given[key].get("type", given[key]), f"{facts.module_name}.configure_optimizers", "its own"
            )


def _contradiction(key: str, said: object, where: str, value: object) -> ConfigError:
    return ConfigError(
        f"strategy: the DeepSpeed config says {key} = {said!r}, the {where} is {value!r}. Change one of them, or set "
        f'"{key.split(".")[0]}" to "auto" or leave it out of the JSON.'
    )


def _merge(given: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merge(value, ours.get(key, {}))
        elif value != _AUTO:
            merged[key] = value
    return merged
