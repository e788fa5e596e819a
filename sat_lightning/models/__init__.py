"""One family, one file: what differs from the plain transformer.

A family is loaded when it is first asked for; `import_families` loads all, for who must know every name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sat_lightning.model import BaseModel, find_model
from sat_lightning.model.registry import AnyModel

if TYPE_CHECKING:
    from sat_lightning.models.bert import BertModel
    from sat_lightning.models.cait import CaiT
    from sat_lightning.models.chatglm import ChatGLMModel
    from sat_lightning.models.chatglm2 import ChatGLM2Model, ChatGLM3Model, ChatGLM4Model
    from sat_lightning.models.clip import CLIP
    from sat_lightning.models.cuda2d import Cuda2dModel
    from sat_lightning.models.distill import DistillModel
    from sat_lightning.models.dpr import DPRContextEncoder, DPRQuestionEncoder, DPRReader
    from sat_lightning.models.encoder_decoder import EncoderDecoderModel
    from sat_lightning.models.eva2 import EVA2Model
    from sat_lightning.models.eva2clip import EVA2CLIPModel
    from sat_lightning.models.glm import GLMModel
    from sat_lightning.models.glm4v import GLM4VModel
    from sat_lightning.models.glm130b import GLM130B
    from sat_lightning.models.gpt2 import GPT2Model
    from sat_lightning.models.gptneo import GPTNeoModel
    from sat_lightning.models.llama import LLaMAModel
    from sat_lightning.models.mae import MAE
    from sat_lightning.models.mixtral import MixtralModel
    from sat_lightning.models.presets import PRESETS, preset
    from sat_lightning.models.roberta import RobertaModel
    from sat_lightning.models.t5 import T5Model
    from sat_lightning.models.vit import ViTModel
    from sat_lightning.models.yolos import YOLOS

__all__ = [
    "CLIP",
    "GLM130B",
    "GLM4VModel",
    "MAE",
    "PRESETS",
    "YOLOS",
    "BaseModel",
    "BertModel",
    "CaiT",
    "ChatGLM2Model",
    "ChatGLM3Model",
    "ChatGLM4Model",
    "ChatGLMModel",
    "Cuda2dModel",
    "DPRContextEncoder",
    "DPRQuestionEncoder",
    "DPRReader",
    "DistillModel",
    "EVA2CLIPModel",
    "EVA2Model",
    "EncoderDecoderModel",
    "GLMModel",
    "GPT2Model",
    "GPTNeoModel",
    "LLaMAModel",
    "MixtralModel",
    "RobertaModel",
    "T5Model",
    "ViTModel",
    "preset",
]

# The names of each module.
_LAZY = {
    "bert": "BertModel",
    "cait": "CaiT",
    "chatglm": "ChatGLMModel",
    "chatglm2": "ChatGLM2Model ChatGLM3Model ChatGLM4Model",
    "cuda2d": "Cuda2dModel",
    "clip": "CLIP",
    "distill": "DistillModel",
    "dpr": "DPRContextEncoder DPRQuestionEncoder DPRReader",
    "encoder_decoder": "EncoderDecoderModel",
    "eva2": "EVA2Model",
    "eva2clip": "EVA2CLIPModel",
    "glm": "GLMModel",
    "glm4v": "GLM4VModel",
    "glm130b": "GLM130B",
    "gpt2": "GPT2Model",
    "gptneo": "GPTNeoModel",
    "llama": "LLaMAModel",
    "mae": "MAE",
    "mixtral": "MixtralModel",
    "presets": "PRESETS preset",
    "roberta": "RobertaModel",
    "t5": "T5Model",
    "vit": "ViTModel",
    "yolos": "YOLOS",
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names.split():
            return getattr(importlib.import_module(f"sat_lightning.models.{module}"), name)
    raise AttributeError(f"module 'sat_lightning.models' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


def find_family(name: str) -> type[AnyModel]:
    """Return the model class of that name, one of ours or one that the program has registered.

    Raises:
        ConfigError: if there is none.
    """
    if name in __all__:
        return BaseModel if name == "BaseModel" else __getattr__(name)
    import_families()  # so that the refusal knows all names
    return find_model(name)


def import_families() -> None:
    """Load every family, which registers its classes by name."""
    for module in _LAZY:
        importlib.import_module(f"sat_lightning.models.{module}")
