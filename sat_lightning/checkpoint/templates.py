"""Fills in the name templates of a key map: which tensors of ours are which of theirs, for one configuration."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sat_lightning.config import TransformerConfig
from sat_lightning.model.keymap import KeyMap, Rule, Transform

Ranges = dict[str, list[tuple[str, str]]]
"""The values of each placeholder: its text in our names, and in theirs."""

_PLACEHOLDER = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class Group:
    """One rule with its placeholders filled in."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


def expand(key_map: KeyMap, config: TransformerConfig) -> list[Group]:
    """Fill the placeholders of every rule.

    Args:
        key_map: the family's table.
        config: decides how many layers and experts there are.

    Returns:
        All groups that a file of this configuration could hold.
    """
    ranges = _ranges(key_map, config)
    return [group for rule in key_map.rules for group in _expand_rule(rule, ranges)]


def fill_theirs(template: str, key_map: KeyMap, config: TransformerConfig) -> list[str]:
    """Fill one template of their names with all values of its placeholders."""
    return list(_fill(template, {}, _ranges(key_map, config), 1))


def _ranges(key_map: KeyMap, config: TransformerConfig) -> Ranges:
    ranges: Ranges = {
        "i": [(str(i), str(i)) for i in range(config.num_layers)],
        "e": [(f"_{e}" if e else "", str(e)) for e in range(config.num_experts)],
        "kind": [("weight", "weight"), ("bias", "bias")],
    }
    for name, values in key_map.ranges.items():
        ranges[name] = [(str(v[0]), str(v[1])) if isinstance(v, tuple) else (str(v), str(v)) for v in values(config)]
    return ranges


def _expand_rule(rule: Rule, ranges: Ranges) -> Iterator[Group]:
    ours, theirs = _as_tuple(rule.ours), _as_tuple(rule.theirs)
    shared = sorted(_placeholders(ours) & _placeholders(theirs))
    for values in itertools.product(*(ranges[name] for name in shared)):
        chosen = dict(zip(shared, values, strict=True))
        yield Group(
            tuple(name for template in ours for name in _fill(template, chosen, ranges, 0)),
            tuple(name for template in theirs for name in _fill(template, chosen, ranges, 1)),
            rule.transform,
        )


def _fill(template: str, chosen: Mapping[str, tuple[str, str]], ranges: Ranges, side: int) -> Iterator[str]:
    """Fill one template; placeholders that are not chosen yet take all their values, in order."""
    free = [name for name in dict.fromkeys(_PLACEHOLDER.findall(template)) if name not in chosen]
    for values in itertools.product(*(ranges[name] for name in free)):
        texts = {name: pair[side] for name, pair in {**chosen, **dict(zip(free, values, strict=True))}.items()}
        yield _PLACEHOLDER.sub(lambda match, texts=texts: texts[match[1]], template)  # type: ignore[misc]


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _placeholders(templates: Iterable[str]) -> set[str]:
    return {name for template in templates for name in _PLACEHOLDER.findall(template)}
