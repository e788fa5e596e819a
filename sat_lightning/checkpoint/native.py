"""Our own folders: `model_config.json`, which SAT reads too, and `model.safetensors`; mixins are rebuilt from them."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from sat_lightning.checkpoint.building import NoRandomFill
from sat_lightning.checkpoint.files import MAX_SHARD_SIZE, write_json, write_weights
from sat_lightning.checkpoint.migrate import FORMAT_VERSION
from sat_lightning.checkpoint.report import some
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.quantized import is_quantized
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.model import BaseMixin, ComposedModel
from sat_lightning.model.composed import owner_of
from sat_lightning.model.registry import AnyModel
from sat_lightning.models import find_family

T = TypeVar("T")
CONFIG_NAME = "model_config.json"
FORMAT_KEYS = ("format_version", "added_mixins", "removed_mixins", "parts")
"""What model_config.json holds beside the configuration."""

_MODEL_CONFIG = {"is": "the model's config"}
_SWITCHES = {"enabled": True, "scale": 1.0}
"""What a method of fine-tuning has beside its settings, and its usual value, which is not written."""


def save_pretrained(model: AnyModel, folder: str | os.PathLike[str], *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Write a model folder; each file appears whole, or not at all.

    Args:
        model: any model; tensors that share memory are written once for each name. Mixins that were added to it, and
            their own settings, are recorded, and so are those of its class that were removed.
        folder: made where it is missing; files of these names in it are replaced.
        max_shard_size: bytes above which the weights are written in several files and an index.

    Raises:
        CheckpointError: if linears are in 4 bits.
    """
    refuse_quantized(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, model.state_dict().items(), max_shard_size)
    write_json(folder / CONFIG_NAME, describe(model))


def refuse_quantized(model: AnyModel) -> None:
    """Refuse to write a model whose linears are in 4 bits.

    Raises:
        CheckpointError: with the cure.
    """
    if names := [name for name, module in model.named_modules() if hasattr(module, "weight") and is_quantized(module)]:
        raise CheckpointError(
            f"{some(names)}: in 4 bits, which a model folder does not hold. Save what was trained by save_adapter, or "
            "make a plain model by `sat-lightning merge`, or by sat_lightning.mixins.dequantize_base(model)."
        )


def describe(model: AnyModel) -> dict[str, Any]:
    """Return what `model_config.json` says of a model."""
    values = model.config.to_dict(model_class=type(model).__name__) | {"format_version": FORMAT_VERSION}
    if parts := _part_names(type(model)):
        own: dict[str, Any] = {}
        values["parts"] = {name: describe(getattr(model, name)) for name in parts}
    else:
        own = _own_mixins(model)
    present, waiting, kept = [] if parts else all_mixins(model), list(own.items()), []
    while present and (entry := (present[0][0], type(present[0][1]))) in waiting:
        waiting = waiting[waiting.index(entry) + 1 :]  # the order is part of the behaviour
        kept.append(present.pop(0)[0])
    return values | {
        "added_mixins": [record_mixin(name, mixin, owner_of(model, name).config) for name, mixin in present],
        "removed_mixins": [name for name in own if name not in kept],
    }


def build(model_class: type[AnyModel], config: TransformerConfig, values: Mapping[str, Any], what: str) -> AnyModel:
    """Build a model as a folder says, without its weights.

    Args:
        model_class: the class; another one than the folder names gets none of the folder's mixins.
        config: of the model.
        values: of `model_config.json`.
        what: the file, for messages.

    Returns:
        The model.

    Raises:
        CheckpointError: if a mixin's class or settings are not known here.
    """
    if "parts" in values:
        parts: dict[str, Any] = {name: build_described(part, what) for name, part in values["parts"].items()}
        return model_class(**parts)
    model = model_class(config)
    if values.get("model_class") == model_class.__name__:
        _rebuild_mixins(model, values, what)
    return model


def build_described(values: Mapping[str, Any], what: str) -> AnyModel:
    """Build the model that `describe` described."""
    model_class = find_family(values["model_class"])
    fields = {key: value for key, value in values.items() if key not in FORMAT_KEYS}
    return build(model_class, model_class.config_class.from_dict(fields), values, what)


def _part_names(model_class: type[AnyModel]) -> list[str]:
    """Return the models that a class is built from, if it is not built from a configuration."""
    names = list(inspect.signature(model_class).parameters)
    return names if issubclass(model_class, ComposedModel) and "config" not in names else []


def _own_mixins(model: AnyModel) -> dict[str, type[BaseMixin]]:
    """Return the mixins that the class builds by itself."""
    try:
        with NoRandomFill():
            return {name: type(mixin) for name, mixin in all_mixins(type(model)(model.config))}
    except TypeError:  # it asks for more than a configuration, so only the caller can build it
        return {name: type(mixin) for name, mixin in all_mixins(model)}


def all_mixins(model: AnyModel) -> list[tuple[str, BaseMixin]]:
    """Return the mixins of a model, those of a part as `<part>.<name>`."""
    if isinstance(model, ComposedModel):
        return [(f"{part}.{n}", mixin) for part, inner in model.parts.items() for n, mixin in all_mixins(inner)]
    return list(model.mixins.items())  # type: ignore[arg-type]


