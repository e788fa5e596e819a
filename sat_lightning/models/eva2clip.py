"""The image encoder of EVA-CLIP (Sun et al. 2023, arXiv:2303.15389), which gives features of patches.

What differs from ViT:
- norms stand behind attention and MLP, before the residual is added (`mixins.branch-norms`);
- there is no head: the result are the features of all tokens but the first.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins.patch_embedding import ImageConfig
from sat_lightning.model import BaseMixin, register_model
from sat_lightning.models.vit import ImageModel
from sat_lightning.nn import Transformer
from sat_lightning.nn.drop_path import drop_path


class BranchNormsMixin(BaseMixin):
    """``x + norm(attention(x))``, then ``x + norm(mlp(x))``."""

    def layer_forward(self, hidden_states: Tensor, mask: Tensor, *args: Any, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer: `[b, s, c]` to `[b, s, c]`."""
        layer: Any = self.transformer.layers[layer_id]
        attended = layer.input_layernorm(layer.attention(hidden_states, mask=mask, layer_id=layer_id, **kw))
        hidden_states = hidden_states + drop_path(attended, layer.drop_path, layer.training)
        fed = layer.post_attention_layernorm(layer.mlp(hidden_states, layer_id=layer_id, **kw))
        return hidden_states + drop_path(fed, layer.drop_path, layer.training)


class LaterTokensMixin(BaseMixin):
    """Give the features of all tokens but the first: `[b, s, c]` to `[b, s - 1, c]`."""

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Take them."""
        return logits[:, 1:]


@register_model
class EVA2CLIPModel(ImageModel):
    """Features of patches: `model(image=image)[0]` is `[b, patches, c]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **kwargs: see `ImageModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = ImageConfig
    config: ImageConfig

    def __init__(self, config: ImageConfig, transformer: Transformer | None = None, **kwargs: Any) -> None:
        super().__init__(config, transformer=transformer, **kwargs)
        self.add_mixin("branch-norms", BranchNormsMixin())
        self.add_mixin("eva2clip-final", LaterTokensMixin())
