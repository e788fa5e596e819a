"""CaiT (Touvron et al. 2021, arXiv:2103.17239): patches first look at each other, then a class token looks at them.

What differs from the plain encoder-decoder:
- the encoder is ViT without special tokens, head and last norm; its heads talk before and after the softmax
  (`encoder.mixins.attn`), and what a layer adds is scaled by learned factors (`encoder.mixins.enc_forward`);
- the decoder has one token, the class, without a position: it attends to itself and the patches, and what a layer adds
  is scaled (`decoder.mixins.dec_forward`); the head classifies it (`decoder.mixins.cls`);
- exact GELU in the encoder, its tanh form in the decoder, as SAT's;
- SAT's files hold a self-attention, a norm and a position table of the decoder which nothing uses: they are kept, and
  do not learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins import ImageConfig
from sat_lightning.model import BaseMixin, BaseModel, EncoderDecoderConfig, EncoderDecoderModel, register_model
from sat_lightning.model.base import OMITTED, read_config
from sat_lightning.models.vit import ClassifierMixin, ImageModel, ViTConfig
from sat_lightning.nn.drop_path import drop_path
from sat_lightning.nn.linear import Linear, normal_init, run_linear
from sat_lightning.nn.masks import MASKED_SCORE, MaskLike


@dataclass(frozen=True, kw_only=True)
class CaiTConfig(ViTConfig, EncoderDecoderConfig):
    """CaiT's options."""

    position_tables: ClassVar[tuple[str, ...]] = tuple(
        f"{part}.{name}" for part in ("encoder", "decoder") for name in ImageConfig.position_tables
    )

    layernorm_epsilon: float = 1e-6
    """Added to the variance inside every norm."""
    pre_len: int = 0
    """Special tokens before the patches."""
    init_scale: float = 1e-4
    """Initial factor on what a layer adds."""

    def __post_init__(self) -> None:
        """Refuse a decoder of another width."""
        super().__post_init__()
        if self.dec_hidden_size not in (None, self.hidden_size):
            raise ConfigError(
                f"dec_hidden_size is {self.dec_hidden_size}, hidden_size is {self.hidden_size}: class token and "
                "patches are one sequence, so leave dec_hidden_size out."
            )

    def of_decoder(self) -> TransformerConfig:
        """Return the decoder's own configuration, which knows no image."""
        own = super().of_decoder()
        plain = {field.name: getattr(own, field.name) for field in fields(TransformerConfig)}
        length = self.dec_max_sequence_length or self.max_sequence_length
        return TransformerConfig(**(plain | {"max_sequence_length": length}))


class LayerScaleMixin(BaseMixin):
    """Scale what attention and MLP add to the residual, feature by feature.

    Args:
        config: gives layers and width.
        init_scale: initial factor.
    """

    def __init__(self, config: TransformerConfig, init_scale: float) -> None:
        super().__init__()

        def factors() -> nn.ParameterList:
            sizes = range(config.num_layers)
            return nn.ParameterList(nn.Parameter(torch.full((config.hidden_size,), init_scale)) for _ in sizes)

        self.gamma_1, self.gamma_2 = factors(), factors()

    @non_conflict
    def attention_forward(
        self, hidden_states: Tensor, mask: Tensor, *, old_impl: Callable[..., Tensor], layer_id: int, **kw: Any
    ) -> Tensor:
        """Attend and scale."""
        return old_impl(hidden_states, mask, layer_id=layer_id, **kw) * self.gamma_1[layer_id]

    @non_conflict
    def mlp_forward(
        self, hidden_states: Tensor, *, old_impl: Callable[..., Tensor], layer_id: int, **kw: Any
    ) -> Tensor:
        """Feed and scale."""
        return old_impl(hidden_states, layer_id=layer_id, **kw) * self.gamma_2[layer_id]


class ClassAttentionMixin(LayerScaleMixin):
    """Let the class token attend to itself and to the encoder's outputs, then feed it; scale both."""

    attention_forward = None  # type: ignore[assignment]
    mlp_forward = None  # type: ignore[assignment]

    def layer_forward(
        self, hidden_states: Tensor, mask: Tensor, *, layer_id: int, encoder_outputs: Tensor,
        cross_attention_mask: Tensor, **kw: Any,
    ) -> Tensor:  # fmt: skip
        """Run the layer: `[b, 1, c]` to the same."""
        layer: Any = self.transformer.layers[layer_id]
        kw["layer_id"] = layer_id
        normed = layer.input_layernorm(torch.cat([hidden_states, encoder_outputs.to(hidden_states.dtype)], dim=1))
        if cross_attention_mask is not kw["full_mask"]:  # it is about the patches: the token itself is visible
            cross_attention_mask = F.pad(cross_attention_mask, (1, 0), value=1.0)
        attended = layer.cross_attention(normed[:, :1], cross_attention_mask, normed, **kw) * self.gamma_1[layer_id]
        hidden_states = hidden_states + drop_path(attended, layer.drop_path, layer.training)
        fed = layer.mlp(layer.post_cross_attention_layernorm(hidden_states), **kw) * self.gamma_2[layer_id]
        return hidden_states + drop_path(fed, layer.drop_path, layer.training)


