"""What a resumed run does not take over from its checkpoint."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from sat_lightning.errors import ConfigError, nearest
from sat_lightning.training.deepspeed import SATDeepSpeedStrategy

PARTS = ("optimizer", "scheduler", "data", "step")


def check_reset(words: Iterable[str]) -> tuple[str, ...]:
    """Refuse unknown words.

    Args:
        words: parts to reset; one text may name several, parted by commas.

    Returns:
        The parts, each once.

    Raises:
        ConfigError: there is no such part.
    """
    listed = [words] if isinstance(words, str) else list(words)
    parts = [part.strip() for word in listed for part in word.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise ConfigError(f"reset: there is no '{part}', only {', '.join(PARTS)}.{nearest(part, PARTS)}")
    return tuple(dict.fromkeys(parts))


def reset_parts(parts: Iterable[str], checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Take parts out of a checkpoint before the trainer restores them.

    Args:
        parts: of `PARTS`. `optimizer`: moments and settings begin anew. `scheduler`: the schedule begins anew, warm-up
            and all. `data`: the data begins anew, with its first epoch. `step`: steps and epochs are counted from 0.
        checkpoint: changed in place.
        trainer: that restores it.

    Raises:
        ConfigError: the optimizer cannot be reset under this strategy.
    """
    if "optimizer" in parts:
        strategy = trainer.strategy  # ours has looked at the parts before it restored anything
        if not strategy.lightning_restore_optimizer and not isinstance(strategy, SATDeepSpeedStrategy):
            raise ConfigError(
                f"reset: {type(strategy).__name__} restores the optimizer by itself. Use init_from, which "
                "takes the weights alone."
            )
        checkpoint["optimizer_states"] = []
    if "scheduler" in parts:
        checkpoint["lr_schedulers"] = []
    datamodule = getattr(trainer, "datamodule", None)
    if "data" in parts and datamodule is not None:
        # The data module has read its place already: Lightning restores it before callbacks.
        progress: Any = getattr(datamodule, "progress", None)
        if hasattr(progress, "restart"):
            progress.restart()
        else:
            rank_zero_warn(f"reset: {type(datamodule).__name__} has restored its own state; reset it there.")
    if "step" in parts:
        checkpoint["loops"] = None
    elif "data" in parts and checkpoint.get("loops") is not None:
        loops = checkpoint["loops"]["fit_loop"]
        loops["state_dict"].pop("combined_loader", None)
        for done in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
            done.update(dict.fromkeys(done, done["processed"]))
        loops["epoch_loop.batch_progress"]["current"] = dict.fromkeys(loops["epoch_loop.batch_progress"]["current"], 0)
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False


def restart_schedules(parts: Iterable[str], trainer: L.Trainer) -> None:
    """Give an optimizer that was restored the learning rates of a schedule that was not.

    Args:
        parts: of `PARTS`.
        trainer: in `on_train_start`.
    """
    if "scheduler" not in parts:
        return
    for config in trainer.lr_scheduler_configs:
        schedule: Any = config.scheduler
        if hasattr(schedule, "base_lrs"):
            rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.get_last_lr(), strict=True)
            for group, base, rate in rates:
                group.update(initial_lr=base, lr=rate)
