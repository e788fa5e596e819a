"""GLM-4V: GLM-4 (arXiv:2406.12793) that sees images.

What differs from ChatGLM4:
- images go through an EVA-CLIP encoder of its own configuration, `eva_args`; a convolution joins each 2 x 2 of its
  features, a gated MLP gives them the width of words, and a begin and an end are put around (`mixins.eva`);
- these stand in the place of the words where `image_embed_mask` is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.hooks import non_conflict
from sat_lightning.model import BaseMixin, register_model
from sat_lightning.models.chatglm2 import ChatGLM4Config, ChatGLM4Model
from sat_lightning.models.eva2clip import EVA2CLIPModel
from sat_lightning.nn import LayerNorm, Transformer
from sat_lightning.nn.linear import InitMethod, Linear, PatchLinear, normal_init
from sat_lightning.nn.masks import waiting_keys

_PREFIX = "vision_"


@dataclass(frozen=True, kw_only=True)
class GLM4VConfig(ChatGLM4Config):
    """GLM-4V's options."""

    eva_args: Mapping[str, Any] = field(default_factory=dict)
    """The image encoder's `model_config.json`."""
    proj_hidden_size: int | None = None
    """Width between the convolution and the MLP. Default: `hidden_size`."""
    image_length: int | None = None
    """SAT's note of how many features an image has; `eva_args` decides."""

    def image_config(self) -> Any:  # noqa: ANN401
        """Return the image encoder's configuration."""
        return EVA2CLIPModel.config_class.from_dict(self.eva_args)


class _Projection(nn.Module):
    """A linear, norm and GELU, then a gated MLP; `[.., inputs]` to `[.., c]`."""

    def __init__(self, config: TransformerConfig, inputs: int, init: InitMethod) -> None:
        super().__init__()
        size = config.hidden_size
        self.linear_proj = Linear(inputs, size, False, init)
        self.norm1 = LayerNorm(size)
        self.dense_h_to_4h = Linear(size, config.inner_size, False, init)
        self.gate_proj = Linear(size, config.inner_size, False, init)
        self.dense_4h_to_h = Linear(config.inner_size, size, False, init)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class ImageWordsMixin(BaseMixin):
    """Put features of images in the place of words.

    Args:
        config: the model's, with that of the image encoder.
    """

    def __init__(self, config: GLM4VConfig) -> None:
        super().__init__()
        image, init = config.image_config(), normal_init(config.init_method_std)
        self.vit_model, self.grid = EVA2CLIPModel(image), image.grid
        width = config.proj_hidden_size or config.hidden_size
        self.conv = PatchLinear(image.hidden_size, width, 2, True, init)
        self.linear_proj = _Projection(config, width, init)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, config.hidden_size)) for _ in range(2))

    def forward(self, **kw: Any) -> Tensor:
        """Encode images: `[n, features + 2, c]`; the keywords are those of the image encoder's call."""
        features = self.vit_model(**kw)[0].transpose(1, 2).unflatten(2, self.grid)  # [n, e, rows, columns]
        features = self.linear_proj(self.conv(features).flatten(2).transpose(1, 2))
        begin, end = (x.to(features.dtype).expand(len(features), -1, -1) for x in (self.boi, self.eoi))
        return torch.cat([begin, features, end], dim=1)

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, *, old_impl: Callable[..., Tensor], image_embed_mask: Tensor | None = None, **kw: Any
    ) -> Tensor:
        """Look words up, and put images where the mask is 1, one after the other, row by row."""
        words = old_impl(input_ids, **kw)
        vision = {name.removeprefix(_PREFIX): value for name, value in kw.items() if name.startswith(_PREFIX)}
        is_seen = image_embed_mask is not None and image_embed_mask.shape == input_ids.shape
        if vision.get("image") is None or (waiting_keys(kw) and not is_seen):  # a cache holds the images already
            return words
        if image_embed_mask is None or not is_seen:
            found = "missing" if image_embed_mask is None else f"of shape {list(image_embed_mask.shape)}"
            raise InputError(
                f"image_embed_mask is {found}; with vision_image it must be {list(input_ids.shape)}, as input_ids, and "
                "1 where features of images stand. Leave both out where a past holds the images already."
            )
        features, is_image = self(**vision).flatten(0, 1).to(words.dtype), image_embed_mask.bool()
        places = is_image.flatten().cumsum(0).view_as(image_embed_mask) - 1
        count = len(features)
        torch._assert_async(  # nobody waits for the device to learn how many there are
            is_image.sum() == count,
            f"image_embed_mask must have as many ones as there are features of images with begin and end: {count}.",
        )
        return torch.where(is_image[..., None], features[places.clamp(0, count - 1)], words)


@register_model
class GLM4VModel(ChatGLM4Model):
    """A causal decoder that sees: `model(input_ids, image_embed_mask=mask, vision_image=images)`.

    Args of the call are those of `ChatGLM2Model`, and every `vision_<name>` is `<name>` of the image encoder's call:
    `vision_image` `[n, in_channels, h, w]` has the images of the whole batch in order, and `image_embed_mask` `[b, s]`
    is 1 where their features stand, begin and end among them.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = GLM4VConfig
    key_maps = ()
    config: GLM4VConfig

    def __init__(
        self, config: GLM4VConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        self.add_mixin("eva", ImageWordsMixin(self.config))
