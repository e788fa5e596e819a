"""Which linear of Hugging Face's is which rows of ours: read off the family's key map.

PEFT names modules as transformers does, with q, k and v apart or fused, and rows in its own order. A probe whose
entries say where they stand goes through each rule of the map, so that no rule needs a word about adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.huggingface import RECORD, choose_map
from sat_lightning.checkpoint.templates import Group, expand
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.places import Place, find_places
from sat_lightning.model import BaseModel
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.registry import AnyModel

_WEIGHT, _COLUMNS = ".weight", 3


@dataclass(frozen=True)
class Rows:
    """Rows of one linear of theirs that are rows of one of ours."""

    owner: str
    """The part of the model that holds ours, with a dot at its end; empty in a model of one part."""
    place: Place
    theirs: Tensor
    ours: Tensor


@dataclass(frozen=True)
class Module:
    """One linear or table of theirs."""

    name: str
    size: int
    """Features it writes."""
    rows: tuple[Rows, ...]
    is_transposed: bool
    """Whether their weight is `[in, out]`."""


def owners(model: AnyModel, prefix: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Yield the models of one backbone that a model is made of, by the prefix of their names."""
    if isinstance(model, BaseModel):
        yield prefix, model
        return
    for name, part in model.parts.items():
        yield from owners(part, f"{prefix}{name}.")


def key_map_of(model: AnyModel) -> KeyMap:
    """Return the table of the Hugging Face folder that a model is, or would be."""
    return choose_map(type(model), model.config.extra.get(RECORD, {}).get("config", {}))


def read_modules(model: AnyModel) -> dict[str, Module]:
    """Return their linears and tables by name, with the rows of ours that they are.

    Raises:
        CheckpointError: if the family has no key map.
    """
    places: dict[str, tuple[str, Place]] = {}
    for prefix, owner in owners(model):
        for place in find_places(owner):
            inner = "" if place.name.startswith("mixins.") else "transformer."
            places[f"{prefix}{inner}{place.name}{_WEIGHT}"] = (prefix, place)
    groups = [group for group in expand(key_map_of(model), model.config) if all(name in places for name in group.ours)]
    groups.sort(key=lambda group: len(group.ours))  # where two rules serve, the larger is meant: it overwrites
    found: dict[str, Module] = {}
    for group in groups:
        for module in _probe(group, [places[name] for name in group.ours], model.config):
            found[module.name] = module
    return found


def _probe(group: Group, ours: list[tuple[str, Place]], config: Any) -> Iterator[Module]:
    """Send numbered rows through a rule."""
    sizes = [_rows(place) for _, place in ours]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    probes = [
        (torch.arange(size) + start)[:, None] * _COLUMNS + torch.arange(_COLUMNS)
        for size, start in zip(sizes, starts, strict=True)
    ]
    if len({id(place.module) for _, place in ours}) < len(ours):
        return  # one table of theirs is that of two stacks here, and an adapter is of one of them
    try:
        theirs = group.transform.to_hf(probes, config)
    except (RuntimeError, IndexError):
        return  # it moves columns: no adapter of theirs is one of ours
    for name, tensor in zip(group.theirs, theirs, strict=True):
        is_transposed = tensor.shape[0] == _COLUMNS and int(tensor[1, 0] - tensor[0, 0]) == 1
        rows = (tensor.t() if is_transposed else tensor)[:, 0] // _COLUMNS
        found = []
        for (owner, place), start, size in zip(ours, starts, sizes, strict=True):
            here = torch.nonzero((rows >= start) & (rows < start + size)).flatten()
            if len(here):
                found.append(Rows(owner, place, here, rows[here] - start))
        yield Module(name.removesuffix(_WEIGHT), len(rows), tuple(found), is_transposed)


def _rows(place: Place) -> int:
    """Rows of the tensor: of a table, words."""
    return place.in_features if place.name == "word_embeddings" else place.out_features


def table_names(modules: Mapping[str, Module], model: AnyModel, names: list[str]) -> dict[str, str]:
    """Return for each name of a file what the table calls it.

    Raises:
        CheckpointError: for a name that the table does not have.
    """
    prefix, found = key_map_of(model).prefix, {}
    for name in names:
        known = next((known for known in (name, prefix + name, name.removeprefix("model.")) if known in modules), None)
        if known is None:
            some = ", ".join(list(modules)[:4])
            raise CheckpointError(
                f"The adapter is about '{name}', and a {type(model).__name__} has no such linear that adapters reach; "
                f"it has {some} and {max(0, len(modules) - 4)} more. Load the base that it was trained on."
            )
        found[name] = known
    return found
