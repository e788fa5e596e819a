"""Where a checkpoint was taken inside Lightning's loops, and how the loops go on from exactly there.

Lightning tells from its counters where a checkpoint was taken, and loses some of what was still to come: a validation
that was due after the saved step, the end of an epoch whose last step was saved, the log line of the saved step. Here
the spot is written down when the checkpoint is taken. When it is read, the counters are put to one of two positions
that the loops continue from without a loss: after a batch, or between two epochs.
"""

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.loops.evaluation_loop import RestartStage

from sat_lightning.training.progress import DataProgress, count_accumulated
from sat_lightning.training.stream import StreamDataModule

#: The spots: after a batch, in a validation, at the end of one, at the end of an epoch, elsewhere.
BATCH_END, VALIDATING, VALIDATED = "batch_end", "validating", "validated"
EPOCH_END, ELSEWHERE = "epoch_end", "elsewhere"


@dataclass(frozen=True)
class Position:
    """Where a checkpoint was taken."""

    spot: str
    num_logged_steps: int
    """Optimizer steps as the loggers count them, those of the batch before included."""
    rewinds: bool
    """Whether a window of accumulated batches had begun, which the data begins anew."""
    awaits_validation: bool
    """Whether a validation was due or under way that the resumed run has to make."""
    validated_until: int = 0
    """Up to which batch of the run validations have been made, if a window is begun anew: not to be made again."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def find_position(trainer: L.Trainer) -> Position:
    """Tell where the trainer is.

    Args:
        trainer: in a hook, fitting.
    """
    loop = _epoch_loop(trainer)
    spot = _find_spot(trainer)
    accumulates = loop._should_accumulate()
    within_batch = spot in (BATCH_END, VALIDATING, VALIDATED)
    rewinds = within_batch and accumulates and rewinds_windows(trainer) and count_accumulated(trainer) > 0
    awaits = spot == VALIDATING or (spot == BATCH_END and validates_next(trainer))
    num_steps = loop._batches_that_stepped + (1 if within_batch and not accumulates else 0)
    validated = loop.batch_progress.total.ready - (0 if spot == VALIDATED else 1) if rewinds else 0
    return Position(spot, num_steps, rewinds, awaits and not rewinds, validated)


def rewinds_windows(trainer: L.Trainer) -> bool:
    """Tell whether the data of a resumed run starts at a whole window of accumulated batches.

    Args:
        trainer: its data module decides.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return isinstance(datamodule, StreamDataModule) or isinstance(getattr(datamodule, "progress", None), DataProgress)


def validates_next(trainer: L.Trainer) -> bool:
    """Tell whether the batch that ends now is followed by a validation.

    Args:
        trainer: in `on_train_batch_end`.
    """
    return bool(_epoch_loop(trainer)._should_check_val_fx(trainer.fit_loop._data_fetcher))


def skip_known_validation(trainer: L.Trainer, position: Position) -> None:
    """Do not validate again in a window that is made again.

    Args:
        trainer: in `on_train_batch_end`.
        position: where the run was resumed.
    """
    loop = _epoch_loop(trainer)
    if loop.batch_progress.total.ready <= position.validated_until and validates_next(trainer):
        loop._skip_next_val = True


def rewrite_counters(loops: dict[str, Any], position: Position) -> bool:
    """Put saved counters to one of the two positions that the loops continue from.

    Args:
        loops: the `fit_loop` of a checkpoint, changed in place.
        position: where it was taken.

    Returns:
        Whether it is the position between two epochs.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    for kind in ("total", "current"):
        done = batches[kind]
        num = done["processed"] if position.spot in (BATCH_END, VALIDATING, VALIDATED) else done["completed"]
        done.update(ready=num, started=num, processed=num, completed=num)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = position.num_logged_steps
    if position.spot != EPOCH_END:
        return False
    is_whole = bool(batches["is_last_batch"])
    for kind in ("total", "current"):
        done = epochs[kind]
        # Stopped by max_steps in the middle of an epoch: the epoch goes on.
        num = done["ready"] if is_whole else done["ready"] - 1
        done.update(processed=num, completed=num)
    return is_whole


def settle_loops(trainer: L.Trainer, position: Position, is_between_epochs: bool) -> None:
    """Make the restored loops continue without repeating or skipping anything.

    Args:
        trainer: in `on_train_start`, its counters restored and aligned with the data.
        position: where the checkpoint was taken.
        is_between_epochs: what `rewrite_counters` returned.
    """
    fit_loop, loop = trainer.fit_loop, _epoch_loop(trainer)
    val_loop = loop.val_loop
    if is_between_epochs:
        for each in (fit_loop, loop, val_loop):
            each._restarting = False
        fit_loop.reset_restart_stage()
        loaders = fit_loop._combined_loader.flattened if fit_loop._combined_loader is not None else []
        if not any(hasattr(loader, "load_state_dict") for loader in loaders):
            # The iterator was made before the random states were restored: let it be made anew.
            fit_loop._resuming_from_checkpoint = False
        return
    if not loop.restarting:
        return
    if validates_next(trainer):
        # The loop begins with the end of the batch that came before, and counts its step there.
        loop._batches_that_stepped -= 0 if loop._should_accumulate() else 1
        if position.awaits_validation:
            val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            val_loop._restarting = False
    elif loop._num_ready_batches_reached():
        # Nothing is left of the epoch but its end.
        val_loop._has_run = True


def _epoch_loop(trainer: L.Trainer) -> Any:  # noqa: ANN401 - Lightning declares less than there is
    return trainer.fit_loop.epoch_loop


def _epochs(trainer: L.Trainer) -> Any:  # noqa: ANN401 - as above
    return trainer.fit_loop.epoch_progress.current


def _find_spot(trainer: L.Trainer) -> str:
    loop, epochs = _epoch_loop(trainer), _epochs(trainer)
    batches = loop.batch_progress.current
    if trainer.validating:
        validated = loop.val_loop.batch_progress
        is_over = validated.is_last_batch and validated.current.completed == validated.current.ready
        return VALIDATED if is_over and not loop.val_loop._logged_outputs else VALIDATING
    if epochs.ready and epochs.processed == epochs.ready:
        return EPOCH_END
    return BATCH_END if batches.processed > batches.completed else ELSEWHERE
