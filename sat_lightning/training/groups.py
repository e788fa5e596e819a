"""Parameter groups: which parameters decay, how fast each one learns, and the names under which its rate is logged."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sat_lightning.errors import ConfigError, nearest

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)??)(?:layers?|blocks?|h)\.(?P<index>\d+)\.")
_MIXIN = re.compile(r"(?:^|\.)mixins\.")
_EMBEDDING = re.compile(r"embed|cls_token|mask_token")
_EMBEDDINGS, _TOP = -1.0, math.inf


@dataclass(frozen=True, kw_only=True)
class ParameterRule:
    r"""What holds for some parameters: those whose name matches, whose module is of a type, or both.

    Of several rules that fit a parameter the first one counts.

    Raises:
        ConfigError: nothing says which parameters are meant, or the rule contradicts itself.
    """

    match: str | None = None
    r"""Regular expression, searched for anywhere in a parameter's name: `^mixins\.` is every mixin."""
    module_type: str | None = None
    """Name of a class: parameters inside such a module, or one derived from it (`Embedding`, `LoraMixin`)."""
    name: str | None = None
    """Name of the group in logs. Default: the words of `match`, or `module_type`."""
    lr_scale: float = 1.0
    """Factor to the learning rate."""
    weight_decay: float | None = None
    """Weight decay of all these parameters, norms and biases too. Default: as without the rule."""
    frozen: bool = False
    """The parameters do not train."""

    def __post_init__(self) -> None:
        """Refuse a rule that says nothing or too much."""
        if self.match is None and self.module_type is None:
            raise ConfigError("optim.groups: a rule needs match, a pattern of names, or module_type, a class name.")
        try:
            re.compile(self.match or "")
        except re.error as error:
            raise ConfigError(f"optim.groups: '{self.match}' is no regular expression: {error}.") from error
        if not self.lr_scale > 0:
            raise ConfigError(
                f"optim.groups: {self}: lr_scale is {self.lr_scale}, it must be above 0; frozen: true trains nothing."
            )
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError(f"optim.groups: {self}: weight_decay is {self.weight_decay}, it cannot be negative.")
        if self.frozen and (self.lr_scale != 1.0 or self.weight_decay is not None):
            raise ConfigError(
                f"optim.groups: {self} is frozen, so lr_scale and weight_decay have no effect. Drop them."
            )

    def __str__(self) -> str:
        """Name the rule by what it looks for."""
        return f"rule '{self.match or self.module_type}'"

    @property
    def label(self) -> str:
        """Name of the group in logs."""
        words = re.sub(r"\\.", ".", self.match) if self.match else ""
        return self.name or re.sub(r"[^\w-]+", ".", words).strip(".") or self.module_type or "rule"


@dataclass(kw_only=True)
class _Entry:
    """One parameter, under all its names, and the classes of all modules around it."""

    parameter: nn.Parameter
    names: list[str] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    decays: bool = True

    def fits(self, rule: ParameterRule) -> bool:
        by_name = rule.match is None or any(re.search(rule.match, name) for name in self.names)
        return by_name and (rule.module_type is None or rule.module_type in self.types)


def _entries(module: nn.Module, prefix: str = "") -> list[_Entry]:
    entries: dict[int, _Entry] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        # Under ZeRO-3 a parameter is an empty shell here, its true shape stands beside it.
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        entry = entries.setdefault(id(parameter), _Entry(parameter=parameter))
        entry.names.append(name.removeprefix(prefix))
        if name.endswith("bias") or num_dimensions <= 1 or getattr(parameter, "no_weight_decay", False):
            entry.decays = False
    for child in module.modules():
        is_norm = "norm" in type(child).__name__.lower()
        types = {base.__name__ for base in type(child).__mro__}
        for parameter in child.parameters():
            entries[id(parameter)].types |= types
        if is_norm:
            for parameter in child.parameters(recurse=False):
                entries[id(parameter)].decays = False
    return list(entries.values())


