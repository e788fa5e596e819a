"""ChatGLM-6B (Zeng et al. 2022, arXiv:2210.02414).

What differs from the plain transformer:
- post order with DeepNorm: the residual counts sqrt(2 * num_layers) times;
- rotary positions of two rows `[b, 2, s]`: half of each head follows the place in the text, half the place in the
  answer (`mixins.chatglm-attn`);
- positions and mask follow from the ids: the prompt up to `bos_token_id` sees itself, the answer is causal, padding on
  the left is hidden;
- a caller's bool mask is True where a query may NOT look;
- the head has weights of its own (`mixins.chatglm-final`);
- every layer gives its keys and values back (`past_key_values`, `[t, b, h, d]`) and takes earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.mixins import LMHeadMixin, PastKeyValuesMixin, RotaryMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.model.base import OMITTED, read_config
from sat_lightning.nn import Transformer
from sat_lightning.nn.blank_filling import blank_filling, require_whole_text
from sat_lightning.nn.masks import MaskLike

Past = Sequence[tuple[Tensor, Tensor] | None] | None


@dataclass(frozen=True, kw_only=True)
class ChatGLMConfig(TransformerConfig):
    """ChatGLM's options: the tokens that lay a conversation out."""

    layernorm_order: Literal["pre", "post", "sandwich"] = "post"
    """Where the norms of a layer stand; drawn in `sat_lightning.nn.layer`."""
    bos_token_id: int = 130004
    """The token that begins the answer."""
    mask_token_id: int = 130000
    """A blank inside the text."""
    gmask_token_id: int = 130001
    """The blank at the end of the text; where a row holds it, it decides."""
    pad_token_id: int = 3
    """Padding, on the left."""


def flip_bool(attention_mask: MaskLike) -> MaskLike:
    """Read a bool mask as this family means it, True is masked; other masks pass."""
    is_bool = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
    return ~attention_mask if is_bool and isinstance(attention_mask, Tensor) else attention_mask


@register_model
class ChatGLMModel(BaseModel):
    """A decoder whose prompt sees itself: `model(input_ids)` is right by itself.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ChatGLMConfig
    config: ChatGLMConfig

    def __init__(
        self, config: ChatGLMConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        config = read_config(config, ChatGLMConfig)
        scale = (2 * config.num_layers) ** 0.5 if config.layernorm_order == "post" else 1.0
        own = {"has_position_table": False, "residual_scale": scale}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        config = self.config
        self.add_mixin("chatglm-final", LMHeadMixin(config))
        dim = config.hidden_size // (2 * config.num_attention_heads)
        self.add_mixin("chatglm-attn", RotaryMixin(config, dim=dim, num_axes=2, is_fixed=True))
        self.add_mixin("past", PastKeyValuesMixin(is_length_first=True))

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
            input_ids: `[b, s]`; with `past_key_values` all ids so far, of which the last is new, or that one alone.
            position_ids: `[b, 2, s]`. None is derived, as is omitted.
            attention_mask: 1 is visible in a float or integer mask, True is MASKED in a bool one. None beside given
                positions is full, otherwise derived.
            past_key_values: for each layer keys and values `[t, b, h, d]` of the tokens before the last.
            **kw: as in `BaseModel`.

        Returns:
            As `BaseModel`; out of training each layer's dict has `past_key_values`.
        """
        if attention_mask is None and (position_ids is None or position_ids is OMITTED):
            attention_mask = OMITTED
        if position_ids is None:
            position_ids = OMITTED
        if length := self.get_mixin("past").length_of(past_key_values):
            position_ids, attention_mask = self._continue(input_ids, position_ids, attention_mask, length)
            input_ids = input_ids[:, -1:]
        return super().forward(input_ids, position_ids, attention_mask, past_key_values=past_key_values, **kw)

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor:
        """Return both rows `[b, 2, s]`."""
        return self._lay_out(input_ids, kw)[0]

    def make_attention_mask(self, input_ids: Tensor, **kw: Any) -> MaskLike:
        """Return the mask of prompt and answer, `[b, 1, s, s]`."""
        return self._lay_out(input_ids, kw)[1]

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read True as masked."""
        return flip_bool(attention_mask)

    def _continue(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: MaskLike, length: int
    ) -> tuple[Tensor, MaskLike]:
        """Cut positions and mask to the one new token behind a past of `length` tokens."""
        is_whole = input_ids.shape[1] == length + 1
        if position_ids is OMITTED:
            if not is_whole:
                raise InputError(
                    f"The past holds {length} tokens and input_ids {input_ids.shape[1]}: the place of the new one is "
                    f"unknown. Pass all {length + 1} ids, or position_ids [batch, 2, 1]."
                )
            position_ids = self._lay_out(input_ids, {})[0]
        if attention_mask is OMITTED:
            # The layout's own mask is 1 where visible; read_attention_mask must not flip it.
            attention_mask = self._lay_out(input_ids, {})[1][..., -1:, :].int() if is_whole else None
        elif isinstance(attention_mask, Tensor):
            attention_mask = attention_mask[..., -1:, :]
        return position_ids[..., -1:], attention_mask

    def _lay_out(self, input_ids: Tensor, kw: dict[str, Any]) -> tuple[Tensor, Tensor]:
        require_whole_text(kw)
        config = self.config
        mask_ids = (config.gmask_token_id, config.mask_token_id)
        return blank_filling(input_ids, start_id=config.bos_token_id, mask_ids=mask_ids, pad_id=config.pad_token_id)
