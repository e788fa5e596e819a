"""Our own folders: `model_config.json`, which SAT reads too, and `model.safetensors`; mixins are rebuilt from them."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sat_lightning.checkpoint.files import MAX_SHARD_SIZE, write_json, write_weights
from sat_lightning.checkpoint.migrate import FORMAT_VERSION
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, SatError
from sat_lightning.model import BaseMixin, BaseModel

CONFIG_NAME = "model_config.json"
FORMAT_KEYS = ("format_version", "added_mixins", "removed_mixins")
"""What model_config.json holds beside the configuration."""

_MODEL_CONFIG = {"is": "the model's config"}


def save_pretrained(model: BaseModel, folder: str | os.PathLike[str], *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Write a model folder; each file appears whole, or not at all.

    Args:
        model: any model; tensors that share memory are written once for each name. Mixins that were added to it, and
            their own settings, are recorded, and so are those of its class that were removed.
        folder: made where it is missing; files of these names in it are replaced.
        max_shard_size: bytes above which the weights are written in several files and an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, model.state_dict().items(), max_shard_size)
    write_json(folder / CONFIG_NAME, describe(model))


def describe(model: BaseModel) -> dict[str, Any]:
    """Return what `model_config.json` says of a model."""
    added, removed = _compare_mixins(model)
    values = model.config.to_dict(model_class=type(model).__name__)
    return values | {"format_version": FORMAT_VERSION, "added_mixins": added, "removed_mixins": removed}


def rebuild_mixins(model: BaseModel, values: Mapping[str, Any], what: str) -> None:
    """Remove and add what a folder says, in its order.

    Args:
        model: freshly built.
        values: of `model_config.json`.
        what: the file, for messages.

    Raises:
        CheckpointError: if a mixin's class or settings are not known here.
    """
    for name in values.get("removed_mixins", ()):
        model.del_mixin(name)
    for entry in values.get("added_mixins", ()):
        if entry["init_args"] is None:
            raise CheckpointError(
                f"{what}: mixin '{entry['name']}' ({entry['class_path']}) was built with {entry['unrecorded']}, which "
                "no file can hold. Build the model with from_pretrained(..., build_only=True), add the mixin yourself, "
                "and load with load_checkpoint(model, folder)."
            )
        mixin_class = _find_mixin(entry["class_path"], entry["name"], what)
        settings: dict[str, Any] = {
            k: model.config if v == _MODEL_CONFIG else _decode(v) for k, v in entry["init_args"].items()
        }
        positional: list[Any] = settings.pop("*", [])
        model.add_mixin(entry["name"], mixin_class(*positional, **settings))


def _compare_mixins(model: BaseModel) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the mixins that the class does not build itself, and those it builds that are gone."""
    try:
        with torch.device("meta"):
            own = {name: type(mixin) for name, mixin in type(model)(model.config).mixins.items()}
    except (TypeError, SatError):  # a class that is not built from its configuration alone: nothing can rebuild it
        return [], []
    present, waiting, kept = list(model.mixins.items()), list(own.items()), []
    while present and (entry := (present[0][0], type(present[0][1]))) in waiting:
        waiting = waiting[waiting.index(entry) + 1 :]  # the order is part of the behaviour
        kept.append(present.pop(0)[0])
    return [_record(name, mixin, model.config) for name, mixin in present], [n for n in own if n not in kept]


def _record(name: str, mixin: Any, config: TransformerConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "class_path": f"{type(mixin).__module__}.{type(mixin).__qualname__}"}
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
        encoded = {
            k: _MODEL_CONFIG if isinstance(v, TransformerConfig) and v == config else _encode(v)
            for k, v in settings.items()
        }
    except TypeError as error:
        return entry | {"init_args": None, "unrecorded": str(error)}
    return entry | {"init_args": encoded}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(one) for key, one in value.items()}
    if isinstance(value, torch.dtype):
        return {"is": str(value)}
    raise TypeError(f"a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"is"} and isinstance(value["is"], str):
        return getattr(torch, value["is"].removeprefix("torch."))
    if isinstance(value, dict):
        return {key: _decode(one) for key, one in value.items()}
    return [_decode(one) for one in value] if isinstance(value, list) else value


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


def _subclasses(cls: type[BaseMixin]) -> Iterator[type[BaseMixin]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
