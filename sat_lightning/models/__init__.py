"""One family, one file: what differs from the plain transformer."""

from sat_lightning.model import BaseModel
from sat_lightning.models.bert import BertModel
from sat_lightning.models.chatglm import ChatGLMModel
from sat_lightning.models.chatglm2 import ChatGLM2Model, ChatGLM3Model, ChatGLM4Model
from sat_lightning.models.distill import DistillModel
from sat_lightning.models.dpr import DPRContextEncoder, DPRQuestionEncoder, DPRReader
from sat_lightning.models.encoder_decoder import EncoderDecoderModel
from sat_lightning.models.glm import GLMModel
from sat_lightning.models.glm130b import GLM130B
from sat_lightning.models.gpt2 import GPT2Model
from sat_lightning.models.gptneo import GPTNeoModel
from sat_lightning.models.llama import LLaMAModel
from sat_lightning.models.mixtral import MixtralModel
from sat_lightning.models.roberta import RobertaModel
from sat_lightning.models.t5 import T5Model

__all__ = [
    "GLM130B",
    "BaseModel",
    "BertModel",
    "ChatGLM2Model",
    "ChatGLM3Model",
    "ChatGLM4Model",
    "ChatGLMModel",
    "DPRContextEncoder",
    "DPRQuestionEncoder",
    "DPRReader",
    "DistillModel",
    "EncoderDecoderModel",
    "GLMModel",
    "GPT2Model",
    "GPTNeoModel",
    "LLaMAModel",
    "MixtralModel",
    "RobertaModel",
    "T5Model",
]
