"""SAT's folders: `latest`, `model_config.json` and `<iteration>/mp_rank_NN_model_states.pt`."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_lightning.errors import CheckpointError

PARTITION_NAME = "mp_rank_{:02d}_model_states.pt"

# A training checkpoint holds numpy's random state and perhaps its options; nothing else is ever unpickled.
_reconstruct = np.empty(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    argparse.Namespace,
]


def find_step_folder(folder: Path) -> Path:
    """Return the folder that holds the partitions: this one, or the one that `latest` names.

    Raises:
        CheckpointError: if there is none; the message lists what is there.
    """
    if (folder / PARTITION_NAME.format(0)).is_file():
        return folder
    steps = sorted(path.parent.name for path in folder.glob("*/" + PARTITION_NAME.format(0)))
    latest = folder / "latest"
    if not latest.is_file():
        if len(steps) == 1:
            return folder / steps[0]
        raise CheckpointError(
            f"{folder} has no file 'latest', steps are {steps or 'none'}. Give one of them, or write it."
        )
    name = latest.read_text(encoding="utf-8").strip()
    if not (folder / name / PARTITION_NAME.format(0)).is_file():
        raise CheckpointError(
            f"{latest} names '{name}', steps are {steps or 'none'}. Correct it, or give a step's folder."
        )
    return folder / name


def read_torch_file(file: Path) -> dict[str, Any]:
    """Read a file of `torch.save` without running anything it says.

    Raises:
        CheckpointError: if it is truncated, no such file, or asks for more than tensors and plain values.
    """
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{file}: not loaded, as it asks for code to be run ({error}).") from error
        except (RuntimeError, EOFError) as error:
            raise CheckpointError(f"{file} is no whole file of torch.save ({error}). Copy or save it again.") from error


def read_sat_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the state dict of a SAT folder."""
    return dict(read_torch_file(find_step_folder(folder) / PARTITION_NAME.format(0))["module"])
