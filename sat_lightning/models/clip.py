"""CLIP (Radford et al. 2021, arXiv:2103.00020): images and texts as vectors of one space.

What differs from plain transformers:
- there are two, `image_encoder` and `text_encoder`, and a learned `logit_scale`;
- the activation is ``x * sigmoid(1.702 x)``;
- images: patches without bias, a norm behind the embeddings, a projection of the first token
  (`image_encoder.mixins.image_enc`);
- texts: causal whatever the mask, a projection of the last token (`text_encoder.mixins.text_enc`), as SAT's. Hugging
  Face's files need that of the end token (`text_end_token_id`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins import ImageConfig
from sat_lightning.model import BaseMixin, BaseModel, ComposedModel, register_model
from sat_lightning.model.adapter_ids import for_parts
from sat_lightning.model.base import OMITTED
from sat_lightning.models.keymaps.clip import KEY_MAPS
from sat_lightning.models.vit import ImageModel
from sat_lightning.nn import LayerNorm
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.masks import MaskLike, read_padding

_TEXT_NAMES = (
    "num_layers hidden_size num_attention_heads max_sequence_length inner_hidden_size hidden_size_per_attention_head "
    "layernorm_order vocab_size"
).split()


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU by one sigmoid (arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(ImageConfig):
    """The image encoder, how the text encoder differs from it, and where the two meet."""

    position_tables: ClassVar[tuple[str, ...]] = tuple(f"image_encoder.{name}" for name in ImageConfig.position_tables)

    projection_dim: int = 512
    """Features of the common space."""
    logit_scale_init_value: float = 2.6592
    """Logarithm of the factor on similarities, at first."""
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """The activation of both MLPs."""
    text_vocab_size: int = 49408
    """Rows of the table of words."""
    text_end_token_id: int | Literal["largest"] | None = None
    """The token whose first place gives the vector of a text, or the largest id's. Default: the last place."""
    text_num_layers: int | None = None
    """Layers of the text encoder. Default of this and the next six: as the image encoder."""
    text_hidden_size: int | None = None
    """Width of its residual stream."""
    text_num_attention_heads: int | None = None
    """Its query heads."""
    text_max_sequence_length: int | None = None
    """Rows of its position table."""
    text_inner_hidden_size: int | None = None
    """Width between the two linears of its MLP."""
    text_hidden_size_per_attention_head: int | None = None
    """Features of one of its heads."""
    text_layernorm_order: str | None = None
    """Where its norms stand."""

    def __post_init__(self) -> None:
        """Refuse an unknown activation."""
        super().__post_init__()
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ConfigError(f"hidden_act: unknown value {self.hidden_act!r}, known are quick_gelu, gelu.")

    def of_text(self) -> TransformerConfig:
        """Return the text encoder's own configuration."""
        given = {name: getattr(self, f"text_{name}") for name in _TEXT_NAMES}
        return self.without_image(**{name: value for name, value in given.items() if value is not None})


class ImageProjectionMixin(BaseMixin):
    """Norm the embeddings, and project the first token: `[b, s, c]` to `[b, projection_dim]`.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        size, init = config.hidden_size, normal_init(config.init_method_std)
        self.pre_layernorm = LayerNorm(size, eps=config.layernorm_epsilon)
        self.visual_projection = Linear(size, config.projection_dim, False, init)

    @non_conflict
    def layer_forward(
        self, hidden_states: Tensor, *args: Any, old_impl: Callable[..., Tensor], layer_id: int, **kw: Any
    ) -> Tensor:
        """Norm before layer 0."""
        hidden_states = hidden_states if layer_id else self.pre_layernorm(hidden_states)
        return old_impl(hidden_states, *args, layer_id=layer_id, **kw)

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the image's vector."""
        return self.visual_projection(logits[:, 0])


class TextProjectionMixin(BaseMixin):
    """Project the token at `text_ends` `[b]`, or the last: `[b, s, c]` to `[b, projection_dim]`.

    Args:
        config: gives the width.
        projection_dim: features of the common space.
    """

    def __init__(self, config: TransformerConfig, projection_dim: int) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        self.text_projection = Linear(config.hidden_size, projection_dim, False, init)

    def final_forward(self, logits: Tensor, text_ends: Tensor | None = None, **kw: Any) -> Tensor:
        """Return the text's vector."""
        if text_ends is None:
            return self.text_projection(logits[:, -1])
        return self.text_projection(logits.take_along_dim(text_ends[:, None, None], dim=1)[:, 0])


