"""An encoder that reads, and a decoder that writes while it looks at what was read.

Legend: b batch, s encoder length, t decoder length, c hidden size.

    enc_input_ids [b, s] ─ encoder ─ encoder_outputs [b, s, c] ──┐ cross attention
    dec_input_ids [b, t] ─ decoder ───────────────────────────── + ─ logits [b, t, v]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.model.adapter_ids import for_parts
from sat_lightning.model.base import OMITTED, BaseModel
from sat_lightning.model.composed import ComposedModel
from sat_lightning.model.mixin import BaseMixin
from sat_lightning.nn.masks import MaskLike, read_padding

_SHARED_NAMES = (
    "num_layers hidden_size num_attention_heads layernorm_order max_sequence_length inner_hidden_size "
    "hidden_size_per_attention_head"
).split()


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """The encoder, and how the decoder differs from it."""

    dec_num_layers: int | None = None
    """Layers of the decoder. Default of this and the next six: as the encoder."""
    dec_hidden_size: int | None = None
    """Width of the decoder's residual stream."""
    dec_num_attention_heads: int | None = None
    """Query heads of the decoder's attentions."""
    dec_max_sequence_length: int | None = None
    """Rows of the decoder's position table."""
    dec_inner_hidden_size: int | None = None
    """Width between the two linears of the decoder's MLP."""
    dec_hidden_size_per_attention_head: int | None = None
    """Features of one self-attention head of the decoder."""
    dec_layernorm_order: str | None = None
    """Where the norms of a decoder layer stand."""

    def of_decoder(self) -> TransformerConfig:
        """Return the decoder's own configuration."""
        given = {name: getattr(self, f"dec_{name}") for name in _SHARED_NAMES}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.cross_attn_hidden_size is None and "hidden_size" in changes:
            changes["cross_attn_hidden_size"] = self.hidden_size
        return self.replace(is_decoder=True, **changes)


class FinalHiddenMixin(BaseMixin):
    """Return the hidden states themselves: `[b, s, c]` after the final norm."""

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Leave them as they are."""
        return logits


class EncoderDecoderModel(ComposedModel):
    """Two backbones: `encoder_outputs, logits, *outputs_per_layer = model(enc_input_ids, ..., dec_input_ids, ...)`.

    Args:
        config: the encoder's architecture, and what differs in the decoder.
        encoder: the model that reads. Default: a new `BaseModel`; its head gives way to the hidden states.
        decoder: the model that writes. Default: a new `BaseModel` with cross attention.
        tie_word_embeddings: whether both read words from the encoder's table.
        **transformer_overrides: of both new backbones, see `BaseModel`.

    Args of the call:
        enc_input_ids: `[b, s]`.
        enc_position_ids: `[s]` or `[b|1, s]`. Omitted, of both: 0, 1, 2, ...
        dec_input_ids: `[b, t]`.
        dec_position_ids: `[t]` or `[b|1, t]`.
        enc_attention_mask: `[b, s]` (1 is a token, 0 padding), or as in `BaseModel`. None: full.
        dec_attention_mask: as in `BaseModel`. None: causal.
        cross_attention_mask: what the decoder sees of the encoder. None: the encoder's mask.
        enc_token_indices: the tokens that are computed, see `sat_lightning.nn.unpadding`. None: all.
        dec_token_indices: the same of the decoder.
        **kw: reach the hooks of both.

    Returns encoder outputs `[b, s, c]`, decoder logits `[b, t, v]`, and for each decoder layer its dict.
    """

    config_class: ClassVar[type[TransformerConfig]] = EncoderDecoderConfig
    config: EncoderDecoderConfig
    encoder: BaseModel
    decoder: BaseModel

    def __init__(
        self,
        config: EncoderDecoderConfig,
        encoder: BaseModel | None = None,
        decoder: BaseModel | None = None,
        tie_word_embeddings: bool = True,
        **transformer_overrides: Any,
    ) -> None:
        super().__init__(config)
        config = self.config
        self.encoder = encoder or BaseModel(config.replace(is_decoder=False), **transformer_overrides)
        self.encoder.add_mixin("final", FinalHiddenMixin())
        self.decoder = decoder or BaseModel(config.of_decoder(), **transformer_overrides)
        self.tie_word_embeddings = tie_word_embeddings
        if tie_word_embeddings:
            self.decoder.transformer.word_embeddings = self.encoder.transformer.word_embeddings
            self.encoder.transformer.word_embeddings.is_shared = True

    def encode(
        self, input_ids: Tensor, position_ids: Tensor | None = OMITTED, attention_mask: MaskLike = None, **kw: Any
    ) -> Tensor:
        """Read: `[b, s]` to encoder outputs `[b, s, c]`; without a mask every token sees every token."""
        return self.encoder(input_ids, position_ids, read_padding(attention_mask, input_ids), **kw)[0]

    def decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = OMITTED,
        attention_mask: MaskLike = None,
        encoder_outputs: Any = None,
        cross_attention_mask: MaskLike = None,
        **kw: Any,
    ) -> list[Any]:
        """Write: `[b, t]` to logits and outputs per layer; without a mask a token sees those before it."""
        mask = "causal" if attention_mask is None else attention_mask
        more = sum(mixin.num_kept_in_front for mixin in self.encoder.mixins.values() if not mixin._is_silent)  # type: ignore
        if more and isinstance(cross_attention_mask, Tensor) and cross_attention_mask.shape[-1] > 1:
            cross_attention_mask = F.pad(cross_attention_mask, (more, 0), value=True)
        cross = {"encoder_outputs": encoder_outputs, "cross_attention_mask": cross_attention_mask}
        return self.decoder(input_ids, position_ids, mask, **cross, **kw)

    def forward(
        self,
        enc_input_ids: Tensor,
        enc_position_ids: Tensor | None = OMITTED,
        dec_input_ids: Tensor = OMITTED,
        dec_position_ids: Tensor | None = OMITTED,
        *,
        enc_attention_mask: MaskLike = None,
        dec_attention_mask: MaskLike = None,
        cross_attention_mask: MaskLike = None,
        enc_token_indices: Tensor | None = None,
        dec_token_indices: Tensor | None = None,
        **kw: Any,
    ) -> tuple[Any, ...]:
        """Read, then write; arguments and result are described by the class."""
        if "token_indices" in kw:
            raise InputError("token_indices: encoder and decoder have their own, enc_ and dec_token_indices.")
        kw, enc_attention_mask = for_parts(self, kw), read_padding(enc_attention_mask, enc_input_ids)
        cross = (
            enc_attention_mask if cross_attention_mask is None else read_padding(cross_attention_mask, enc_input_ids)
        )
        encoder_outputs = self.encode(
            enc_input_ids, position_ids=enc_position_ids, attention_mask=enc_attention_mask,
            token_indices=enc_token_indices, **kw,
        )  # fmt: skip
        decoded = self.decode(
            dec_input_ids, position_ids=dec_position_ids, attention_mask=dec_attention_mask,
            encoder_outputs=encoder_outputs, cross_attention_mask=cross, token_indices=dec_token_indices, **kw,
        )  # fmt: skip
        return (encoder_outputs, *decoded)
