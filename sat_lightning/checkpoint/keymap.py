"""Reads the tables of `sat_lightning.model.keymap` in both directions, by names first and bytes last.

`plan_import` and `plan_export` look at names only and fail before anything is read if one would be lost; the plan then
gives one tensor after the other, so that a whole checkpoint is never held twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.report import matches, some
from sat_lightning.checkpoint.templates import Group, expand, fill_theirs
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError
from sat_lightning.model.keymap import Copies, KeyMap, Same


@dataclass
class Plan:
    """What is read from where; `read` and `write` give the target's names and tensors, one after the other."""

    groups: list[Group]
    config: TransformerConfig
    layout: dict[str, Any]
    """What a file leaves to choice, as JSON: `without_prefix`, `legacy_suffixes`, `legacy_parts`, `tied` (names written
    although they could be left out), `buffers` (name template -> dtype). Written files repeat it."""
    files: dict[str, str] = field(default_factory=dict)
    """Name in the table -> name in the file, where they differ."""
    tied: dict[str, str] = field(default_factory=dict)
    """Names of theirs that equal another one, in the table's names."""
    buffers: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Names of theirs whose values are known -> template and value."""
    unread: set[str] = field(default_factory=set)
    """Names of theirs that nothing asks for."""
    unfilled: set[str] = field(default_factory=set)
    """Names of ours that nothing fills."""
    is_untied: bool = False
    """Whether `write` met a pair that the configuration ties and the weights do not."""

    def read(
        self, source: Mapping[str, Tensor], what: str, copied: Mapping[str, Tensor] | None = None
    ) -> ImportedTensors:
        """Return our tensors from a file of theirs.

        Args:
            source: their tensors by name; each is asked for when its turn comes.
            what: the file, for messages.
            copied: the same, for tensors that change their layout. Default: `source`.

        Raises:
            CheckpointError: if a redundant tensor says something else than the one it should equal, now; later, when a
                tensor is asked for and has a shape that its rule cannot use.
        """
        for name, (template, value) in self.buffers.items():
            found = source[self.files.get(name, name)]
            self.layout.setdefault("buffers", {})[template] = str(found.dtype).removeprefix("torch.")
            if found.shape != value.shape or not torch.equal(found, value.to(found.dtype)):
                raise CheckpointError(
                    f"{what}: '{name}' is not what the configuration makes of it. Remove it, if stale."
                )
        for name, other in self.tied.items():
            if not torch.equal(source[self.files.get(name, name)], source[self.files.get(other, other)]):
                raise CheckpointError(
                    f"{what}: '{name}' and '{other}' differ, though its configuration ties them. Set "
                    "tie_word_embeddings to false in its config.json, or remove the one that is stale."
                )
        return ImportedTensors(self, source, source if copied is None else copied, what)

    def write(self, source: Mapping[str, Tensor], what: str) -> Iterator[tuple[str, Tensor]]:
        """Yield their names and tensors from a state dict of ours; see `read`."""
        held: dict[str, Tensor] = {}
        for group in self.groups:
            tensors = _apply(group, "to_hf", [source[name] for name in group.ours], self.config, what)
            for name, tensor in zip(group.theirs, tensors, strict=True):
                if name in self.tied or name in self.tied.values():
                    held[name] = tensor
                if name not in self.tied:
                    yield self.files.get(name, name), tensor
        pairs = {name: other for name, other in self.tied.items() if other in held}
        # One pair that differs unties all: transformers then fills none from its other half.
        self.is_untied |= any(n in held and not torch.equal(held[n], held[other]) for n, other in pairs.items())
        for name, other in pairs.items():
            if name in self.layout.get("tied", ()) or self.is_untied:
                yield self.files.get(name, name), held.get(name, held[other]).clone()
        for name, (_, value) in self.buffers.items():
            yield self.files.get(name, name), value


class ImportedTensors(Mapping[str, Tensor]):
    """Our tensors, each made from theirs when it is asked for; those of one rule are made together."""

    def __init__(self, plan: Plan, source: Mapping[str, Tensor], copied: Mapping[str, Tensor], what: str) -> None:
        self._plan, self._source, self._copied, self._what = plan, source, copied, what
        self._places = {name: group for group in plan.groups for name in group.ours}
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            group, files = self._places[name], self._plan.files
            source = self._source if isinstance(group.transform, Same) else self._copied
            tensors = [source[files.get(theirs, theirs)] for theirs in group.theirs]
            made = _apply(group, "from_hf", tensors, self._plan.config, self._what)
            self._made = dict(zip(group.ours, made, strict=True))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def plan_import(
    key_map: KeyMap,
    source: Collection[str],
    config: TransformerConfig,
    target: Collection[str],
    *,
    what: str = "the source",
    is_tied: bool = True,
    ignore: Sequence[str] = (),
    may_miss: Sequence[str] = (),
    strict: bool = True,
) -> Plan:
    """Plan the reading of a Hugging Face file.

    Args:
        key_map: the family's table.
        source: names in the file.
        config: our configuration.
        target: names of our state dict.
        what: the file, for messages.
        is_tied: whether the file's configuration ties the pairs of `key_map.tied`.
        ignore: names of theirs, with `*`, that are left unread on purpose.
        may_miss: names of ours, with `*`, that may stay unfilled.
        strict: whether gaps are an error; `unread` and `unfilled` of the plan tell them else.

    Returns:
        The plan.

    Raises:
        CheckpointError: if a source name would be unread or a target name unfilled; both lists are in the message.
    """
    groups = expand(key_map, config)
    plan = Plan([], config, {})
    known = {name for group in groups for name in group.theirs} | key_map.pairs(True).keys()
    known |= {name for template in key_map.buffers for name in fill_theirs(template, key_map, config)}
    read = [name for name in source if not matches(name, (*ignore, *key_map.unused))]
    present = {_table_name(name, key_map, known, plan.layout): name for name in read}
    plan.files = {name: actual for name, actual in present.items() if name != actual}
    unread, unfilled = set(present), {n for n in target if not matches(n, (*key_map.derived, *may_miss))}
    unread -= _plan_buffers(plan, key_map, present)
    unread -= _plan_ties(plan, key_map.pairs(is_tied), present)
    for group in groups:
        if all(name in present for name in group.theirs) and all(name in target for name in group.ours):
            plan.groups.append(group)
            unread.difference_update(group.theirs)
            unfilled.difference_update(group.ours)
    plan.unread, plan.unfilled = {present[name] for name in unread}, unfilled
    if strict and (unread or unfilled):
        raise CheckpointError(_describe_failure(what, key_map, plan.unread, unfilled))
    return plan


def _plan_buffers(plan: Plan, key_map: KeyMap, present: Mapping[str, str]) -> set[str]:
    """Note the buffers that a file carries; returns their names."""
    for template, make in key_map.buffers.items():
        if names := [name for name in fill_theirs(template, key_map, plan.config) if name in present]:
            plan.buffers |= dict.fromkeys(names, (template, make(plan.config)))
    return set(plan.buffers)


def _plan_ties(plan: Plan, pairs: Mapping[str, str], present: dict[str, str]) -> set[str]:
    """Let one half of a tied pair stand for the other; returns names that need no rule."""
    done = set()
    for name, other in pairs.items():
        if name in present and other in present:
            plan.tied[name] = other
            done.add(name)
        elif other in present:
            plan.files[name] = present[name] = present[other]
        elif name in present:
            plan.files[other] = present[other] = present[name]
            done.add(name)
    if plan.tied:
        plan.layout["tied"] = sorted(plan.tied)
    return done


def plan_export(
    key_map: KeyMap,
    source: Collection[str],
    config: TransformerConfig,
    *,
    layout: Mapping[str, Any] | None = None,
    is_tied: bool = True,
    what: str = "the model",
    ignore: Sequence[str] = (),
) -> Plan:
    """Plan the writing of a Hugging Face file.

    Args:
        key_map: the family's table.
        source: names of our state dict.
        config: our configuration.
        layout: choices of the file that the model came from. Default: today's names, ties left out.
        is_tied: whether the configuration ties the pairs of `key_map.tied`.
        what: the model, for messages.
        ignore: names of ours, with `*`, that are left out on purpose.

    Returns:
        The plan.

    Raises:
        CheckpointError: if one of our tensors has no place in the file.
    """
    groups = _largest([group for group in expand(key_map, config) if all(name in source for name in group.ours)])
    plan = Plan(groups, config, dict(layout or {}), tied=key_map.pairs(is_tied))
    unread = {name for name in source if not matches(name, (*key_map.derived, *ignore))}
    unread -= {name for group in groups for name in group.ours}
    if unread:
        raise CheckpointError(_describe_failure(what, key_map, unread, set()))
    for template, dtype in plan.layout.get("buffers", {}).items():
        value = key_map.buffers[template](config).to(getattr(torch, dtype))
        plan.buffers |= dict.fromkeys(fill_theirs(template, key_map, config), (template, value))
    filled = {name for group in groups for name in group.theirs}
    plan.buffers |= {name: (name, make(config)) for name, make in key_map.fills.items() if name not in filled}
    names = [name for group in groups for name in group.theirs] + [*plan.buffers, *plan.tied]
    plan.files = {name: _file_name(name, key_map, plan.layout) for name in names}
    return plan


def _largest(groups: list[Group]) -> list[Group]:
    """Leave out groups that are part of another: `wi` where a gate is there too, and theirs are `wi_0` and `wi_1`."""
    larger: dict[str, Group] = {name: group for group in groups if len(group.ours) > 1 for name in group.ours}
    return [group for group in groups if not (len(group.ours) == 1 and group.ours[0] in larger)]


def _table_name(name: str, key_map: KeyMap, known: Collection[str], layout: dict[str, Any]) -> str:
    """Return what today's table calls a name of a file, and note in `layout` how the file differs."""
    if name in known:
        return name
    for old, new in key_map.legacy_suffixes.items():
        if name.endswith(old) and name not in known:
            candidate = name.removesuffix(old) + new
            if candidate in known or key_map.prefix + candidate in known:
                layout.setdefault("legacy_suffixes", [])
                if old not in layout["legacy_suffixes"]:
                    layout["legacy_suffixes"].append(old)
                name = candidate
                break
    for old, new in key_map.legacy_parts.items():
        if (candidate := name.replace(old, new)) != name and candidate in known:
            layout["legacy_parts"] = sorted({old, *layout.get("legacy_parts", ())})
            name = candidate
    if name not in known and key_map.prefix and key_map.prefix + name in known:
        layout["without_prefix"] = True
        return key_map.prefix + name
    return name


