"""Tensors in files: opened when first asked for, mapped into memory, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sat_lightning.errors import CheckpointError, nearest

MAX_SHARD_SIZE = 5 << 30
"""Bytes above which weights are written in several files."""

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


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file.

    Args:
        file: the file.
        is_copied: whether a tensor is read into memory of its own, which goes when the tensor does: for those that are
            about to change their layout. Default: mapped, so that it costs nothing until it is read.
    """

    def __init__(self, file: Path, is_copied: bool = False) -> None:
        try:
            self._file = _open_copied(file) if is_copied else safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no whole safetensors file ({error}). Copy or save it again.") from error
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open_copied(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # before safetensors 0.8 there was only the mapped way
        return safe_open(file, framework="pt")


def read_torch_file(file: Path) -> dict[str, Any]:
    """Read a file of `torch.save` without running anything it says; tensors are mapped into memory.

    Raises:
        CheckpointError: if it is truncated, or asks for more than tensors and plain values.
    """
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        try:
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
        except pickle.UnpicklingError as error:
            # torch's own advice is to load without this check; nobody should read it in this place.
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                raise CheckpointError(f"{file} is no file of torch.save. Copy or save it again.") from error
            raise CheckpointError(
                f"{file}: refused, as it asks for {asked[1]}, which is neither tensor, number nor text, and could run "
                "code. If you made the file yourself, save the state dict alone with torch.save."
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(f"{file} is no whole file of torch.save ({error}). Copy or save it again.") from error


def open_weights(folder: Path, is_copied: bool = False) -> tuple[Mapping[str, Tensor], Path] | None:
    """Open the weights of a native or Hugging Face folder.

    Args:
        folder: holds `model.safetensors` or `pytorch_model.bin`, or an index and the shards it names.
        is_copied: see `SafetensorsFile`.

    Returns:
        The tensors by name, and the file that names them; None if there is no such file.

    Raises:
        CheckpointError: if a shard is missing, incomplete, or not what the index says.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return open_tensors(single, is_copied), single
        if index.is_file():
            places: dict[str, str] = read_json(index)["weight_map"]
            shards = {name: _open_shard(index, name, is_copied) for name in sorted(set(places.values()))}
            for name, shard in places.items():
                if name not in shards[shard]:
                    raise CheckpointError(f"{index} places '{name}' in {shard}, which lacks it. Copy the folder again.")
            return ChainMap(*shards.values()), index  # type: ignore[arg-type]
    return None


def open_tensors(file: Path, is_copied: bool = False) -> Mapping[str, Tensor]:
    """Open one file of tensors, by its ending: safetensors, or of `torch.save` (a state dict, or one in `module`)."""
    if file.suffix == ".safetensors":
        return SafetensorsFile(file, is_copied)
    content = read_torch_file(file)
    state = content.get("module", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{file} holds no state dict: neither it nor its 'module' is a mapping of names to tensors. Give the "
            "mp_rank_NN_model_states.pt of the step, or a file with the state dict alone."
        )
    return state


def _open_shard(index: Path, name: str, is_copied: bool) -> Mapping[str, Tensor]:
    file = index.parent / name
    if file.resolve().parent != index.parent.resolve() and Path(name).name != name:
        raise CheckpointError(f"{index} names '{name}', which is not beside it. Correct the index.")
    if not file.is_file():
        raise CheckpointError(f"{index} names '{name}', and there is no such file.{found_beside(file)}")
    return open_tensors(file, is_copied)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int = MAX_SHARD_SIZE
) -> list[Path]:
    """Write `model.safetensors`, or shards of it and an index; an earlier save stays until all is written.

    Args:
        folder: exists.
        tensors: names and tensors; at most one shard is held at a time.
        max_shard_size: bytes of one file.

    Returns:
        The files.
    """
    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    try:
        for name, tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            if shard and size + nbytes > max_shard_size:
                written.append((_write_shard(folder, len(written), shard), list(shard)))
                shard, size = {}, 0
            shard[name] = tensor
            size, total = size + nbytes, total + nbytes
        written.append((_write_shard(folder, len(written), shard), list(shard)))
        return _name_shards(folder, written, total)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    temporary = folder / f".model.{number}.{os.getpid()}.tmp"
    try:
        save_file(ready, temporary, metadata={"format": "pt"})
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _name_shards(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> list[Path]:
    places: dict[str, str] = {}
    count, files = len(written), []
    for number, (temporary, names) in enumerate(written, start=1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        os.replace(temporary, folder / name)
        files.append(folder / name)
        places |= dict.fromkeys(names, name)
    index = folder / "model.safetensors.index.json"
    if count > 1:
        write_json(index, {"metadata": {"total_size": total}, "weight_map": places})
        files.append(index)
    for stale in [folder / "model.safetensors", index, *folder.glob("model-*-of-*.safetensors")]:
        if stale not in files:
            stale.unlink(missing_ok=True)
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Restore it from a backup, or save again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__}, it must be an object of names and values.")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Write to a temporary name in the same folder, and rename it once all is written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def found_beside(path: Path) -> str:
    """Say what the nearest existing folder above a missing path holds, as the tail of an error message."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    wanted = path.absolute().relative_to(folder).parts[0]
    return f" {folder} holds {shown or 'nothing'}.{nearest(wanted, names)}"
