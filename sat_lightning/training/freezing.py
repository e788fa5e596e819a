"""Which parameters train: patterns over their names."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from sat_lightning.errors import ConfigError, nearest
from sat_lightning.model import BaseModel


def freeze_parameters(
    model: nn.Module, trainable: Sequence[str] | None = None, frozen: Sequence[str] | None = None
) -> None:
    r"""Decide by name which parameters train.

    A pattern is a regular expression searched for anywhere in a parameter's name (`transformer.layers.0.mlp...`,
    `mixins.<name>...`): `^mixins\.` is every mixin. With `trainable` only what matches trains; what matches `frozen`
    never does, also inside `trainable`.

    Args:
        model: changed in place.
        trainable: patterns of what trains. Default: whatever trained before.
        frozen: patterns of what does not.

    Raises:
        ConfigError: a pattern is malformed or matches nothing, or nothing would train.
    """
    # One that several modules share has several names, and each of them means it.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if trainable is not None:
        chosen = _find("trainable", trainable, list(parameters))
        if whole := [name for name in sorted(chosen) if not parameters[name].is_floating_point()]:
            raise ConfigError(f"trainable: {whole[0]} is in 4 bits, and cannot train. Leave it out of the patterns.")
        trained = {id(parameters[name]) for name in chosen}
        for parameter in parameters.values():
            parameter.requires_grad_(id(parameter) in trained)
    for name in _find("frozen", frozen or (), list(parameters)):
        parameters[name].requires_grad_(False)
    if (trainable is not None or frozen) and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(f"trainable {list(trainable or [])} and frozen {list(frozen or [])} leave nothing to train.")


def freeze_base(model: nn.Module, added: Collection[str] = ()) -> None:
    """Freeze all that a method of fine-tuning does not train, if the model has one.

    A mixin of such a method (`freezes_base`) that is not disabled freezes the whole model, except for all mixins that
    `stays_trainable` (methods, and heads of new tasks), those in `added`, and what matches the `tuned_parameters` of a
    method in the model that holds it.

    Args:
        model: changed in place; what does not train already stays so.
        added: names of mixins, `<part>.<name>` in composed models.
    """
    mixins: list[tuple[str, BaseModel, str, Any]] = [
        (prefix, part, *item) for prefix, part in _parts(model) for item in part.mixins.items()
    ]
    methods = [(part, m) for _, part, _, m in mixins if m.freezes_base and not m._is_silent]
    if not methods:
        return
    trained: set[int] = set()
    for prefix, _, name, mixin in mixins:
        if (mixin.stays_trainable or prefix + name in added) and not mixin._is_silent:
            trained |= set(map(id, mixin.parameters()))
    for part, mixin in methods:
        trained |= set(map(id, mixin.tuned_in(part).values()))
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _parts(model: nn.Module) -> Iterator[tuple[str, BaseModel]]:
    """Yield every model that holds mixins, with the prefix of their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseModel):
            yield f"{name}." if name else "", module


def _find(option: str, patterns: Sequence[str], names: list[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ConfigError(f"{option} is the text '{patterns}', it must be a list of patterns: ['{patterns}'].")
    found = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{option}: '{pattern}' is no regular expression: {error}.") from error
        if not matches:
            words = dict.fromkeys(
                ".".join(name.split(".")[:n]) for name in names for n in range(1, 1 + name.count("."))
            )
            blocks = sorted({".".join(name.split(".")[:2]) for name in names})
            guess = nearest(pattern.replace("\\", ""), [*sorted(words), *names])
            raise ConfigError(f"{option}: '{pattern}' matches no parameter.{guess} The blocks are {', '.join(blocks)}.")
        found |= matches
    return found
