"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), and DeiT (Touvron et al. 2020, arXiv:2012.12877).

What differs from the plain transformer:
- tokens are patches of an image, between special tokens (`mixins.patch_embedding`);
- the whole position table is added (`mixins.pos_embedding`);
- exact GELU;
- the head classifies the first token (`mixins.cls`). In DeiT (`pre_len=2`) a second token learns
  from a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.mixins.patch_embedding import ImageConfig, PatchEmbeddingMixin, WholeTableMixin
from sat_lightning.model import BaseMixin, BaseModel, register_model
from sat_lightning.model.base import OMITTED
from sat_lightning.models.keymaps.vit import VIT_KEY_MAPS
from sat_lightning.nn import Transformer
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.masks import MaskLike


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageConfig):
    """ViT's options."""

    num_classes: int = 1000
    """Outputs of the head."""


class ClassifierMixin(BaseMixin):
    """Classify the image by its first token: `[b, s, c]` to `[b, num_classes]`.

    Args:
        config: gives the width.
        num_classes: outputs of the head.
    """

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__()
        self.classifier = Linear(config.hidden_size, num_classes, True, normal_init(config.init_method_std))

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the score of each class."""
        return self.classifier(logits[:, 0])


class ImageModel(BaseModel):
    """A transformer over the patches of an image: `model(image=image)`, without a head of its own.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        has_patch_bias: whether the convolution that embeds patches has a bias.
        **transformer_overrides: see `BaseModel`.

    Args of the call are those of `BaseModel`, and `image` `[b, in_channels, h, w]`. `input_ids` are the special tokens
    `[b|1, pre_len + post_len]`; omitted: 0, 1, 2, ... `position_ids` say nothing.
    """

    config_class: ClassVar[type[TransformerConfig]] = ImageConfig
    config: ImageConfig

    def __init__(
        self,
        config: ImageConfig,
        transformer: Transformer | None = None,
        *,
        has_patch_bias: bool = True,
        **transformer_overrides: Any,
    ) -> None:
        super().__init__(config, transformer=transformer, **({"activation_func": F.gelu} | transformer_overrides))
        self.add_mixin("patch_embedding", self.make_patch_embedding(has_patch_bias))
        self.add_mixin("pos_embedding", WholeTableMixin())

    def forward(
        self,
        input_ids: Tensor = OMITTED,
        position_ids: Tensor | None = None,
        attention_mask: MaskLike = OMITTED,
        **kw: Any,
    ) -> list[Any]:
        """Run the model; arguments and result are described by the class."""
        if input_ids is OMITTED:
            input_ids = self.make_input_ids(**kw)
        return super().forward(input_ids, position_ids, attention_mask, **kw)

    def make_patch_embedding(self, has_bias: bool) -> PatchEmbeddingMixin:
        """Return what embeds patches; a family with another one builds it here."""
        return PatchEmbeddingMixin(self.config, has_bias)

    def make_input_ids(self, image: Tensor | None = None, **kw: Any) -> Tensor:
        """Return the special tokens of a caller who gave none, `[b, pre_len + post_len]`."""
        if image is None:
            raise InputError(f"{type(self).__name__} needs image=[batch, in_channels, height, width].")
        return torch.arange(self.config.pre_len + self.config.post_len, device=image.device).expand(len(image), -1)

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> None:
        """Return none: the whole table is added."""


@register_model
class ViTModel(ImageModel):
    """A classifier of images: `model(image=image)[0]` is `[b, num_classes]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **kwargs: see `ImageModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ViTConfig
    key_maps = VIT_KEY_MAPS
    config: ViTConfig

    def __init__(self, config: ViTConfig, transformer: Transformer | None = None, **kwargs: Any) -> None:
        super().__init__(config, transformer=transformer, **kwargs)
        self.add_mixin("cls", ClassifierMixin(self.config, self.config.num_classes))
