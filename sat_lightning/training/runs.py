"""What a trainer is at, where its files go, and how they are written: whole or not at all."""

import os
from pathlib import Path

import lightning as L


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether the run is a `fast_dev_run`: a few batches to try things out, of which nothing is kept.

    Args:
        trainer: the trainer.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


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