def _file_name(name: str, key_map: KeyMap, layout: Mapping[str, Any]) -> str:
    """Undo `_table_name`."""
    if layout.get("without_prefix"):
        name = name.removeprefix(key_map.prefix)
    for old in layout.get("legacy_parts", ()):
        name = name.replace(key_map.legacy_parts[old], old)
    for old in layout.get("legacy_suffixes", ()):
        new = key_map.legacy_suffixes[old]
        # Old files spelt only the norms so; the suffix map says which names it means by their whole end.
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def _apply(group: Group, direction: str, tensors: list[Tensor], config: TransformerConfig, what: str) -> list[Tensor]:
    try:
        if direction == "to_hf" and isinstance(group.transform, Copies):
            if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
                raise ValueError("they are one tensor there, and differ here")
        return [tensor.contiguous() for tensor in getattr(group.transform, direction)(tensors, config)]
    except (RuntimeError, IndexError, ValueError) as error:
        names, targets = (group.theirs, group.ours) if direction == "from_hf" else (group.ours, group.theirs)
        shapes = ", ".join(f"'{n}' {list(t.shape)}" for n, t in zip(names, tensors, strict=True))
        raise CheckpointError(f"{what}: {shapes} cannot become {', '.join(targets)}: {error}.") from error


def _describe_failure(what: str, key_map: KeyMap, unread: Collection[str], unfilled: Collection[str]) -> str:
    return (
        f"{what}: the map of '{key_map.model_type}' leaves {len(unread)} names of the source unread "
        f"({some(sorted(unread), 20)}) and {len(unfilled)} of the target unfilled ({some(sorted(unfilled), 20)}). "
        "Check that the configuration is that of these weights; name what may be left in `ignore` and `may_miss`."
    )
