"""The weights that a new run begins with: those of a training checkpoint or of a model folder, and nothing else."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.checkpoint.fitting import Incoming, fit
from sat_lightning.checkpoint.report import Tolerance, some
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.model import BaseModel
from sat_lightning.training.checkpoints import AtomicCheckpointIO

_FILES_OF_RUNS = (".ckpt", ".pt")


def init_from(module: L.LightningModule, path: str | os.PathLike[str]) -> None:
    """Begin with the weights of a file: now, or as soon as the module has built its model.

    Mixins that were added to the model keep their own first weights where the file has none; all else has to fit.

    Args:
        module: not fitted yet.
        path: a training checkpoint, a model folder (ours, SAT's or Hugging Face's), or a `.safetensors` file.

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
    is_first = getattr(module, "model", None) is None
    configure()
    if is_first:
        _read_weights(module, Path(path))


def _read_weights(module: L.LightningModule, path: Path) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise ConfigError(
            "init_from: under ZeRO-3 no rank has the weights whole. Let the model be built from a model folder "
            "(from_pretrained), or begin under zero_2 and resume under zero_3."
        )
    model = getattr(module, "model", None)
    if not isinstance(model, BaseModel):
        module.load_state_dict(_weights_of_run(path))
        return
    added = tuple(f"mixins.{name}.*" for name in getattr(module, "_mixin_factories", ()))
    if path.suffix in _FILES_OF_RUNS:
        tensors = {name.removeprefix("model."): tensor for name, tensor in _weights_of_run(path).items()}
        report = fit(model, Incoming(tensors), Tolerance(may_miss=added), what=str(path))
    else:
        report = load_checkpoint(model, path, may_miss=added)
    new = f" New in the model: {some(report.missing)}." if report.missing else ""
    rank_zero_info(f"Begins with {len(report.loaded)} tensors of {path}.{new}")


def _weights_of_run(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _FILES_OF_RUNS or not path.is_file():
        raise CheckpointError(f"init_from: {path} is no training checkpoint of this module.")
    content = AtomicCheckpointIO().load_checkpoint(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        raise CheckpointError(f"init_from: {path} has no 'state_dict', only {some(list(content))}.")
    if "frozen_base" in content:
        raise CheckpointError(
            f"init_from: {path} holds what was trained only, without its base. Resume the run, or export the model."
        )
    return weights
