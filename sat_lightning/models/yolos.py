"""YOLOS (Fang et al. 2021, arXiv:2106.00666).

What differs from ViT:
- `num_det_tokens` special tokens after the patches, each of which finds one object;
- the heads say of each what it is and where (`mixins.det_head`);
- where `has_mid_positions`, a position table is added between any two layers (`mixins.mid_positions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins.patch_embedding import ImageConfig, whole
from sat_lightning.model import BaseMixin, register_model
from sat_lightning.models.keymaps.vit import YOLOS_KEY_MAPS
from sat_lightning.models.vit import ImageModel
from sat_lightning.nn import Transformer
from sat_lightning.nn.linear import Embedding, Linear, normal_init


@dataclass(frozen=True, kw_only=True)
class YOLOSConfig(ImageConfig):
    """YOLOS's options; `pre_len`, `post_len` and the smallest `vocab_size` follow from them."""

    position_tables: ClassVar[tuple[str, ...]] = (
        *ImageConfig.position_tables, "mixins.mid_positions.tables.*.weight",
    )  # fmt: skip

    layernorm_epsilon: float = 1e-6
    """Added to the variance inside every norm."""
    num_det_tokens: int = 100
    """Tokens that find objects: the most that an image can have."""
    num_det_classes: int = 92
    """Kinds of objects, and one for none."""
    has_mid_positions: bool = False
    """A position table between any two layers."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **how: Any) -> YOLOSConfig:
        """Read a file; in one of a ViT, what stands after the patches are detection tokens."""
        return super().from_dict({"num_det_tokens": values.get("post_len", cls.num_det_tokens), **values}, **how)

    def __post_init__(self) -> None:
        """Count the special tokens."""
        object.__setattr__(self, "pre_len", 1)
        object.__setattr__(self, "post_len", self.num_det_tokens)
        object.__setattr__(self, "vocab_size", max(self.vocab_size, 1 + self.num_det_tokens))
        super().__post_init__()


class _MLP(nn.Module):
    """Three linears with ReLU between: `[.., c]` to `[.., num_outputs]`."""

    def __init__(self, config: YOLOSConfig, num_outputs: int) -> None:
        super().__init__()
        size, init = config.hidden_size, normal_init(config.init_method_std)
        self.layers = nn.ModuleList(Linear(size, out, True, init) for out in (size, size, num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(second(first(x).relu()).relu())


class DetectionHeadMixin(BaseMixin):
    """Say of each detection token what it has found, and where.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: YOLOSConfig) -> None:
        super().__init__()
        self.num_det_tokens = config.num_det_tokens
        self.class_embed, self.bbox_embed = _MLP(config, config.num_det_classes), _MLP(config, 4)

    def final_forward(self, logits: Tensor, **kw: Any) -> dict[str, Tensor]:
        """Return `pred_logits` `[b, num_det_tokens, num_det_classes]` and `pred_boxes` `[b, num_det_tokens, 4]`.

        A box is its centre and its size, x before y, as parts of the image from 0 to 1.
        """
        found = logits[:, -self.num_det_tokens :]
        return {"pred_logits": self.class_embed(found), "pred_boxes": self.bbox_embed(found).sigmoid()}


class MidPositionsMixin(BaseMixin):
    """Add a position table behind every layer but the last.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: YOLOSConfig) -> None:
        super().__init__()
        sizes = config.max_sequence_length, config.hidden_size, normal_init(config.init_method_std)
        self.tables = nn.ModuleList(Embedding(*sizes) for _ in range(config.num_layers - 1))

    @non_conflict
    def layer_forward(
        self, hidden_states: Tensor, *args: Any, old_impl: Callable[..., Tensor], layer_id: int, **kw: Any
    ) -> Tensor:
        """Run the layer, and add its table."""
        hidden_states = old_impl(hidden_states, *args, layer_id=layer_id, **kw)
        if layer_id == len(self.tables):
            return hidden_states
        table = whole(self.tables[layer_id])
        num_in_front = hidden_states.shape[1] - table.shape[1]  # a prompt, which has no positions
        return hidden_states + (F.pad(table, (0, 0, num_in_front, 0)) if num_in_front > 0 else table)


@register_model
class YOLOS(ImageModel):
    """A finder of objects: `model(image=image)[0]` holds `pred_logits` and `pred_boxes`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **kwargs: see `ImageModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = YOLOSConfig
    key_maps = YOLOS_KEY_MAPS
    config: YOLOSConfig

    def __init__(self, config: YOLOSConfig, transformer: Transformer | None = None, **kwargs: Any) -> None:
        super().__init__(config, transformer=transformer, **kwargs)
        self.add_mixin("det_head", DetectionHeadMixin(self.config))
        if self.config.has_mid_positions:
            self.add_mixin("mid_positions", MidPositionsMixin(self.config))