def _rebuild_mixins(model: AnyModel, values: Mapping[str, Any], what: str) -> None:
    """Remove and add what a folder says, in its order."""
    for name in values.get("removed_mixins", ()):
        model.del_mixin(name)
    for entry in values.get("added_mixins", ()):
        model.add_mixin(entry["name"], build_mixin(entry, owner_of(model, entry["name"]).config, what))


def build_mixin(entry: Mapping[str, Any], config: TransformerConfig, what: str) -> BaseMixin:
    """Build the mixin that `record_mixin` described, without its weights.

    Args:
        entry: the description.
        config: of the model that is to hold it.
        what: the file, for messages.

    Returns:
        The mixin.

    Raises:
        CheckpointError: if its class or settings are not known here.
    """
    if entry["init_args"] is None:
        raise CheckpointError(
            f"{what}: mixin '{entry['name']}' ({entry['class_path']}) was built with {entry['unrecorded']}, which "
            "no file can hold. Build the model with from_pretrained(..., build_only=True), add the mixin yourself, "
            "and load with load_checkpoint(model, folder)."
        )
    mixin_class = _find_mixin(entry["class_path"], entry["name"], what)
    recorded = entry["init_args"].items()
    settings: dict[str, Any] = {k: config if v == _MODEL_CONFIG else _decode(v, what) for k, v in recorded}
    positional: list[Any] = []
    if "*" in settings:  # all that stand before it go by position too
        names = list(settings)
        positional = [settings.pop(name) for name in names[: names.index("*")]] + settings.pop("*")
    mixin = mixin_class(*positional, **settings)
    for switch in _SWITCHES.keys() & entry.keys():
        setattr(mixin, switch, entry[switch])
    if isinstance(mixin, TuningMixin):
        mixin.wanted_id = entry.get("adapter_id", 0)
    return mixin


def record_mixin(name: str, mixin: Any, config: TransformerConfig) -> dict[str, Any]:
    """Describe a mixin of a model of that configuration: its name, class, settings and switches."""
    entry: dict[str, Any] = {"name": name, "class_path": f"{type(mixin).__module__}.{type(mixin).__qualname__}"}
    if adapter_id := getattr(mixin, "adapter_id", 0):
        entry["adapter_id"] = adapter_id
    if mixin.freezes_base:
        entry |= {key: getattr(mixin, key) for key, usual in _SWITCHES.items() if getattr(mixin, key, usual) != usual}
    args, kwargs = getattr(mixin, "init_arguments", ((), {}))
    bound = inspect.signature(type(mixin)).bind(*args, **kwargs)
    settings: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = bound.signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            settings |= value
        else:
            settings["*" if kind is inspect.Parameter.VAR_POSITIONAL else key] = value
    try:
        encoded = {k: _MODEL_CONFIG if _is_config(v, config) else _encode(v) for k, v in settings.items()}
    except TypeError as error:
        return entry | {"init_args": None, "unrecorded": str(error)}
    return entry | {"init_args": encoded}


def _is_config(value: Any, config: TransformerConfig) -> bool:
    return isinstance(value, TransformerConfig) and value == config


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(one) for key, one in value.items()}
    if isinstance(value, torch.dtype):
        return {"is": str(value)}
    if isinstance(value, TransformerConfig):
        return {"is": "a config", "class": type(value).__name__, "values": value.to_dict(everything=True)}
    if isinstance(value, AnyModel):
        return {"is": "a model", "model": describe(value)}
    raise TypeError(f"a {type(value).__name__}")


def _decode(value: Any, what: str) -> Any:
    if isinstance(value, dict) and value.get("is") == "a model":
        return build_described(value["model"], what)
    if isinstance(value, dict) and value.get("is") == "a config":
        classes: list[type[TransformerConfig]] = [TransformerConfig, *_subclasses(TransformerConfig)]
        for cls in classes:
            if cls.__name__ == value["class"]:
                return cls.from_dict(value["values"])
        raise CheckpointError(f"{what}: there is no configuration class '{value['class']}'. Import its module before.")
    if isinstance(value, dict) and value.keys() == {"is"} and isinstance(value["is"], str):
        return getattr(torch, value["is"].removeprefix("torch."))
    if isinstance(value, dict):
        return {key: _decode(one, what) for key, one in value.items()}
    return [_decode(one, what) for one in value] if isinstance(value, list) else value


def _find_mixin(path: str, name: str, what: str) -> type[BaseMixin]:
    """Return a class of this package, or one the program has imported: a file must not choose what is imported."""
    module, _, attribute = path.rpartition(".")
    if module.startswith("sat_lightning."):
        found = getattr(importlib.import_module(module), attribute, None)
        if isinstance(found, type) and issubclass(found, BaseMixin):
            return found
    for cls in _subclasses(BaseMixin):
        if f"{cls.__module__}.{cls.__qualname__}" == path:
            return cls
    raise CheckpointError(
        f"{what}: mixin '{name}' is a {path}, which is not loaded. Import {module} before loading, if you trust it; a "
        "file cannot import it by itself."
    )


def _subclasses(cls: type[T]) -> Iterator[type[T]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
