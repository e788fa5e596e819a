"""MAE (He et al. 2021, arXiv:2111.06377): an image is drawn again from a few of its patches.

What differs from the plain encoder-decoder:
- the encoder is ViT without a head, and keeps a random part of the patches behind the embeddings
  (`encoder.mixins.mask_patches`);
- the decoder sees what was kept at its places and the mask token, its only word, elsewhere, and gives pixels
  (`decoder.mixins.mask_forward`); it is narrower, not causal, and shares no embedding;
- GELU in its tanh form in the decoder, as SAT's; Hugging Face's files need the exact one (`dec_hidden_act="gelu"`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins import ImageConfig
from sat_lightning.model import BaseMixin, BaseModel, EncoderDecoderConfig, EncoderDecoderModel, register_model
from sat_lightning.model.base import OMITTED, read_config
from sat_lightning.models.keymaps.mae import KEY_MAPS
from sat_lightning.models.vit import ImageModel
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.masks import MaskLike
from sat_lightning.nn.mlp import gelu


@dataclass(frozen=True, kw_only=True)
class MAEConfig(ImageConfig, EncoderDecoderConfig):
    """MAE's options."""

    position_tables: ClassVar[tuple[str, ...]] = tuple(
        f"{part}.{name}" for part in ("encoder", "decoder") for name in ImageConfig.position_tables
    )

    layernorm_epsilon: float = 1e-6
    """Added to the variance inside every norm."""
    mask_ratio: float = 0.75
    """Part of the patches that is removed, where a call does not say."""
    dec_hidden_act: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """The activation of the decoder's MLP: SAT's, or the one Hugging Face's files were trained with."""

    def __post_init__(self) -> None:
        """Refuse what the masking does not cover."""
        super().__post_init__()
        if (self.pre_len, self.post_len) != (1, 0):
            raise ConfigError(f"MAE has pre_len 1 and post_len 0; here they are {self.pre_len} and {self.post_len}.")
        if self.dec_hidden_act not in ("gelu_tanh", "gelu"):
            raise ConfigError(f"dec_hidden_act: unknown value {self.dec_hidden_act!r}, known are gelu_tanh, gelu.")

    def of_decoder(self) -> TransformerConfig:
        """Return the decoder's own configuration."""
        sizes = super().of_decoder()
        assert isinstance(sizes, ImageConfig)
        return sizes.without_image(
            is_decoder=False,
            cross_attn_hidden_size=self.cross_attn_hidden_size,
            max_sequence_length=self.dec_max_sequence_length or self.max_sequence_length,
        )


class MaskPatchesMixin(BaseMixin):
    """Keep a random part of the patches, in random order, behind the first token.

    Args:
        mask_ratio: part that is removed, where a call does not say.
    """

    def __init__(self, mask_ratio: float) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio

    @non_conflict
    def layer_forward(
        self, hidden_states: Tensor, mask: Tensor, *args: Any, old_impl: Callable[..., Tensor], layer_id: int,
        kept: Tensor | None = None, mask_ratio: float | None = None, noise: Tensor | None = None, **kw: Any,
    ) -> Tensor:  # fmt: skip
        """Remove patches before layer 0, and what a caller's mask says of them before every layer.

        Layer 0's dict gets `mask` `[b, patches]`, 1 is removed, and `ids_restore` `[b, patches]`, the place of every
        patch in the shuffled order. `noise` `[b, patches]` decides it: the smallest are kept. Default: drawn anew.
        """
        if kept is None:
            batch_size, num_patches = hidden_states.shape[0], hidden_states.shape[1] - 1
            noise = torch.rand(batch_size, num_patches, device=hidden_states.device) if noise is None else noise
            order = torch.argsort(noise, dim=1)
            num_kept = int(num_patches * (1 - (self.mask_ratio if mask_ratio is None else mask_ratio)))
            ids_restore = torch.argsort(order, dim=1)
            kw["output_this_layer"] |= {"mask": (ids_restore >= num_kept).float(), "ids_restore": ids_restore}
            kept = torch.cat([torch.zeros_like(order[:, :1]), order[:, :num_kept] + 1], dim=1)
            hidden_states = hidden_states.take_along_dim(kept[..., None], dim=1)
        kw["output_cross_layer"]["kept"] = kept
        return old_impl(hidden_states, _narrow(mask, kept), *args, layer_id=layer_id, **kw)


def _narrow(mask: Tensor, kept: Tensor) -> Tensor:
    """Leave of a mask `[s, t]` or `[b, 1, s, t]` the rows and columns `kept` `[b, n]`; an axis of 1 stands for all."""
    if mask.shape[-2:] == (1, 1):
        return mask
    mask = mask if mask.dim() == 4 else mask[None, None]
    mask = mask if mask.shape[2] == 1 else mask.take_along_dim(kept[:, None, :, None], dim=2)
    return mask.take_along_dim(kept[:, None, None, :], dim=3)


