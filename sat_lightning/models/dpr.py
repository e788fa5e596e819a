"""DPR (Karpukhin et al. 2020, arXiv:2004.04906): BERT that embeds questions and passages, and one that reads answers.

What differs from BERT:
- an embedding of token types under another name (`mixins.dpr-type`);
- no head for words: the encoders give the first token's features, the reader gives scores of where an answer starts and
  ends and of how relevant the passage is (`mixins.dpr-final`);
- GELU in its tanh form, as SAT's; Hugging Face's files need the exact one (`hidden_act="gelu"`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.mixins import TokenTypesMixin
from sat_lightning.model import BaseMixin, register_model
from sat_lightning.model.base import read_config
from sat_lightning.models.bert import BertConfig, EncoderModel
from sat_lightning.models.keymaps.bert import CONTEXT_KEY_MAPS, QUESTION_KEY_MAPS, READER_KEY_MAPS
from sat_lightning.nn import Transformer
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.mlp import gelu

Scores = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DPRConfig(BertConfig):
    """DPR's options."""

    hidden_act: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """The MLP's activation: SAT's, or the one Hugging Face's files were trained with."""
    projection_dim: int = 0
    """SAT's option; above 0 there are no weights that could project."""

    def __post_init__(self) -> None:
        """Refuse what no file holds."""
        super().__post_init__()
        if self.projection_dim:
            raise ConfigError(f"projection_dim is {self.projection_dim}; DPR here has no projection: set it to 0.")
        if self.hidden_act not in ("gelu_tanh", "gelu"):
            raise ConfigError(f"hidden_act: unknown value {self.hidden_act!r}, known are gelu_tanh, gelu.")


class FirstTokenMixin(BaseMixin):
    """Give the features of the first token: `[b, s, c]` to `[b, c]`."""

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Take them."""
        return logits[:, 0]


class ReaderHeadMixin(BaseMixin):
    """Score every token as start and end of an answer, and the whole as relevant.

    Args:
        config: gives the width.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        self.qa_outputs = Linear(config.hidden_size, 2, True, init)
        self.qa_classifier = Linear(config.hidden_size, 1, True, init)

    def final_forward(self, logits: Tensor, **kw: Any) -> Scores:
        """Return start `[b, s]`, end `[b, s]` and relevance `[b]`."""
        start, end = self.qa_outputs(logits).unbind(-1)
        return start, end, self.qa_classifier(logits[:, 0])[:, 0]


class _DPRModel(EncoderModel):
    config_class: ClassVar[type[TransformerConfig]] = DPRConfig
    config: DPRConfig

    def __init__(self, config: DPRConfig, transformer: Transformer | None = None, **transformer_overrides: Any) -> None:
        config = read_config(config, DPRConfig)
        own = {"activation_func": F.gelu if config.hidden_act == "gelu" else gelu}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        self.add_mixin("dpr-type", TokenTypesMixin(self.config, self.config.num_types))
        self.add_mixin("dpr-final", self.make_head())

    def make_head(self) -> BaseMixin:
        """Return what turns hidden states into the result."""
        return FirstTokenMixin()


@register_model
class DPRQuestionEncoder(_DPRModel):
    """Embed a question: `model(input_ids)[0]` is `[b, c]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    key_maps = QUESTION_KEY_MAPS


@register_model
class DPRContextEncoder(_DPRModel):
    """Embed a passage: `model(input_ids)[0]` is `[b, c]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    key_maps = CONTEXT_KEY_MAPS


@register_model
class DPRReader(_DPRModel):
    """Find the answer in a passage: `start [b, s], end [b, s], relevance [b] = model(input_ids)[0]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    key_maps = READER_KEY_MAPS

    def make_head(self) -> BaseMixin:
        """Return the three scores."""
        return ReaderHeadMixin(self.config)
