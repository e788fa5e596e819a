"""SAT's folders, read and written: `latest`, `model_config.json` and `<step>/mp_rank_NN_model_states.pt`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sat_lightning.checkpoint.files import found_beside, open_tensors, read_json, write_json, written_whole
from sat_lightning.checkpoint.native import CONFIG_NAME, describe, refuse_quantized
from sat_lightning.checkpoint.partition import MergedTensors, split_tensors
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError
from sat_lightning.model.registry import AnyModel

PARTITION_NAME = "mp_rank_{:02d}_model_states.pt"
_FIRST = PARTITION_NAME.format(0)


def find_partitions(path: Path, step: int | str | None = None) -> list[Path]:
    """Find the files of all ranks.

    Args:
        path: one file, the folder of a step, or the folder of a run, whose `latest` names the step.
        step: of a run's folder. Default: what `latest` says, or the only one there is.

    Returns:
        The files in the order of ranks.

    Raises:
        CheckpointError: if there is none, or a rank is missing; the message lists what is there.
    """
    if path.is_file():
        ranks = sorted(path.parent.glob("mp_rank_*_model_states.pt")) if path.name == _FIRST else [path]
        return _check_ranks(ranks)
    if step is None and (path / _FIRST).is_file():
        return _check_ranks(sorted(path.glob("mp_rank_*_model_states.pt")))
    steps = sorted(file.parent.name for file in path.glob(f"*/{_FIRST}"))
    latest = path / "latest"
    name = str(step) if step is not None else latest.read_text(encoding="utf-8").strip() if latest.is_file() else None
    if name is None and len(steps) == 1:
        name = steps[0]
    if name is None:
        raise CheckpointError(f"{path} has no file 'latest'; its steps are {steps or 'none'}. Pass step, or write it.")
    if name not in steps:
        if any((path / name).glob("z3_rank_*")):
            raise CheckpointError(
                f"{path / name} holds ZeRO-3 partitions (z3_rank_...), which only its run can gather. Write them from "
                "there as one file, or convert with DeepSpeed's zero_to_fp32."
            )
        origin = "step" if step is not None else f"{latest} says"
        raise CheckpointError(
            f"{origin} '{name}', and {path} has the steps {steps or 'none'}. Pass one of them as step."
        )
    return _check_ranks(sorted((path / name).glob("mp_rank_*_model_states.pt")))


def _check_ranks(files: list[Path]) -> list[Path]:
    for rank, file in enumerate(files):
        if len(files) > 1 and file.name != PARTITION_NAME.format(rank):
            raise CheckpointError(
                f"{file.parent} lacks {PARTITION_NAME.format(rank)} of its partitions.{found_beside(file)} Copy "
                "all ranks."
            )
    return files


def is_sat_folder(path: Path) -> bool:
    """Tell whether a folder is a SAT step or run, by its files alone."""
    return (path / _FIRST).is_file() or (path / "latest").is_file() or any(path.glob(f"*/{_FIRST}"))


def find_config(path: Path) -> Path | None:
    """Return the `model_config.json` of a SAT file, step or run."""
    folders = [path, path.parent] if path.is_dir() else [path.parent, path.parent.parent]
    return next((folder / CONFIG_NAME for folder in folders if (folder / CONFIG_NAME).is_file()), None)


def open_sat(
    path: Path, config: TransformerConfig, model_class: str, step: int | str | None = None
) -> Mapping[str, Tensor]:
    """Open the tensors of a SAT checkpoint; partitions are merged tensor by tensor.

    Args:
        path: a file, a step or a run.
        config: of the model; says how fused blocks were cut.
        model_class: its name.
        step: see `find_partitions`.

    Returns:
        Whole tensors by SAT's names, read when they are asked for.
    """
    files = find_partitions(path, step)
    config_file = find_config(path)
    expected = read_json(config_file).get("model_parallel_size", 1) if config_file is not None else 1
    if len(files) < expected and (path.is_dir() or path.name == _FIRST):
        raise CheckpointError(
            f"{path}: {CONFIG_NAME} says model_parallel_size {expected}, and {files[0].parent} holds {len(files)} of "
            f"the partitions. Copy all ranks; or, if what is there is whole, set it to {len(files)}."
        )
    return MergedTensors([open_tensors(file) for file in files], config, model_class, str(path))


def save_sat(
    model: AnyModel,
    folder: str | os.PathLike[str],
    model_parallel_size: int = 1,
    step: int | str = 1,
) -> None:
    """Write a folder that SAT itself loads.

    Args:
        model: any model whose class SAT has; mixins that it does not build itself must be added there too (here
            they are rebuilt from the folder: SAT passes over the keys that say so).
        folder: made where it is missing.
        model_parallel_size: into how many partitions the weights are cut; no process group is needed, and beside the
            model only one partition is held.
        step: the iteration that `latest` names, or "release".

    Raises:
        CheckpointError: if the sizes of the model cannot be cut so.
    """
    config = model.config.replace(model_parallel_size=model_parallel_size)
    values = describe(model) | {"model_parallel_size": model_parallel_size}
    refuse_quantized(model)
    write_sat(model.state_dict(), config, values, Path(folder), step)


def write_sat(
    tensors: Mapping[str, Tensor],
    config: TransformerConfig,
    values: Mapping[str, object],
    folder: Path,
    step: int | str,
) -> None:
    """Write tensors of our names as a SAT folder; see `save_sat`.

    Args:
        tensors: by name; each rank reads those it needs.
        config: its `model_parallel_size` says how many partitions are written.
        values: of `model_config.json`.
        folder: made where it is missing.
        step: the iteration, or "release".
    """
    if not (str(step).isdigit() and int(step) > 0) and step != "release":
        raise CheckpointError(f"step is {step!r}, SAT reads a positive number, or 'release'.")
    target = folder / str(step)
    target.mkdir(parents=True, exist_ok=True)
    count, name = config.model_parallel_size, str(values["model_class"])
    for rank in range(count):
        part = {key: value.contiguous() for key, value in split_tensors(tensors, config, name, rank, count).items()}
        with written_whole(target / PARTITION_NAME.format(rank)) as temporary:
            torch.save({"module": part}, temporary)
        del part
    for stale in set(target.glob("mp_rank_*_model_states.pt")) - {
        target / PARTITION_NAME.format(r) for r in range(count)
    }:
        stale.unlink()
    write_json(folder / CONFIG_NAME, values)
    with written_whole(folder / "latest") as temporary:
        temporary.write_text(str(step), encoding="utf-8")
