"""What a run says of itself, before DeepSpeed is told anything."""

import os
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the Trainer and the module say, which no JSON may contradict."""

    precision: str
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    """None if the Trainer says nothing."""
    micro_batch_size: int | None
    """Samples per rank and batch; None if nobody knows."""
    world_size: int
    has_streams: bool
    num_trainable: int
    module_name: str
    configures_optimizer: bool


def gather_facts(strategy: Any) -> RunFacts:  # noqa: ANN401
    """Read trainer and module.

    Args:
        strategy: the `SATDeepSpeedStrategy` of the run.
    """
    module = strategy.lightning_module
    trainer = module.trainer
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return RunFacts(
        precision=str(strategy.precision_plugin.precision),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        micro_batch_size=_batch_size(trainer),
        world_size=strategy.world_size,
        has_streams=strategy.root_device.type == "cuda",
        num_trainable=sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained),
        module_name=type(module).__name__,
        configures_optimizer=is_overridden("configure_optimizers", module),
    )


def _batch_size(trainer: Any) -> int | None:
    """Find out how many samples a rank takes at a time, without making a loader; None if nobody says."""
    loaded, source = trainer.fit_loop._combined_loader, trainer.fit_loop._data_source
    loaders = loaded.flattened if loaded is not None else [] if source.is_module() else [source.instance]
    for said in (*loaders, trainer.datamodule):
        for holder in (said, getattr(said, "batch_sampler", None)):
            size = getattr(holder, "batch_size", None)
            if isinstance(size, int) and not isinstance(size, bool):
                return size
    return None


def restore_environment(variables: dict[str, str | None]) -> None:
    """Put variables of the environment back.

    Args:
        variables: their values by name; None for one that was not there.
    """
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