class TalkingHeadsMixin(BaseMixin):
    """Mix the heads' scores before the softmax, and their weights behind it (Shazeer et al. 2020, arXiv:2003.02436).

    A mask acts between the two; the bias of the second gives weight to every key, hidden or not.

    Args:
        config: gives layers and heads.
    """

    runs_linears = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        heads, init = config.num_attention_heads, normal_init(config.init_method_std)

        def linears() -> nn.ModuleList:
            return nn.ModuleList(Linear(heads, heads, True, init) for _ in range(config.num_layers))

        self.proj_l, self.proj_w = linears(), linears()

    def attention_fn(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_fn: nn.Module | None = None, **kw: Any
    ) -> Tensor:
        """Attend: `[b, h, s, d]`, keys and values `[b, k, t, d]`."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = self._mix("proj_l", query / query.shape[-1] ** 0.5 @ key.mT, **kw)
        if kw.get("log_attention_weights") is not None:
            scores = scores + kw["log_attention_weights"]
        if mask is not kw["full_mask"]:
            scores = scores * mask + MASKED_SCORE * (1.0 - mask)
        weights = self._mix("proj_w", scores.softmax(dim=-1), **kw)
        return (weights if dropout_fn is None else dropout_fn(weights)) @ value

    def _mix(self, name: str, x: Tensor, **kw: Any) -> Tensor:
        """Apply a linear over the axis of heads of `[b, h, s, t]`."""
        return run_linear(getattr(self, name)[kw["layer_id"]], name, x.movedim(1, -1), **kw).movedim(-1, 1)


class ClassDecoder(BaseModel):
    """Layers through which a class token passes.

    Args:
        config: the architecture.
        **transformer_overrides: see `BaseModel`.
    """

    def __init__(self, config: TransformerConfig, **transformer_overrides: Any) -> None:
        super().__init__(config, **transformer_overrides)
        unused: list[Any] = [self.transformer.position_embeddings]
        for layer in self.transformer.layers:
            unused += [layer.attention, layer.post_attention_layernorm]
        for module in unused:
            module.requires_grad_(False)

    def position_embedding_forward(self, position_ids: Tensor | None, **kw: Any) -> None:
        """Add none."""


@register_model
class CaiT(EncoderDecoderModel):
    """`encoder_outputs, logits, *outputs_per_layer = model(image=image)`.

    Args:
        config: the architecture.
        **transformer_overrides: of both new backbones, see `BaseModel`.

    Args of the call:
        input_ids: the class token, `[b|1, 1]`. Omitted: 0.
        enc_position_ids: without effect, the whole table is added.
        dec_position_ids: without effect.
        enc_attention_mask: as in `BaseModel`, over the patches. None: full.
        cross_attention_mask: what the class token sees of the patches. None: all.
        image: `[b, in_channels, h, w]`.
        **kw: reach the hooks of both.

    Returns encoder outputs `[b, patches, c]`, logits `[b, num_classes]`, and for each decoder layer its dict.
    """

    config_class: ClassVar[type[TransformerConfig]] = CaiTConfig
    config: CaiTConfig

    def __init__(self, config: CaiTConfig, **transformer_overrides: Any) -> None:
        config = read_config(config, CaiTConfig)
        encoder = ImageModel(config, use_final_layernorm=False, **transformer_overrides)
        encoder.add_mixin("attn", TalkingHeadsMixin(config))
        encoder.add_mixin("enc_forward", LayerScaleMixin(config, config.init_scale))
        decoder = ClassDecoder(config.of_decoder(), **transformer_overrides)
        decoder.add_mixin("cls", ClassifierMixin(decoder.config, config.num_classes))
        decoder.add_mixin("dec_forward", ClassAttentionMixin(decoder.config, config.init_scale))
        super().__init__(config, encoder=encoder, decoder=decoder)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor = OMITTED,
        enc_position_ids: Tensor | None = None,
        dec_position_ids: Tensor | None = None,
        *,
        enc_attention_mask: MaskLike = None,
        cross_attention_mask: MaskLike = None,
        **kw: Any,
    ) -> tuple[Any, ...]:
        """Look, then classify; arguments and result are described by the class."""
        encoder_outputs = self.encoder(attention_mask=enc_attention_mask, **kw)[0]
        if input_ids is OMITTED:
            input_ids = torch.zeros(1, 1, dtype=torch.long, device=encoder_outputs.device)
        input_ids = input_ids.expand(len(encoder_outputs), -1)
        seen = {"encoder_outputs": encoder_outputs, "cross_attention_mask": cross_attention_mask}
        return (encoder_outputs, *self.decoder(input_ids, dec_position_ids, None, **seen, **kw))
