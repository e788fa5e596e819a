"""Model folders: `model_config.json`, which SAT reads too, and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import sat_lightning.models  # noqa: F401  (registers the families that a folder may name)
from sat_lightning.checkpoint.sat import PARTITION_NAME, read_sat_tensors
from sat_lightning.errors import CheckpointError, nearest
from sat_lightning.model import BaseModel, find_model

CONFIG_NAME, WEIGHTS_NAME = "model_config.json", "model.safetensors"


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by names of the state dict."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the model, not in the file: these keep the values they had."""
    unexpected: tuple[str, ...]
    """In the file, not in the model."""


def save_pretrained(model: BaseModel, folder: str | os.PathLike[str]) -> None:
    """Write a model folder; each file appears whole, or not at all.

    Args:
        model: any model; tensors that share memory are written once for each name.
        folder: made where it is missing; files of these names in it are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        is_shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if is_shared else tensor.contiguous()
    with _written_whole(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with _written_whole(folder / CONFIG_NAME) as temporary:
        config = model.config.to_dict(model_class=type(model).__name__)
        temporary.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def load_checkpoint(model: BaseModel, path: str | os.PathLike[str], strict: bool = True) -> LoadReport:
    """Load a model folder, or its weights file, into a model that stands, mixins and all.

    Args:
        model: receives the weights, in its own dtype.
        path: the folder, or the `.safetensors` file.
        strict: whether a name that only one side has is an error.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: if there is nothing to read, names do not match under `strict`, or shapes do not fit; the model
            is then as it was.
    """
    file = Path(path)
    if file.is_dir() and not (file / WEIGHTS_NAME).is_file() and any(file.rglob(PARTITION_NAME.format(0))):
        tensors = read_sat_tensors(file)
    else:
        file = file / WEIGHTS_NAME if file.is_dir() else file
        if not file.is_file():
            raise CheckpointError(f"{file}: there is no such file.{_found_beside(file)}")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no whole safetensors file ({error}). Copy or save it again.") from error
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"{file} does not fit {type(model).__name__}: missing {_some(missing)}, unexpected {_some(unexpected)}. "
            "Add the mixins it was saved with, or pass strict=False to load what both have."
        )
    shared = sorted(own.keys() & tensors.keys())
    for name in shared:
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{file}: '{name}' is {list(tensors[name].shape)}, the model has {list(own[name].shape)}. Build the "
                f"model from the {CONFIG_NAME} beside the file."
            )
    model.load_state_dict({name: tensors[name] for name in shared}, strict=False)
    return LoadReport(tuple(shared), tuple(missing), tuple(unexpected))


class AutoModel:
    """Build the model that a folder names."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **config_overrides: Any) -> BaseModel:
        """Build the model class that a folder names, and load its weights.

        Args:
            path: a model folder.
            **config_overrides: fields of the configuration to change.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: if the folder is no model folder, or its weights do not fit.
            ConfigError: if it names an unknown class, or an override is no field.
        """
        file = Path(path) / CONFIG_NAME
        if not file.is_file():
            raise CheckpointError(f"{file}: there is no such file, so {path} is no model folder.{_found_beside(file)}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file} is no JSON ({error}). Restore it from a backup, or save again.") from error
        if "model_class" not in values:
            raise CheckpointError(f'{file} names no model_class. Add it, for example "model_class": "GPT2Model".')
        model_class = find_model(values["model_class"])
        model = model_class(model_class.config_class.from_dict(values).replace(**config_overrides))
        load_checkpoint(model, path)
        return model.eval()


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Write to a temporary name in the same folder, and rename it once all is written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _found_beside(file: Path) -> str:
    folder = file.parent if file.parent.is_dir() else file.parent.parent
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    wanted = file.name if file.parent.is_dir() else file.parent.name
    return f" {folder} holds {', '.join(names) or 'nothing'}.{nearest(wanted, names)}"


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
