"""How behaviour is added to a backbone."""

from sat_lightning.model.base import BaseModel
from sat_lightning.model.mixin import BaseMixin
from sat_lightning.model.registry import find_model, register_model, registered_models

__all__ = ["BaseMixin", "BaseModel", "find_model", "register_model", "registered_models"]
