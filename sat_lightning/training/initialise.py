"""The weights that a new run begins with: those of a training checkpoint or of a model folder, and nothing else."""

import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.checkpoint.fitting import Incoming, fit
from sat_lightning.checkpoint.report import Tolerance, some
from sat_lightning.checkpoint.split import copy_into, full_shape, is_split
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.quantized import QuantizedBaseMixin, make_all_dense
from sat_lightning.model import BaseModel
from sat_lightning.training.checkpoints import FOLDER_STATE_NAME, AtomicCheckpointIO
from sat_lightning.training.frozen_base import FROZEN_BASE_KEY, refuse_differing

_FILES_OF_RUNS = (".ckpt", ".pt")


def init_from(module: L.LightningModule, path: str | os.PathLike[str]) -> None:
    """Begin with the weights of a file: now, or as soon as the module has built its model.

    Mixins that were added to the model keep their own first weights where the file has none; all else has to fit. A
    model that ZeRO-3 splits while it is built takes on each rank the pieces that are kept there.

    Args:
        module: not fitted yet.
        path: a training checkpoint of any strategy, a model folder (ours, SAT's or Hugging Face's), or a `.safetensors`
            file.

    Raises:
        CheckpointError: there is nothing to read, or it does not fit.
    """
    if not Path(path).exists():
        raise CheckpointError(f"init_from: {path} does not exist.")
    if is_overridden("configure_model", module) and getattr(module, "model", None) is None:
        # A sharding strategy has the model built in its own way.
        module.configure_model = partial(_configure_and_read, module, module.configure_model, path)  # type: ignore
    else:
        _read_weights(module, Path(path))


def _configure_and_read(module: L.LightningModule, configure: Any, path: str | os.PathLike[str]) -> None:  # noqa: ANN401
    module.configure_model = configure  # type: ignore  # Lightning calls it before each run
    configure()
    _read_weights(module, Path(path))


def _read_weights(module: L.LightningModule, path: Path) -> None:
    model = getattr(module, "model", None)
    if not isinstance(model, BaseModel):
        _fill(module, _weights_of_run(path), path)
        return
    factories = getattr(module, "_mixin_factories", {})
    if any(isinstance(mixin, QuantizedBaseMixin) for mixin in model.mixins.values()):
        make_all_dense(model)  # to be filled; `reinit` puts it into 4 bits again
    added, removed = (
        tuple(f"mixins.{name}.*" for name in factories if (name in model.mixins) == is_there)
        for is_there in (True, False)
    )
    if path.suffix in _FILES_OF_RUNS:
        tensors = {name.removeprefix("model."): tensor for name, tensor in _weights_of_run(path).items()}
        report = fit(model, Incoming(tensors), Tolerance(may_miss=added, ignore=removed), what=str(path))
    else:
        report = load_checkpoint(model, path, may_miss=added, ignore=removed)
    # What begins at the base, as DoRA's lengths of rows do, began at one that was replaced.
    model.reinit([name for name in factories if name in model.mixins and _is_new(model, name, report.missing)])
    new = f" New in the model: {some(report.missing)}." if report.missing else ""
    rank_zero_info(f"Begins with {len(report.loaded)} tensors of {path}.{new}")


def _is_new(model: BaseModel, name: str, missing: Collection[str]) -> bool:
    """Tell whether a file had nothing of a mixin."""
    own = {key for key in model.state_dict() if key.startswith(f"mixins.{name}.")}
    return own <= set(missing)


def _fill(module: L.LightningModule, weights: dict[str, Tensor], path: Path) -> None:
    if not any(is_split(parameter) for parameter in module.parameters()):
        module.load_state_dict(weights)
        return
    own = module.state_dict(keep_vars=True)
    refuse_differing(own.keys() - weights.keys(), weights.keys() - own.keys())
    for name, tensor in own.items():
        if torch.is_tensor(tensor) and full_shape(tensor) != tuple(weights[name].shape):
            raise CheckpointError(
                f"init_from: '{name}' is {list(weights[name].shape)} in {path}, the model has "
                f"{list(full_shape(tensor))}. Build the model as it was."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            if torch.is_tensor(tensor):
                copy_into(tensor, weights[name])


def _weights_of_run(path: Path) -> dict[str, Tensor]:
    is_folder = path.is_dir() and (path / FOLDER_STATE_NAME).is_file()
    if path.suffix not in _FILES_OF_RUNS or not (path.is_file() or is_folder):
        raise CheckpointError(f"init_from: {path} is no training checkpoint of this module.")
    content = AtomicCheckpointIO().load_checkpoint(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        raise CheckpointError(f"init_from: {path} has no 'state_dict', only {some(list(content))}.")
    if FROZEN_BASE_KEY in content:
        raise CheckpointError(
            f"init_from: {path} holds what was trained only, without its base. Resume the run, or export the model."
        )
    return weights
