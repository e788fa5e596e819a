"""Model classes by name, as a `model_config.json` names them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from sat_lightning.errors import ConfigError, nearest
from sat_lightning.model.base import BaseModel
from sat_lightning.model.composed import ComposedModel

AnyModel = BaseModel | ComposedModel
ModelT = TypeVar("ModelT", bound=type[AnyModel])

_models: dict[str, type[AnyModel]] = {"BaseModel": BaseModel}


def register_model(cls: ModelT) -> ModelT:
    """Make a model class known by its name, so that checkpoints that name it find it.

    Raises:
        ConfigError: if another class has that name.
    """
    held = _models.setdefault(cls.__name__, cls)
    if held is not cls and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"A model named '{cls.__name__}' is registered already, by {held.__module__}. Rename one.")
    _models[cls.__name__] = cls
    return cls


def registered_models() -> Mapping[str, type[Any]]:
    """Return every registered class by its name."""
    return MappingProxyType(_models)


def find_model(name: str) -> type[Any]:
    """Return the class of that name.

    Raises:
        ConfigError: if there is none; the message gives the nearest one.
    """
    if name not in _models:
        raise ConfigError(f"No model class is named '{name}', known are {sorted(_models)}.{nearest(name, _models)}")
    return _models[name]