class TextEncoder(BaseModel):
    """A causal reader of texts.

    Args:
        config: the architecture.
        end_token_id: see `CLIPConfig.text_end_token_id`.
        **transformer_overrides: see `BaseModel`.
    """

    default_mask = "causal"

    def __init__(self, config: TransformerConfig, end_token_id: int | str | None, **transformer_overrides: Any) -> None:
        super().__init__(config, **transformer_overrides)
        self.end_token_id = end_token_id

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = OMITTED,
        attention_mask: MaskLike = OMITTED,
        **kw: Any,
    ) -> list[Any]:
        """Run the model; arguments and result are those of `BaseModel`."""
        if self.end_token_id is not None:
            is_largest = self.end_token_id == "largest"
            scores = input_ids if is_largest else input_ids.eq(self.end_token_id).int()  # type: ignore[arg-type]
            kw["text_ends"] = scores.argmax(dim=-1)
        return super().forward(input_ids, position_ids, attention_mask, **kw)

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read `[b, s]` as padding, and hide later words, whatever the mask."""
        mask = read_padding(attention_mask, input_ids)
        if not isinstance(mask, Tensor):
            return "causal" if mask is None else mask
        length = input_ids.shape[1]
        return mask * torch.ones(length, length, dtype=mask.dtype, device=mask.device).tril()


@register_model
class CLIP(ComposedModel):
    """`image_embeds, text_embeds, logits_per_text, logits_per_image = model(image=image, text_input_ids=text)`.

    Args:
        config: the architecture.
        **transformer_overrides: of both new backbones, see `BaseModel`.

    Args of the call:
        image_input_ids: the special tokens, `[b|1, 1]`. Omitted: 0.
        image_position_ids: without effect, the whole table is added.
        text_input_ids: `[t, s]`.
        text_position_ids: `[s]` or `[t|1, s]`. Omitted: 0, 1, 2, ...
        image_attention_mask: as in `BaseModel`. None: full.
        text_attention_mask: `[t, s]` (1 is a token, 0 padding), or as in `BaseModel`; causal, whatever it is.
        image: `[b, in_channels, h, w]`.
        **kw: reach the hooks of both.

    Returns vectors of length 1, `[b, projection_dim]` and `[t, projection_dim]`, and their scaled similarities `[t, b]`
    and `[b, t]`.
    """

    config_class: ClassVar[type[TransformerConfig]] = CLIPConfig
    key_maps = KEY_MAPS
    config: CLIPConfig
    image_encoder: ImageModel
    text_encoder: TextEncoder

    def __init__(self, config: CLIPConfig, **transformer_overrides: Any) -> None:
        super().__init__(config)
        config = self.config
        overrides = {"activation_func": F.gelu if config.hidden_act == "gelu" else quick_gelu} | transformer_overrides
        self.image_encoder = ImageModel(config, has_patch_bias=False, **overrides)
        self.image_encoder.add_mixin("image_enc", ImageProjectionMixin(config))
        self.text_encoder = TextEncoder(config.of_text(), config.text_end_token_id, **overrides)
        projection = TextProjectionMixin(self.text_encoder.config, config.projection_dim)
        self.text_encoder.add_mixin("text_enc", projection)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))

    def encode_image(
        self,
        input_ids: Tensor = OMITTED,
        position_ids: Tensor | None = None,
        attention_mask: MaskLike = None,
        **kw: Any,
    ) -> list[Any]:
        """Return vectors `[b, projection_dim]` of images, and the outputs per layer."""
        return self.image_encoder(input_ids, position_ids, attention_mask, **kw)

    def encode_text(
        self, input_ids: Tensor, position_ids: Tensor | None = OMITTED, attention_mask: MaskLike = None, **kw: Any
    ) -> list[Any]:
        """Return vectors `[t, projection_dim]` of texts, and the outputs per layer."""
        return self.text_encoder(input_ids, position_ids, attention_mask, **kw)

    def forward(
        self,
        image_input_ids: Tensor = OMITTED,
        image_position_ids: Tensor | None = None,
        text_input_ids: Tensor = OMITTED,
        text_position_ids: Tensor | None = OMITTED,
        *,
        image_attention_mask: MaskLike = None,
        text_attention_mask: MaskLike = None,
        image: Tensor | None = None,
        **kw: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compare images and texts; arguments and result are described by the class."""
        if text_input_ids is OMITTED:
            raise InputError("CLIP compares images with texts: give text_input_ids, or call encode_image(image=...).")
        kw = for_parts(self, kw)
        images = self.encode_image(image_input_ids, image_position_ids, image_attention_mask, image=image, **kw)
        texts = self.encode_text(text_input_ids, text_position_ids, text_attention_mask, **kw)
        image_embeds, text_embeds = F.normalize(images[0], dim=-1), F.normalize(texts[0], dim=-1)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        return image_embeds, text_embeds, logits_per_text, logits_per_text.T
