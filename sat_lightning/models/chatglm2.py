"""ChatGLM2, ChatGLM3 and ChatGLM4 (GLM-4; Zeng et al. 2024, arXiv:2406.12793).

What differs from the plain transformer:
- RMSNorm, SiLU, grouped queries, biases only on `query_key_value`, a head of its own (`mixins.chatglm-final`);
- the first half of each head is rotated (`mixins.attn`): neighbours in 2 and 3, halves in 4; 3 stretches the base;
- a gate beside the MLP (`mixins.mlp.w2`; with `is_gated_mlp` the backbone's): in 2 and 4 the activation is on
  `dense_h_to_4h`, in 3 on the gate;
- a mask `[b, s]` is padding, an omitted one or None is causal, a bool one `[b, 1, s, t]` is True where MASKED;
- every layer gives its keys and values back (`past_key_values`, `[b, k, t, d]`) and takes earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins import GatedMLPMixin, LMHeadMixin, PastKeyValuesMixin, RotaryMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.model.base import OMITTED
from sat_lightning.models.chatglm import Past, flip_bool
from sat_lightning.models.keymaps.chatglm import KEY_MAPS
from sat_lightning.nn import RMSNorm, Transformer
from sat_lightning.nn.masks import MaskLike


@dataclass(frozen=True, kw_only=True)
class ChatGLM2Config(TransformerConfig):
    """ChatGLM2's options."""

    rotary_interleaved: bool = True
    """Rotate neighbouring features (2j, 2j+1) instead of the two halves (j, j + dim/2)."""


@dataclass(frozen=True, kw_only=True)
class ChatGLM3Config(ChatGLM2Config):
    """ChatGLM3's options."""

    base_scale: float = 1.0
    """Factor on the base of the rotary frequencies: 50 in the model for long texts."""


@dataclass(frozen=True, kw_only=True)
class ChatGLM4Config(ChatGLM2Config):
    """ChatGLM4's options."""

    rotary_interleaved: bool = False
    """Rotate neighbouring features (2j, 2j+1) instead of the two halves (j, j + dim/2)."""


@register_model
class ChatGLM2Model(BaseModel):
    """A causal decoder: `model(input_ids)`, or with padding `model(input_ids, attention_mask=[b, s])`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ChatGLM2Config
    default_mask = "causal"
    #: Whether the activation is on the gate `w2`, or on `dense_h_to_4h`.
    activates_gate: ClassVar[bool] = False
    config: ChatGLM2Config

    def __init__(
        self, config: ChatGLM2Config, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        own = {"layernorm": RMSNorm, "activation_func": F.silu, "has_position_table": False}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        config = self.config
        self.add_mixin("chatglm-final", LMHeadMixin(config))
        dim = config.rotary_dim or config.hidden_size // config.num_attention_heads // 2
        self.add_mixin("attn", RotaryMixin(self.rotary_config(), dim=dim, name="rotary_pos_emb", is_fixed=True))
        if not config.is_gated_mlp:
            gate = GatedMLPMixin(config, name="w2", activates_gate=self.activates_gate, bias=config.use_bias)
            self.add_mixin("mlp", gate)
        self.add_mixin("past", PastKeyValuesMixin())

    def rotary_config(self) -> TransformerConfig:
        """Return the configuration that the rotary positions follow."""
        return self.config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = OMITTED,
        attention_mask: MaskLike = OMITTED,
        past_key_values: Past = None,
        **kw: Any,
    ) -> list[Any]:
        """Run the model.

        Args:
            input_ids: `[b, s]`; with `past_key_values` the last one is new.
            position_ids: `[s]` or `[b|1, s]`. None is derived, as is omitted.
            attention_mask: `[b, t]` with 1 for a token, or as in `BaseModel`, but True is MASKED in a bool one of four
                axes. None is causal, as is omitted.
            past_key_values: for each layer keys and values `[b, k, t, d]` of the tokens before the last.
            **kw: as in `BaseModel`.

        Returns:
            As `BaseModel`; out of training each layer's dict has `past_key_values`.
        """
        mask: MaskLike = "causal" if attention_mask is None or attention_mask is OMITTED else attention_mask
        position_ids = None if position_ids is OMITTED else position_ids
        if length := self.get_mixin("past").length_of(past_key_values):
            input_ids = input_ids[:, -1:]
            places = torch.full_like(input_ids, length) if position_ids is None else position_ids
            position_ids = places[..., -1:]
            mask = self._read_last_row(mask)
        places = OMITTED if position_ids is None else position_ids
        return super().forward(input_ids, places, mask, past_key_values=past_key_values, **kw)

    def _read_last_row(self, attention_mask: MaskLike) -> MaskLike:
        """Cut a caller's mask to the one new token; numbers, so that it is not flipped again."""
        if not isinstance(attention_mask, Tensor):
            return attention_mask
        if attention_mask.dim() == 2:
            return attention_mask[:, None, None, :].float()
        return (~attention_mask if attention_mask.dtype == torch.bool else attention_mask)[..., -1:, :].float()

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read `[b, s]` as padding under the causal mask (padding itself sees all), and True as masked."""
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
            return flip_bool(attention_mask)
        is_token = attention_mask > 0
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        return ((causal & is_token[:, None, :]) | ~is_token[:, :, None])[:, None]


@register_model
class ChatGLM3Model(ChatGLM2Model):
    """ChatGLM2 with the activation on the gate, and a rotary base that stretches.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ChatGLM3Config
    activates_gate = True
    config: ChatGLM3Config

    def rotary_config(self) -> TransformerConfig:
        """Stretch the base."""
        return self.config.replace(rotary_base=self.config.rotary_base * self.config.base_scale)


@register_model
class ChatGLM4Model(ChatGLM2Model):
    """ChatGLM2 with rotated halves.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ChatGLM4Config
    key_maps = KEY_MAPS
    config: ChatGLM4Config