def split_parameters(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Part the trainable parameters into those that weight decay shrinks and those that it leaves.

    Everything in a norm, every bias and all else that is one-dimensional (scales, gates) does not decay, nor does a
    parameter whose attribute `no_weight_decay` is true. A parameter that several modules share is listed once.

    Args:
        module: its parameters with `requires_grad`.

    Returns:
        Parameters by name: the decayed, the others.
    """
    trained = [entry for entry in _entries(module) if entry.parameter.requires_grad]
    decay = {entry.names[0]: entry.parameter for entry in trained if entry.decays}
    return decay, {entry.names[0]: entry.parameter for entry in trained if not entry.decays}


def freeze_by_rules(model: nn.Module, rules: Sequence[ParameterRule]) -> None:
    """Freeze what the frozen rules fit; it has to happen before a strategy wraps the model.

    Args:
        model: changed in place.
        rules: see `group_parameters`; those that freeze nothing count only where they come first.

    Raises:
        ConfigError: a frozen rule fits nothing, or nothing would train.
    """
    entries = _entries(model)
    # The other rules may be for parameters beside the model, which are not here.
    chosen = _choose(entries, rules, checked=[rule for rule in rules if rule.frozen])
    for entry, index in zip(entries, chosen, strict=True):
        if index is not None and rules[index].frozen:
            entry.parameter.requires_grad_(False)
    if any(rule.frozen for rule in rules) and not any(entry.parameter.requires_grad for entry in entries):
        raise ConfigError("optim.groups: the frozen rules leave nothing to train.")


def group_parameters(
    module: nn.Module, rules: Sequence[ParameterRule] = (), layer_decay: float = 1.0, prefix: str = ""
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: `decay`, and `no_decay` whose `weight_decay` is 0.

    With rules and layer-wise decay there is a pair for each of their parts, `mixins/decay`, `layer_03/no_decay`. Each
    group holds its `lr_scale`, see `scale_learning_rates`; a parameter's own attribute `lr_scale` counts too.

    Layer-wise learning-rate decay (Clark et al. 2020, ELECTRA; Bao et al. 2021, BEiT) multiplies the rate by
    `layer_decay` for every layer that lies above: 1 at the top (head, last norm, mixins), `layer_decay` in the last
    layer, and so down to the embeddings. Two stacks, an encoder and a decoder, are counted each by itself.

    Args:
        module: see `split_parameters`.
        rules: of several that fit a parameter the first one counts.
        layer_decay: factor of the learning rate from layer to layer.
        prefix: left out of names where they begin so; `model.` gives a task's parameters the names of its model.

    Returns:
        The groups that are not empty.

    Raises:
        ConfigError: nothing is trainable, a rule fits nothing, or `layer_decay` finds no layers.
    """
    entries = _entries(module, prefix)
    layers = _layer_scales(entries, layer_decay) if layer_decay != 1 else None
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry, index in sorted(
        zip(entries, _choose(entries, rules, rules), strict=True), key=lambda pair: not pair[0].decays
    ):
        rule = rules[index] if index is not None else None
        if not entry.parameter.requires_grad or (rule and rule.frozen):
            continue
        own_scale = float(getattr(entry.parameter, "lr_scale", 1.0))
        layer, layer_scale = layers[id(entry.parameter)] if layers else ("", 1.0)
        weight_decay = rule.weight_decay if rule and rule.weight_decay is not None else None if entry.decays else 0.0
        words = [rule.label if rule else "", layer, f"scale_{own_scale:g}" if own_scale != 1 else ""]
        label = "/".join([*filter(None, words), "no_decay" if weight_decay == 0 else "decay"])
        group: dict[str, Any] = {
            "name": label,
            "params": [],
            "lr_scale": own_scale * layer_scale * (rule.lr_scale if rule else 1.0),
            **({} if weight_decay is None else {"weight_decay": weight_decay}),
        }
        groups.setdefault((index, label), group)["params"].append(entry.parameter)
    if not groups:
        raise ConfigError("No parameter is trainable, so there is nothing to optimize. Loosen trainable or frozen.")
    _check_names([group["name"] for group in groups.values()])
    return list(groups.values())


def scale_learning_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Multiply each group's learning rate by its `lr_scale`.

    Args:
        groups: of an optimizer that has just been built; changed in place.
    """
    for group in groups:
        if group.get("lr_scale", 1.0) != 1:  # some optimizers find a rate of their own, and have None there
            group["lr"] = group["lr"] * group["lr_scale"]


def _choose(
    entries: Sequence[_Entry], rules: Sequence[ParameterRule], checked: Sequence[ParameterRule]
) -> list[int | None]:
    """Return for each parameter which rule counts, if any, and refuse checked rules that have no effect."""
    fitting = [[index for index, rule in enumerate(rules) if entry.fits(rule)] for entry in entries]
    chosen = [min(indices, default=None) for indices in fitting]
    for index, rule in enumerate(rules):
        taken = [entry for entry, choice in zip(entries, chosen, strict=True) if choice == index]
        if rule not in checked or (taken and (rule.frozen or any(e.parameter.requires_grad for e in taken))):
            continue
        if taken:
            raise ConfigError(f"optim.groups: {rule} fits only parameters that do not train. Drop it or loosen frozen.")
        if any(index in indices for indices in fitting):
            raise ConfigError(f"optim.groups: {rule} comes too late: earlier rules take all that it fits. Move it up.")
        raise ConfigError(f"optim.groups: {rule} matches no parameter.{_guess(rule, entries)}")
    return chosen


def _guess(rule: ParameterRule, entries: Sequence[_Entry]) -> str:
    if rule.module_type is not None and not any(rule.module_type in entry.types for entry in entries):
        return nearest(rule.module_type, sorted(set().union(*(entry.types for entry in entries))))
    names = [name for entry in entries for name in entry.names]
    words = {".".join(name.split(".")[:n]) for name in names for n in range(1, 1 + name.count("."))}
    words |= {word for name in names for word in name.split(".") if not word.isdigit()}
    return nearest((rule.match or "").replace("\\", "").strip("^$"), [*sorted(words), *names])


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"optim.groups: two groups are called '{name}'. Give one of the rules a name of its own.")


def _layer_scales(entries: Sequence[_Entry], layer_decay: float) -> dict[int, tuple[str, float]]:
    """Return for each parameter, by its id, the name of its layer and the factor to its learning rate."""
    # A parameter that is both embedding and head is an embedding.
    places = {id(entry.parameter): min(map(_place, entry.names)) for entry in entries}
    depths: dict[str, float] = {}
    for index, stack in places.values():
        if _EMBEDDINGS < index < _TOP:
            depths[stack] = max(depths.get(stack, 0), index + 1)
    if not depths:
        raise ConfigError(
            f"optim: layer_decay is {layer_decay}, and no parameter is in a layer (layers.0., blocks.0.). Set it to 1."
        )
    deepest = max(depths.values())
    width = max(2, len(f"{deepest - 1:.0f}"))
    scales = {}
    for key, (index, stack) in places.items():
        owner = stack if len(depths) > 1 else ""
        label = (
            "top" if index == _TOP else "embeddings" if index == _EMBEDDINGS else f"{owner}layer_{index:0{width}.0f}"
        )
        scales[key] = label, 1.0 if index == _TOP else layer_decay ** (depths.get(stack, deepest) - index)
    return scales


def _place(name: str) -> tuple[float, str]:
    """Return the layer of a parameter and the stack that the layer is in; a mixin is on top, as new weights are."""
    layer = None if _MIXIN.search(name) else _LAYER.match(name)
    if layer:
        return float(layer["index"]), layer["stack"]
    return (_EMBEDDINGS if _EMBEDDING.search(name) else _TOP), ""
