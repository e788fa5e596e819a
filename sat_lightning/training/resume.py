"""`fit --resume RUN_DIR`: the same run goes on, in the same folder, with what was changed written down."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sat_lightning.errors import CheckpointError, UsageError
from sat_lightning.training.callbacks.exact_resume import ExactResume
from sat_lightning.training.checkpoints import CONFIG_NAME, FOLDER_STATE_NAME, find_resume_checkpoint
from sat_lightning.training.frozen_base import FROZEN_BASE_KEY
from sat_lightning.training.metrics_file import continue_files
from sat_lightning.training.reset import check_reset

HISTORY_NAME = "resumed.jsonl"
_FOLDER_LOGGERS = ("CSVLogger", "TensorBoardLogger")
_NOT_CHANGES = ("ckpt_path", "config", "weights_only", "trainer.logger.")


class SaveConfigAtStart(SaveConfigCallback):
    """Lightning's, but the saved configuration of a resumed run is replaced only once all is restored, hence fits."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the old one for now."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the new one."""
        super().setup(trainer, pl_module, "fit")


@dataclass
class Resumption:
    """How a run goes on."""

    run: Path
    checkpoint: Path
    reset: tuple[str, ...]
    words: list[str]
    """For Lightning's CLI: the saved configuration, the same folder, and what the user said."""
    saved: dict[str, Any] = field(default_factory=dict)
    """The saved configuration."""

    @property
    def has_base(self) -> bool:
        """Whether the checkpoint holds all weights, and the configuration's `init_from` has nothing to add."""
        file = self.checkpoint / FOLDER_STATE_NAME if self.checkpoint.is_dir() else self.checkpoint
        return FROZEN_BASE_KEY not in torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def read_resume(words: list[str]) -> Resumption | None:
    """Take `--resume` and `--reset` out of the words of `fit`.

    Args:
        words: the options.

    Returns:
        How the run goes on; None without `--resume`.

    Raises:
        UsageError: `--reset` stands alone or names an unknown part, or `--resume` stands beside another word for what
            to begin with.
        CheckpointError: the folder is no run, or holds no complete checkpoint.
    """
    rest = list(words)
    run_dir, reset = _take(rest, "resume"), _take(rest, "reset")
    if run_dir is None:
        if reset is not None:
            raise UsageError("--reset says what --resume does not restore. Give --resume RUN_DIR, too.")
        return None
    for other, meaning in (("init_from", "begins a new run with the weights alone"), ("ckpt_path", "names one file")):
        if _take(list(rest), other) is not None:
            raise UsageError(f"--resume continues a run, --{other} {meaning}. Give one of the two.")
    run, config = Path(run_dir), Path(run_dir) / CONFIG_NAME
    saved = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    checkpoint = find_resume_checkpoint(run, _checkpoint_folders(saved))
    if not config.is_file():
        raise CheckpointError(f"{run} has no {CONFIG_NAME}: it was not made by `fit`. Give --ckpt_path {checkpoint}.")
    own = ["--config", str(config), *_same_folder(saved, run)]
    return Resumption(run, checkpoint, check_reset([reset] if reset else []), [*own, *rest], saved)


def begin_resume(plan: Resumption, trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Prepare the trainer, and say what was changed.

    Args:
        plan: how the run goes on.
        trainer: before it fits.
        config: that it was built from, as plain values.
    """
    continue_files(trainer)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own = [callback for callback in callbacks if isinstance(callback, ExactResume)]
    if not own:
        callbacks.append(ExactResume(plan.reset))
    elif plan.reset:
        own[0].reset = plan.reset
    changes = compare(plan.saved, config)
    rank_zero_info(f"Resumes {plan.run} from {plan.checkpoint}.")
    for name, (old, new) in changes.items():
        rank_zero_info(f"Changed: {name}: {old} -> {new}")
    learned = [name for name in changes if ".optim" in name]
    if learned and not {"optimizer", "scheduler"} <= set(plan.reset):
        rank_zero_warn(
            f"{', '.join(learned)}: learning rates and their schedule are this run's from here on; the optimizer's "
            "other settings (betas, epsilon, weight decay) are the checkpoint's, unless you give --reset optimizer."
        )
    if trainer.is_global_zero:
        entry: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "checkpoint": str(plan.checkpoint)}
        entry |= {"reset": list(plan.reset), "changes": {name: list(pair) for name, pair in changes.items()}}
        with (plan.run / HISTORY_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=str) + "\n")


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations.

    Args:
        old: nested plain values.
        new: the same.

    Returns:
        Dotted names, and the old and the new value; None where one lacks it.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    names = [name for name in [*before, *(n for n in after if n not in before)] if not name.startswith(_NOT_CHANGES)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _take(words: list[str], name: str) -> str | None:
    """Take an option and its value out of words."""
    for index, word in enumerate(words):
        if word == f"--{name}":
            if index + 1 == len(words) or words[index + 1].startswith("--"):
                raise UsageError(f"--{name} needs a value.")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"--{name}="):
            del words[index]
            return word.partition("=")[2]
    return None


def _same_folder(saved: dict[str, Any], run: Path) -> list[str]:
    """Words that send the logger to the folder of the run, wherever that is now."""
    logger = (saved.get("trainer") or {}).get("logger")
    name = logger.get("class_path", "").rpartition(".")[2] if isinstance(logger, dict) else ""
    if name not in _FOLDER_LOGGERS:
        return ["--trainer.default_root_dir", str(run)] if logger is False else []
    where = run.absolute() if run.name in ("", ".", "..") else run
    where = where.resolve() if where.name in ("", ".", "..") else where
    places = {"save_dir": where.parent.parent, "name": where.parent.name, "version": where.name}
    if not places["name"]:
        places |= {"save_dir": where.parent, "name": ""}
    return [word for key, value in places.items() for word in (f"--trainer.logger.init_args.{key}", str(value))]


def _checkpoint_folders(saved: dict[str, Any]) -> list[str]:
    callbacks = (saved.get("trainer") or {}).get("callbacks") or []
    arguments = [entry.get("init_args") or {} for entry in callbacks if isinstance(entry, dict)]
    return [str(each["dirpath"]) for each in arguments if each.get("dirpath")]