class ReconstructMixin(BaseMixin):
    """Put what the encoder saw to its places, mask tokens between, and give the pixels of every patch.

    Args:
        config: the encoder's, with its image.
        decoder_config: gives the width.
    """

    def __init__(self, config: ImageConfig, decoder_config: TransformerConfig) -> None:
        super().__init__()
        size, init = decoder_config.hidden_size, normal_init(config.init_method_std)
        self.decoder_embed = Linear(config.hidden_size, size, True, init)
        self.decoder_pred = Linear(size, config.patch_size**2 * config.in_channels, True, init)

    @non_conflict
    def word_embedding_forward(
        self,
        input_ids: Tensor,
        old_impl: Callable[..., Tensor],
        encoder_outputs: Tensor,
        ids_restore: Tensor,
        **kw: Any,
    ) -> Tensor:
        """Return `[b, 1 + patches, c]` from the mask token `[b|1, 1]` and what the encoder saw."""
        seen = self.decoder_embed(encoder_outputs)
        num_removed = ids_restore.shape[1] + 1 - seen.shape[1]
        blank = old_impl(input_ids[:, :1], **kw).expand(len(seen), num_removed, -1)
        patches = torch.cat([seen[:, 1:], blank.to(seen.dtype)], dim=1).take_along_dim(ids_restore[..., None], dim=1)
        return torch.cat([seen[:, :1], patches], dim=1)

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the pixels, `[b, patches, patch_size * patch_size * in_channels]`."""
        return self.decoder_pred(logits)[:, 1:]


class PatchDecoder(BaseModel):
    """A transformer over all patches and the token before them.

    Args:
        config: the architecture.
        **transformer_overrides: see `BaseModel`.
    """

    def make_position_ids(self, input_ids: Tensor, *, ids_restore: Tensor, **kw: Any) -> Tensor:  # type: ignore[override]
        """Return 0, 1, 2, ... `[1, 1 + patches]`."""
        return torch.arange(1 + ids_restore.shape[1], device=input_ids.device)[None]


@register_model
class MAE(EncoderDecoderModel):
    """`encoder_outputs, pixels, encoder_layers, decoder_layers = model(image=image)`.

    Args:
        config: the architecture.
        **transformer_overrides: of both new backbones, see `BaseModel`.

    Args of the call:
        input_ids: the special token, which is the decoder's mask token too, `[b|1, 1]`. Omitted: 0.
        enc_position_ids: without effect, the whole table is added.
        dec_position_ids: `[s]` or `[b|1, s]`, s = 1 + patches. Omitted: 0, 1, 2, ...
        enc_attention_mask: as in `BaseModel`, over all patches. None: full.
        dec_attention_mask: as in `BaseModel`. None: full.
        image: `[b, in_channels, h, w]`.
        mask_ratio: part of the patches that is removed. Default: the configuration's.
        noise: see `MaskPatchesMixin`.
        **kw: reach the hooks of both.

    Returns encoder outputs `[b, 1 + kept, c]`, pixels `[b, patches, patch_size * patch_size * in_channels]`, and for
    each layer of each its dict; `encoder_layers[0]` holds `mask` and `ids_restore`.
    """

    config_class: ClassVar[type[TransformerConfig]] = MAEConfig
    key_maps = KEY_MAPS
    config: MAEConfig

    def __init__(self, config: MAEConfig, **transformer_overrides: Any) -> None:
        config = read_config(config, MAEConfig)
        encoder = ImageModel(config, **transformer_overrides)
        own = {"activation_func": F.gelu if config.dec_hidden_act == "gelu" else gelu}
        decoder = PatchDecoder(config.of_decoder(), **(own | transformer_overrides))
        super().__init__(config, encoder=encoder, decoder=decoder, tie_word_embeddings=False)
        encoder.add_mixin("mask_patches", MaskPatchesMixin(config.mask_ratio))
        decoder.add_mixin("mask_forward", ReconstructMixin(config, decoder.config))

    def decode(  # type: ignore[override]
        self,
        input_ids: Tensor = OMITTED,
        position_ids: Tensor | None = OMITTED,
        attention_mask: MaskLike = None,
        *,
        encoder_outputs: Tensor,
        ids_restore: Tensor,
        **kw: Any,
    ) -> list[Any]:
        """Draw the image from what the encoder saw: pixels, and outputs per layer."""
        if input_ids is OMITTED:
            input_ids = torch.zeros_like(ids_restore[:, :1])
        seen = {"encoder_outputs": encoder_outputs, "ids_restore": ids_restore}
        return self.decoder(input_ids, position_ids, attention_mask, **seen, **kw)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor = OMITTED,
        enc_position_ids: Tensor | None = None,
        dec_position_ids: Tensor | None = OMITTED,
        *,
        enc_attention_mask: MaskLike = None,
        dec_attention_mask: MaskLike = None,
        **kw: Any,
    ) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
        """Look, then draw; arguments and result are described by the class."""
        encoder_outputs, *encoder_layers = self.encoder(input_ids, enc_position_ids, enc_attention_mask, **kw)
        seen = {"encoder_outputs": encoder_outputs, "ids_restore": encoder_layers[0]["ids_restore"]}
        pixels, *decoder_layers = self.decode(input_ids, dec_position_ids, dec_attention_mask, **seen, **kw)
        return encoder_outputs, pixels, encoder_layers, decoder_layers
