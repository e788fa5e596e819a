"""BERT (Devlin et al. 2018, arXiv:1810.04805).

What differs from the plain transformer:
- post order of the norms: layer 0's `input_layernorm` is the norm of the embeddings, `final_layernorm` the last one;
- exact GELU;
- an embedding of token types is added to the words (`mixins.bert-type`);
- the head is an MLP with weights of its own (`mixins.bert-final`);
- a mask `[b, s]` means padding, and where `pad_token_id` is known an omitted mask hides padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins import MaskedLMHeadMixin, TokenTypesMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.models.keymaps.bert import BERT_KEY_MAPS
from sat_lightning.nn import Transformer
from sat_lightning.nn.masks import MaskLike, read_padding


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """An encoder of text that may know what padding is."""

    layernorm_order: Literal["pre", "post", "sandwich"] = "post"
    """Where the norms of a layer stand; drawn in `sat_lightning.nn.layer`."""
    pad_token_id: int | None = None
    """The word that is padding: an omitted mask then hides it. Default: an omitted mask is full."""
    head_layernorm_epsilon: float = 1e-5
    """Epsilon of the norm inside the head; SAT's is this whatever `layernorm_epsilon` says."""


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """BERT's options."""

    num_types: int = 2
    """Kinds of tokens."""


class EncoderModel(BaseModel):
    """A backbone whose masks are about padding.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = EncoderConfig
    config: EncoderConfig

    def make_attention_mask(self, input_ids: Tensor, **kw: Any) -> MaskLike:
        """Hide padding, where it is known."""
        pad = self.config.pad_token_id
        return None if pad is None else (input_ids != pad)[:, None, None, :]

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read `[b, s]` as padding."""
        return read_padding(attention_mask, input_ids)


@register_model
class BertModel(EncoderModel):
    """An encoder with a head for masked words; `token_type_ids` `[b, s]` default to 0.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = BertConfig
    key_maps = BERT_KEY_MAPS
    config: BertConfig

    def __init__(
        self, config: BertConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        super().__init__(config, transformer=transformer, **({"activation_func": F.gelu} | transformer_overrides))
        self.add_mixin("bert-final", MaskedLMHeadMixin(self.config, self.config.head_layernorm_epsilon))
        self.add_mixin("bert-type", TokenTypesMixin(self.config, self.config.num_types))
