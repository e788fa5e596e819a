"""EVA-02 (Fang et al. 2023, arXiv:2303.11331), which guesses the features of masked patches.

What differs from ViT:
- a learned token stands in for masked patches (`mixins.patch_embedding.mask_token`);
- queries and keys of patches are rotated by row and column (`mixins.eva2-attn`);
- SiLU and a gate in the MLP, and a norm on what they give (`mixins.eva2-mlp`);
- the head gives features of the masked patches, or of all (`mixins.eva2-final`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.mixins import GatedMLPMixin
from sat_lightning.mixins.patch_embedding import ImageConfig, PatchEmbeddingMixin
from sat_lightning.model import BaseMixin, register_model
from sat_lightning.models.vit import ImageModel
from sat_lightning.nn import LayerNorm, Transformer
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class EVA2Config(ImageConfig):
    """EVA-02's options."""

    predict_feature_dim: int = 768
    """Features that the head gives of each patch."""

    def __post_init__(self) -> None:
        """Refuse heads whose features are no pairs for rows and for columns."""
        super().__post_init__()
        if self.head_size % 4:
            raise ConfigError(
                f"heads have {self.head_size} features; rotation by rows and columns needs fours of them."
            )


class MaskedPatchesMixin(PatchEmbeddingMixin):
    """Embed patches, and put one learned token in the place of those that are masked.

    Args:
        config: gives the sizes.
        bias: whether the convolution has one.
    """

    def __init__(self, config: ImageConfig, bias: bool = True) -> None:
        super().__init__(config, bias)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        normal_init(config.init_method_std)(self.mask_token)

    def embed_patches(self, image: Tensor, bool_masked_pos: Tensor | None = None, **kw: Any) -> Tensor:
        """Embed `[b, in_channels, h, w]`: `[b, patches, c]`; True in `bool_masked_pos` `[b, patches]` is masked."""
        patches = super().embed_patches(image, **kw)
        if bool_masked_pos is None:
            return patches
        if bool_masked_pos.shape != patches.shape[:2]:
            raise InputError(
                f"bool_masked_pos has shape {list(bool_masked_pos.shape)}; for the patches of this batch it must be "
                f"{list(patches.shape[:2])}."
            )
        return torch.where(bool_masked_pos[..., None].bool(), self.mask_token, patches)


class _Rope(nn.Module):
    """Tables of cos and sin, `[patches, d]`: the first half of a head follows the row, the second the column."""

    def __init__(self, grid: tuple[int, int], head_size: int) -> None:
        super().__init__()
        frequency = 10000.0 ** -(torch.arange(0, head_size // 2, 2) / (head_size // 2))
        row, column = (torch.arange(side)[:, None] * frequency for side in grid)
        angles = torch.cat([row[:, None].expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)], dim=-1)
        angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())


class PatchRotaryMixin(BaseMixin):
    """Rotate queries and keys of patches by their row and column; special tokens stay.

    Args:
        config: gives grid and head size.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.lengths = [config.num_patches, config.post_len]
        self.rope = _Rope(config.grid, config.head_size)

    def query_key_forward(self, query: Tensor, key: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        """Rotate `[b, h, s, d]`."""
        return self._turn(query), self._turn(key)

    def _turn(self, x: Tensor) -> Tensor:
        # Counted from behind: a prompt may stand in front.
        before, patches, after = x.split([x.shape[2] - sum(self.lengths), *self.lengths], dim=2)
        cos, sin = (table[:, ::2].to(x.dtype) for table in self.rope.buffers())
        return torch.cat([before, rotate(patches, cos, sin, interleaved=True), after], dim=2)


class NormedGateMixin(GatedMLPMixin):
    """``dense_4h_to_h(norm(act(dense_h_to_4h(x)) * w2(x)))``.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, name="w2", activates_gate=False, bias=config.use_bias)
        epsilon = config.layernorm_epsilon
        self.ffn_ln = nn.ModuleList(LayerNorm(config.inner_size, eps=epsilon) for _ in range(config.num_layers))

    def finish(self, inner: Tensor, layer_id: int) -> Tensor:
        """Normalise."""
        return self.ffn_ln[layer_id](inner)


class PatchFeaturesMixin(BaseMixin):
    """Give features of masked patches, or of all.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: EVA2Config) -> None:
        super().__init__()
        self.patches = slice(config.pre_len, config.pre_len + config.num_patches)
        init = normal_init(config.init_method_std)
        self.lm_head = Linear(config.hidden_size, config.predict_feature_dim, True, init)

    def final_forward(
        self, logits: Tensor, bool_masked_pos: Tensor | None = None, num_masked_pos: int | None = None, **kw: Any
    ) -> Tensor:
        """Return `[b, patches, predict_feature_dim]`, or of masked patches only `[n, predict_feature_dim]`."""
        patches = logits[:, self.patches]
        if bool_masked_pos is None:
            return self.lm_head(patches)
        is_masked = bool_masked_pos.bool()
        if num_masked_pos is None:
            return self.lm_head(patches[is_masked])
        places = torch.argsort(~is_masked.flatten(), stable=True)[:num_masked_pos]
        return self.lm_head(patches.flatten(0, 1)[places])


@register_model
class EVA2Model(ImageModel):
    """Guess features of masked patches: `model(image=image, bool_masked_pos=mask)[0]` is `[n, predict_feature_dim]`.

    Without `bool_masked_pos` `[b, patches]` the result is `[b, patches, predict_feature_dim]`. Its size n is read from
    the mask, for which the host waits; who knows it says `num_masked_pos=n`, of the whole batch.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **kwargs: see `ImageModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = EVA2Config
    config: EVA2Config

    def __init__(self, config: EVA2Config, transformer: Transformer | None = None, **kwargs: Any) -> None:
        super().__init__(config, transformer=transformer, **({"activation_func": F.silu} | kwargs))
        self.add_mixin("eva2-final", PatchFeaturesMixin(self.config))
        self.add_mixin("eva2-mlp", NormedGateMixin(self.config))
        self.add_mixin("eva2-attn", PatchRotaryMixin(self.config))

    def make_patch_embedding(self, has_bias: bool) -> PatchEmbeddingMixin:
        """Return the embedding that masks."""
        return MaskedPatchesMixin(self.config, has_bias)
