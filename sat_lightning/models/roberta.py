"""RoBERTa (Liu et al. 2019, arXiv:1907.11692).

What differs from BERT:
- no token types;
- positions count from `pad_token_id` + 1, and padding stays at `pad_token_id`; so `max_sequence_length` is larger than
  the longest sequence by `pad_token_id` + 1. A caller's `position_ids` are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.mixins import MaskedLMHeadMixin
from sat_lightning.model import register_model
from sat_lightning.models.bert import EncoderConfig, EncoderModel
from sat_lightning.models.keymaps.bert import ROBERTA_KEY_MAPS
from sat_lightning.nn import Transformer


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """RoBERTa's options."""

    pad_token_id: int | None = 1
    """The word that is padding: an omitted mask hides it, and positions count from behind it."""


@register_model
class RobertaModel(EncoderModel):
    """An encoder with a head for masked words.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = RobertaConfig
    key_maps = ROBERTA_KEY_MAPS
    config: RobertaConfig

    def __init__(
        self, config: RobertaConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        super().__init__(config, transformer=transformer, **({"activation_func": F.gelu} | transformer_overrides))
        self.add_mixin("bert-final", MaskedLMHeadMixin(self.config, self.config.head_layernorm_epsilon))

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor | None:
        """Number what is no padding from `pad_token_id` + 1, `[b, s]`."""
        pad = self.config.pad_token_id
        if pad is None:
            return super().make_position_ids(input_ids, **kw)
        if input_ids.shape[1] + pad + 1 > self.config.max_sequence_length:
            raise InputError(
                f"The sequence has {input_ids.shape[1]} tokens, max_sequence_length is "
                f"{self.config.max_sequence_length}, of which {pad + 1} stand before the first. Shorten or split it, "
                "or pass position_ids."
            )
        is_token = (input_ids != pad).long()
        return is_token.cumsum(-1) * is_token + pad
