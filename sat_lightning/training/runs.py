"""What a trainer is at, where its files go, and how they are written: whole or not at all."""

import math
import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether the run is a `fast_dev_run`: a few batches to try things out, of which nothing is kept.

    Args:
        trainer: the trainer.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


def is_logging_step(trainer: L.Trainer) -> bool:
    """Tell, in or right after a training step, whether the optimizer steps after this batch and loggers want that step.

    Args:
        trainer: the rule is its own, so that what is logged now is what it passes on.
    """
    loop = trainer.fit_loop
    if loop._should_accumulate() and trainer.lightning_module.automatic_optimization:
        return False
    interval: int = 1 if is_trial(trainer) else trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and (logged_step(trainer) + 1) % interval == 0


def logged_step(trainer: L.Trainer) -> int:
    """Return the number that loggers give the step that is being trained.

    Args:
        trainer: it counts windows of accumulated batches, whether or not the optimizer's step was skipped.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def steps_per_epoch(trainer: L.Trainer, epoch: int = 0) -> int | None:
    """Return the optimizer steps of an epoch; None while the length of the data is unknown.

    Args:
        trainer: its training data is loaded, if need be.
        epoch: matters where a `GradientAccumulationScheduler` changes the accumulation.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    if math.isinf(trainer.num_training_batches):
        return None
    accumulated = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = callback.get_accumulate_grad_batches(epoch)
    return math.ceil(trainer.num_training_batches / accumulated)


def total_steps(trainer: L.Trainer) -> int | None:
    """Return the optimizer steps of the run, as far as its limits and its data tell; None if they do not.

    Args:
        trainer: `max_steps` and `max_epochs` count; `max_time` is a limit of another kind.
    """
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    num_epochs = trainer.max_epochs
    if num_epochs is not None and num_epochs != -1 and (steps := steps_per_epoch(trainer)) is not None:
        is_changing = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
        epochs = range(num_epochs) if is_changing else ()
        limits.append(sum(steps_per_epoch(trainer, epoch) or 0 for epoch in epochs) if epochs else steps * num_epochs)
    return min(limits, default=None)


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder of the run, where the logger writes; every rank has to call this.

    Args:
        trainer: without a logger its `default_root_dir` counts.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that no reader ever sees half of it.

    Args:
        path: its folder is made if need be.
        content: all of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
