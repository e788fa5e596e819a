"""How behaviour is added to a backbone."""

from sat_lightning.model.base import BaseModel
from sat_lightning.model.composed import ComposedModel
from sat_lightning.model.encoder_decoder import EncoderDecoderConfig, EncoderDecoderModel
from sat_lightning.model.mixin import BaseMixin
from sat_lightning.model.registry import AnyModel, find_model, register_model, registered_models

__all__ = [
    "AnyModel",
    "BaseMixin",
    "BaseModel",
    "ComposedModel",
    "EncoderDecoderConfig",
    "EncoderDecoderModel",
    "find_model",
    "register_model",
    "registered_models",
]
