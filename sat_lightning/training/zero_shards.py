"""The files of a sharded checkpoint, which any number of ranks can read, whatever number wrote them.

Each rank writes one safetensors file. It holds, of every parameter that the rank has a part of, that part of the
flattened weight (the fp32 copy where there is one) and of the optimizer's moments; the file's metadata say which part
of which shape it is. A reader that needs another part takes it from the files that overlap it, and reads nothing else.
Frozen parameters and buffers are there too. Nothing in the files is executed by reading them.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sat_lightning.errors import CheckpointError

#: What belongs to a name, beside the moments of its optimizer.
WEIGHT = "weight"
AVERAGE = "average"
#: Where in a checkpoint of Lightning's `EMA` keeps its state, hands over its parts, and finds the files to read.
EMA_KEY, PARTS_KEY, SHARDS_KEY = "ema", "ema_parts", "ema_shards"
_FILE = "zero-{rank:05d}-of-{num_ranks:05d}.safetensors"
_KEY = "{name}|{kind}"


@dataclass(frozen=True)
class Part:
    """A piece of one flattened tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    """Where the piece begins in the flattened whole."""
    tensors: dict[str, Tensor]
    """The piece of the weight and of each moment, one-dimensional."""
    scalars: dict[str, float]
    """What else the optimizer keeps of it: the number of its steps."""


class Shards(Protocol):
    """Whatever parts of weights and moments can be read from."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight; None if it is not there."""

    def kinds(self, name: str) -> list[str]:
        """Return what there is of a name: `weight`, and the moments of its optimizer."""

    def scalars(self, name: str) -> dict[str, float]:
        """Return what the optimizer keeps of a name beside moments."""

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return a piece of the flattened whole."""


def write_shard(folder: Path, rank: int, num_ranks: int, parts: Iterator[Part]) -> None:
    """Write what one rank has.

    Args:
        folder: of the checkpoint, not yet under its final name.
        rank: of this process.
        num_ranks: that write a file each.
        parts: their tensors are copied to the host one by one.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    for part in parts:
        kinds = sorted(part.tensors)
        places[part.name] = {"shape": part.shape, "start": part.start, "kinds": kinds, "scalars": part.scalars}
        for kind, tensor in part.tensors.items():
            # A copy, even on the host: a part is often a view of a large buffer, of which no file may hold more.
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            tensors[_KEY.format(name=part.name, kind=kind)] = copy
    metadata = {"format": "pt", "parts": json.dumps(places)}
    save_file(tensors, folder / _FILE.format(rank=rank, num_ranks=num_ranks), metadata=metadata)


class ShardFiles:
    """Read the files that `write_shard` wrote.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: files are missing or broken.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("zero-*-of-*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no zero-*.safetensors: it is no checkpoint of a ZeRO strategy.")
        num_ranks = int(files[0].stem.rpartition("-")[2])
        wanted = [_FILE.format(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        if missing := sorted(set(wanted) - {file.name for file in files}):
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}: copy the files of all {num_ranks} ranks.")
        self._places: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
        for name in wanted:
            try:
                file = safe_open(self.folder / name, framework="pt")
                places = json.loads(file.metadata()["parts"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.folder / name} is no whole shard ({error}). Copy it again.") from error
            for parameter, place in places.items():
                self._places.setdefault(parameter, []).append((file, place))

    @property
    def names(self) -> list[str]:
        """Names of all parameters and buffers."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if it is not there."""
        return tuple(self._places[name][0][1]["shape"]) if name in self._places else None

    def kinds(self, name: str) -> list[str]:
        """Return what there is of a name."""
        return self._places[name][0][1]["kinds"]

    def scalars(self, name: str) -> dict[str, float]:
        """Return what the optimizer keeps of a name beside moments."""
        return self._places[name][0][1]["scalars"]

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return a piece of the flattened whole.

        Args:
            name: of the parameter or buffer.
            kind: one of `kinds`.
            start: in elements.
            stop: after the last one.

        Raises:
            CheckpointError: no file holds all of it.
        """
        whole: Tensor | None = None
        num_read = 0
        for file, place in self._places[name]:
            piece = file.get_slice(_KEY.format(name=name, kind=kind))
            begin = place["start"]
            first, last = max(start, begin), min(stop, begin + piece.get_shape()[0])
            if first < last or (start == stop and whole is None):
                found = piece[max(0, first - begin) : max(0, last - begin)]
                if last - first == stop - start:
                    return found
                whole = found.new_empty(stop - start) if whole is None else whole
                whole[first - start : last - start] = found
                num_read += last - first
        if whole is None or num_read != stop - start:
            raise CheckpointError(f"{self.folder}: elements {start} to {stop} of '{name}' are in no file.")
        return whole

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return a whole tensor.

        Args:
            name: of the parameter or buffer.
            kind: one of `kinds`.
        """
        shape = tuple(self._places[name][0][1]["shape"])
        return self.read(name, kind, 0, prod(shape)).view(shape)


class LightningShards:
    """Read a checkpoint of Lightning's, one file with whole tensors, as if it were sharded.

    Args:
        checkpoint: what the file holds.
        names: of the parameters that the optimizer updates, in its order; none if its state is not wanted.
    """

    def __init__(self, checkpoint: Mapping[str, Any], names: list[str]) -> None:
        self._weights: Mapping[str, Tensor] = checkpoint["state_dict"]
        saved = checkpoint["optimizer_states"][0] if names and checkpoint.get("optimizer_states") else {}
        state: Mapping[int, Mapping[str, Any]] = saved.get("state", {})
        order = [index for group in saved.get("param_groups", ()) for index in group["params"]]
        if state and len(order) != len(names):
            raise CheckpointError(
                f"The checkpoint's optimizer has {len(order)} parameters, this run's has {len(names)}. Resume with the "
                "same trainable parameters, or start from the weights alone."
            )
        self.names = list(self._weights)
        self._states = {name: state.get(index, {}) for name, index in zip(names, order, strict=True)} if state else {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if it is not there."""
        return tuple(self._weights[name].shape) if name in self._weights else None

    def kinds(self, name: str) -> list[str]:
        """Return what there is of a name."""
        shape = self.shape(name)
        moments = self._states.get(name, {}).items()
        return [WEIGHT, *(kind for kind, value in moments if torch.is_tensor(value) and tuple(value.shape) == shape)]

    def scalars(self, name: str) -> dict[str, float]:
        """Return what the optimizer keeps of a name beside moments."""
        kinds = self.kinds(name)
        return {key: float(value) for key, value in self._states.get(name, {}).items() if key not in kinds}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return a piece of the flattened whole."""
        tensor = self._weights[name] if kind == WEIGHT else self._states[name][kind]
        return tensor.flatten()[start:stop]
