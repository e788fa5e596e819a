"""Where the linears of a model are: what adapters of weights choose from, by name.

layers.0.attention.query_key_value      in parts: ....query, ....key, ....value (and ....key_value of a decoder)
layers.0.attention.dense
layers.0.cross_attention.query
layers.0.mlp.dense_h_to_4h_3            expert 3
mixins.<name>.gates.0                   a linear that a mixin runs through `linear_forward`
word_embeddings
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from sat_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel

T = TypeVar("T")
_PARTS = {"query_key_value": ("query", "key", "value"), "key_value": ("key", "value")}


@dataclass(frozen=True)
class Slot:
    """The rows of a linear that one adapter is about: all of them, or one part of a fused projection."""

    name: str
    index: int
    start: int
    size: int


@dataclass(frozen=True)
class Place:
    """A linear or an embedding that adapters can reach."""

    name: str
    module: nn.Module
    parts: tuple[Slot, ...] = ()

    @property
    def in_features(self) -> int:
        """Size of what it reads: features, or words of an embedding."""
        return self.module.num_embeddings if isinstance(self.module, nn.Embedding) else self.module.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Size of what it writes."""
        is_table = isinstance(self.module, nn.Embedding)
        return self.module.embedding_dim if is_table else self.module.out_features  # type: ignore[return-value]

    @property
    def whole(self) -> Slot:
        """All rows as one."""
        return Slot(self.name, 0, 0, self.out_features)


def find_places(model: BaseModel) -> list[Place]:
    """Return every linear whose call passes through `linear_forward`, in the order of the layers, and the embedding."""
    found = []
    for layer_id, layer in enumerate(model.transformer.layers):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                found.append(_place(f"layers.{layer_id}.{path}", module, layer))
    for name, mixin in model.mixins.items():
        if mixin.runs_linears:
            found += [
                Place(f"mixins.{name}.{path}", module)
                for path, module in mixin.named_modules()
                if isinstance(module, nn.Linear)
            ]
    return [*found, Place("word_embeddings", model.transformer.word_embeddings)]


def _place(name: str, module: nn.Module, layer: nn.Module) -> Place:
    _, _, path = name.split(".", 2)
    parent, _, leaf = path.rpartition(".")
    names, sizes = _PARTS.get(leaf, ()), getattr(layer.get_submodule(parent), "sizes", ())
    if len(names) != len(sizes):
        return Place(name, module)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = zip(names, range(len(names)), starts, sizes, strict=True)
    return Place(name, module, tuple(Slot(f"{name}.{part}", *where) for part, *where in parts))


def choose(model: BaseModel, target: str | Sequence[str], option: str = "target") -> list[tuple[Place, list[Slot]]]:
    """Find what patterns mean.

    Args:
        model: where to look.
        target: regular expressions, each searched for anywhere in a name. A fused projection is adapted part by part
            where the names of parts match; where only its own does (`query_key_value$`), as one.
        option: what the patterns are called, for messages.

    Returns:
        Places with their adapted rows.

    Raises:
        ConfigError: if there is no pattern, one is malformed, or matches nothing that can be reached.
    """
    patterns = {text: _compile(text, option) for text in ([target] if isinstance(target, str) else target)}
    if not patterns:
        raise ConfigError(f"{option} is empty: name at least one linear, as '{option}: [attention]'.")
    found, used = [], set[str]()
    for place in find_places(model):
        slots: dict[str, Slot] = {}
        for text, pattern in patterns.items():
            matching = [slot for slot in place.parts if pattern.search(slot.name)]
            if not matching and pattern.search(place.name):
                matching = [place.whole]
            slots |= {slot.name: slot for slot in matching}
            if matching:
                used.add(text)
        if place.parts and place.name in slots and len(slots) > 1:
            raise ConfigError(
                f"{option}: patterns mean {place.name} as one and in parts ({', '.join(set(slots) - {place.name})}). "
                "Name it either way."
            )
        if slots:
            found.append((place, sorted(slots.values(), key=lambda slot: slot.index)))
    for text in patterns.keys() - used:
        _refuse(model, text, patterns[text], option)
    return found


def _refuse(model: BaseModel, text: str, pattern: re.Pattern[str], option: str) -> None:
    hidden = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.search(name)]
    if hidden:
        raise ConfigError(
            f"{option}: '{text}' matches {hidden[0]}, whose call does not pass through linear_forward, so that no "
            "adapter is asked there. Let the mixin call run_linear and set runs_linears = True, or choose other ones."
        )
    leaves = dict.fromkeys(re.sub(r"^layers\.\d+\.", "", place.name) for place in find_places(model))
    raise ConfigError(
        f"{option}: '{text}' matches no linear.{nearest(text, [*leaves])} There are layers.<i>. {', '.join(leaves)}."
    )


def look_up(patterns: Mapping[str, T], name: str, default: T, used: set[str]) -> T:
    """Return the value of the first pattern that a name matches, and note that it was used."""
    for text, value in patterns.items():
        if _compile(text, "pattern").search(name):
            used.add(text)
            return value
    return default


def _compile(text: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{option}: '{text}' is no regular expression: {error}.") from error


def nested(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a path with dots, so that its names in the state dict are those of the path."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(leaf, module)


def adapters_in(root: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the adapters under a module, by their paths."""
    return ((name, module) for name, module in root.named_modules() if isinstance(module, kind))
