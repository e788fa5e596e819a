"""T5 (Raffel et al. 2019, arXiv:1910.10683).

What differs from the plain encoder-decoder:
- RMSNorm, ReLU, no biases;
- no positions: scores are not scaled and get a bias for each distance (`mixins.t5-attention`);
- with `gated_gelu_mlp` (T5 1.1) the MLP is GELU times a gate (`mixins.gated-mlp`);
- the head is the table of words on hidden states divided by sqrt(c), or with `no_share_embeddings` a linear of its own
  (`decoder.mixins.t5-final`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import computes_loss
from sat_lightning.mixins import GatedMLPMixin, LMHeadMixin, RelativeBiasMixin
from sat_lightning.model import BaseMixin, EncoderDecoderConfig, EncoderDecoderModel, register_model
from sat_lightning.model.base import OMITTED, read_config
from sat_lightning.models.keymaps.t5 import KEY_MAPS
from sat_lightning.nn import RMSNorm
from sat_lightning.nn.head import project
from sat_lightning.nn.masks import MaskLike
from sat_lightning.nn.mlp import gelu


@dataclass(frozen=True, kw_only=True)
class T5Config(EncoderDecoderConfig):
    """T5's options."""

    use_bias: bool = False
    """Biases on the linears; T5 has none."""
    layernorm_epsilon: float = 1e-6
    """Added to the mean square inside every norm."""
    relative_attention_num_buckets: int = 32
    """Rows of each table of distances."""
    gated_gelu_mlp: bool = False
    """A gate in the MLP, and GELU in the place of ReLU."""
    no_share_embeddings: bool = False
    """A head of its own weights."""


class ScaledTiedHeadMixin(BaseMixin):
    """Score every word by its embedding, on hidden states divided by sqrt(c)."""

    @computes_loss
    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the logits, or the mean cross entropy when `target_ids` is given."""
        return project(logits * logits.shape[-1] ** -0.5, self.transformer.word_embeddings.weight, **kw)


@register_model
class T5Model(EncoderDecoderModel):
    """`encoder_outputs, logits, *outputs_per_layer = model(enc_input_ids, dec_input_ids)`.

    Args:
        config: the encoder's architecture, and what differs in the decoder.
        **kwargs: see `EncoderDecoderModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = T5Config
    key_maps = KEY_MAPS
    config: T5Config

    def __init__(self, config: T5Config, **kwargs: Any) -> None:
        config = read_config(config, T5Config)
        activation_func = gelu if config.gated_gelu_mlp else F.relu
        own = {"layernorm": RMSNorm, "activation_func": activation_func, "has_position_table": False}
        super().__init__(config, **(own | kwargs))
        for part, is_bidirectional in ((self.encoder, True), (self.decoder, False)):
            num_buckets = config.relative_attention_num_buckets
            bias = RelativeBiasMixin(part.config, num_buckets, is_bidirectional=is_bidirectional)
            part.add_mixin("t5-attention", bias)
            if config.gated_gelu_mlp:
                gate = GatedMLPMixin(part.config, name="gated_h_to_4h_list", activates_gate=False)
                part.add_mixin("gated-mlp", gate)
        head = LMHeadMixin(self.decoder.config) if config.no_share_embeddings else ScaledTiedHeadMixin()
        self.decoder.add_mixin("t5-final", head)

    def encode(self, input_ids: Tensor, attention_mask: MaskLike = None, **kw: Any) -> Tensor:  # type: ignore[override]
        """Read; as in `EncoderDecoderModel.encode`, positions are not needed."""
        return super().encode(input_ids, attention_mask=attention_mask, **kw)

    def decode(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: MaskLike = None,
        encoder_outputs: Any = None,
        cross_attention_mask: MaskLike = None,
        **kw: Any,
    ) -> list[Any]:
        """Write; as in `EncoderDecoderModel.decode`, positions are not needed."""
        cross = {"encoder_outputs": encoder_outputs, "cross_attention_mask": cross_attention_mask}
        return super().decode(input_ids, attention_mask=attention_mask, **cross, **kw)

    def forward(self, enc_input_ids: Tensor, dec_input_ids: Tensor = OMITTED, **kw: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Read, then write; masks and result as in `EncoderDecoderModel.forward`, positions are not needed."""
        return super().forward(enc_input_ids, dec_input_ids=dec_input_ids, **kw)
