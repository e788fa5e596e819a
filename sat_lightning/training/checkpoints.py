"""Training checkpoints that are there whole or not at all, and which of them a run continues from."""

import os
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from sat_lightning.errors import CheckpointError, nearest

#: Written last into a checkpoint that is a folder: without it the folder is not whole.
COMPLETE_NAME = "complete"
#: In a folder, what Lightning saves beside weights and optimizer.
FOLDER_STATE_NAME = "state.ckpt"
PARTIAL_SUFFIX = ".partial"
CONFIG_NAME = "config.yaml"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint under a temporary name, force it to the disk, and rename it.

    A process that is killed while it writes leaves a file `.<name>.partial`, which is never read and which the next
    save removes; the earlier checkpoint stays. The last one written is never removed. Reading executes nothing that a
    file says (`weights_only=True`) unless the caller insists.

    Any Lightning pipeline can have it: `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._newest: Path | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what Lightning collected.
            path: a remote URL is left to Lightning.
            storage_options: of Lightning's.

        Raises:
            CheckpointError: the disk is full, or does not take the file for another reason.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            return
        target = Path(path)
        partial = partial_path(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for leftover in target.parent.glob(f".*{PARTIAL_SUFFIX}"):
                _remove(leftover)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            commit(partial, target)
        except (OSError, RuntimeError) as error:
            _remove(partial)
            raise _not_written(target, error) from error
        self._newest = target.absolute()

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: of the file.
            map_location: where tensors go first.
            weights_only: False executes what a pickle says; for files that you made yourself.

        Returns:
            What was saved.

        Raises:
            CheckpointError: the file is not whole, or holds more than tensors and plain values.
        """
        if Path(path).is_dir():  # of a ZeRO run, which has more ranks or splits more than this one
            from sat_lightning.training.zero_checkpoint import read_as_lightning

            return read_as_lightning(path, weights_only)
        try:
            return super().load_checkpoint(os.fspath(path), map_location, weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds objects that a safe read refuses: {_first_line(error)} If the file is yours, read it "
                "with weights_only=False."
            ) from error
        except (RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is no whole checkpoint ({_first_line(error)}).") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, unless it is the last one that was written.

        Args:
            path: of the file or folder.
        """
        if Path(path).absolute() == self._newest:
            rank_zero_warn(f"{path} is the newest checkpoint and stays.")
            return
        super().remove_checkpoint(os.fspath(path))


def partial_path(target: Path) -> Path:
    """Return the name under which a checkpoint is written until it is whole.

    Args:
        target: its name after that.
    """
    return target.with_name(f".{target.name}{PARTIAL_SUFFIX}")


def commit(partial: Path, target: Path) -> None:
    """Force a file or folder to the disk, mark a folder complete, and give it its name.

    Args:
        partial: all of it is written.
        target: what stood there is replaced.
    """
    if partial.is_dir():
        for file in (path for path in partial.rglob("*") if path.is_file()):
            _sync(file)
        (partial / COMPLETE_NAME).write_bytes(b"")
        _sync(partial / COMPLETE_NAME)
    _sync(partial)
    if partial.is_dir() and target.exists():
        # A folder cannot be renamed onto another: the old one steps aside first, and is found there if we die now.
        aside = target.with_name(f"{target.stem}.replaced{target.suffix}")
        _remove(aside)
        os.replace(target, aside)
        os.replace(partial, target)
        _sync(target.parent)
        _remove(aside)
    else:
        os.replace(partial, target)
        _sync(target.parent)


@dataclass(frozen=True)
class CheckpointFacts:
    """What a look at a checkpoint tells without reading its tensors."""

    path: Path
    saved_at: float
    """Seconds since the epoch, of the clock of the machine that saved it."""
    global_step: int


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointFacts:
    """Look into a checkpoint; its tensors stay on the disk.

    Args:
        path: a file, or a folder of a sharding strategy.

    Returns:
        What it says.

    Raises:
        CheckpointError: it is not whole, cannot be read safely, or a run cannot continue from it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / COMPLETE_NAME).is_file():
            raise CheckpointError(f"{path} is not complete: it has no file '{COMPLETE_NAME}'.")
        path, whole = path / FOLDER_STATE_NAME, path
    else:
        whole = path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({_first_line(error)}).") from error
    needed = {"loops", "optimizer_states"} if whole == path else {"loops"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise CheckpointError(f"{path} holds weights, but not the state of a run. Use it with init_from.")
    saved_at = content.get("exact_resume", {}).get("saved_at", path.stat().st_mtime)
    return CheckpointFacts(whole, saved_at, content["global_step"])


def find_resume_checkpoint(
    run_dir: str | os.PathLike[str], more_folders: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """Find the newest checkpoint of a run that is whole.

    Args:
        run_dir: the folder of the run, with `config.yaml` or `checkpoints` in it.
        more_folders: where the run kept checkpoints outside.

    Returns:
        Its path.

    Raises:
        CheckpointError: the folder is no run, or the run has no whole checkpoint.
    """
    run = Path(run_dir)
    if not run.is_dir():
        near = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
        raise CheckpointError(f"{run}: there is no such folder.{nearest(run.name, near)}")
    folders = [run, run / "checkpoints", *map(Path, more_folders)]
    found = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.ckpt"))]
    if not found and not (run / CONFIG_NAME).is_file():
        runs = sorted(path.parent.name for path in run.glob(f"*/{CONFIG_NAME}"))
        hint = f" It holds the runs {', '.join(runs)}: name one of them." if runs else ""
        raise CheckpointError(f"{run} is no run: it has neither {CONFIG_NAME} nor a checkpoint.{hint}")
    whole, refused = [], []
    for path in dict.fromkeys(path.resolve() for path in found):
        try:
            whole.append(inspect_checkpoint(path))
        except CheckpointError as error:
            refused.append(str(error))
    if not whole:
        partials = [path.name for folder in folders if folder.is_dir() for path in folder.glob(f".*{PARTIAL_SUFFIX}")]
        reasons = [*refused, *(f"{name} was not written to its end." for name in partials)]
        raise CheckpointError(f"{run} has no complete checkpoint to resume from. {' '.join(reasons)}".rstrip())
    for reason in refused:
        rank_zero_warn(f"Not resumed from: {reason}")
    return max(whole, key=lambda facts: (facts.saved_at, facts.global_step)).path


def _not_written(target: Path, error: Exception) -> CheckpointError:
    folder = next(folder for folder in [target.parent, *target.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(folder).free
    earlier = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    stays = f" The earlier checkpoint {earlier[-1]} stays." if earlier else ""
    return CheckpointError(
        f"{target} could not be written: {_first_line(error)} ({free / 2**20:.0f} MiB are free).{stays} Make room, or "
        "keep fewer checkpoints, and resume."
    )


def _sync(path: Path) -> None:
    """Force what the system holds back of a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
