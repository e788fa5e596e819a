"""GLM-130B (Zeng et al. 2022, arXiv:2210.02414).

What differs from the plain transformer:
- post order with DeepNorm: the residual counts sqrt(2 * num_layers) times;
- the fused projection lies head by head, `[q0 | k0 | v0 | q1 | ...]`;
- the MLP is GEGLU: `dense_h_to_4h` has twice the rows, first half times GELU of the second (unless `no_glu`);
- rotary positions, `[b, s]` or with `position_encoding_2d` of two rows `[b, 2, s]`;
- an omitted mask is causal; in a caller's mask tensor 1 (True) is where a query may NOT look;
- `outputs_per_layer` holds hidden states `[s, b, c]`, and out of training `mem_kv` `[b, s, 2 * h * d]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.mixins import RotaryMixin
from sat_lightning.model import BaseMixin, BaseModel, register_model
from sat_lightning.model.base import read_config
from sat_lightning.nn import Transformer
from sat_lightning.nn.linear import Linear
from sat_lightning.nn.masks import MaskLike


@dataclass(frozen=True, kw_only=True)
class GLM130BConfig(TransformerConfig):
    """GLM-130B's options."""

    layernorm_order: Literal["pre", "post", "sandwich"] = "post"
    """Where the norms of a layer stand; drawn in `sat_lightning.nn.layer`."""
    position_encoding_2d: bool = False
    """Positions of two rows, as in ChatGLM."""
    no_glu: bool = False
    """A plain MLP."""


class GEGLUMixin(BaseMixin):
    """`dense_4h_to_h(a * gelu(b))`, where `dense_h_to_4h` gives a and b at once (Shazeer 2020, arXiv:2002.05202)."""

    def mlp_forward(self, hidden_states: Tensor, *, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer's MLP with the gate."""

        def activate(x: Tensor, inner: Tensor) -> Tensor:
            first, second = inner.chunk(2, dim=-1)
            return first * F.gelu(second)

        return self.transformer.layers[layer_id].mlp.feed(hidden_states, activate=activate, layer_id=layer_id, **kw)


class HeadwiseProjectionMixin(BaseMixin):
    """Read a `query_key_value` that lies head by head."""

    @non_conflict
    def linear_forward(self, x: Tensor, *, name: str, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        """Lay `[q0 | k0 | v0 | q1 | ...]` out as `[all q | all k | all v]`."""
        output = old_impl(x, name=name, **kw)
        if name != "query_key_value":
            return output
        num_heads = self.transformer.config.num_attention_heads
        return output.unflatten(-1, (num_heads, 3, -1)).transpose(-3, -2).flatten(-3)


class KeyValueMemoryMixin(BaseMixin):
    """Give every layer's new keys and values back as `mem_kv`, out of training."""

    @non_conflict
    @passes_mask
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        dropout_fn: nn.Module | None,
        *,
        old_impl: Callable[..., Tensor],
        **kw: Any,
    ) -> Tensor:
        """Attend; the memory is `[b, s, k heads | v heads]`."""
        if not self.training and not kw.get("is_cached"):  # a cache remembers by itself
            pair = torch.stack((key, value), dim=1)  # [b, 2, h, s, d]
            kw["output_this_layer"]["mem_kv"] = pair.permute(0, 3, 1, 2, 4).flatten(2).detach()
        return old_impl(query, key, value, mask, dropout_fn, **kw)


@register_model
class GLM130B(BaseModel):
    """A decoder that fills blanks, with DeepNorm, GEGLU and rotary positions.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = GLM130BConfig
    default_mask = "causal"
    config: GLM130BConfig

    def __init__(
        self, config: GLM130BConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        config = read_config(config, GLM130BConfig)
        if config.inner_hidden_size is None and not config.no_glu:
            config = config.replace(inner_hidden_size=4 * config.hidden_size * 2 // 3)
        own = {"has_position_table": False, "residual_scale": (2 * config.num_layers) ** 0.5}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        config = self.config
        is_2d = config.position_encoding_2d
        dim = config.hidden_size // config.num_attention_heads // (2 if is_2d else 1)
        rotary = RotaryMixin(config, dim=dim, num_axes=2 if is_2d else 1, is_fixed=True)
        self.add_mixin("rotary-embedding", rotary)
        self.add_mixin("headwise-projection", HeadwiseProjectionMixin())
        self.add_mixin("memory", KeyValueMemoryMixin())
        if not config.no_glu:
            self.add_mixin("glu-deepnorm", GEGLUMixin())
            if transformer is None:
                self._double_inner_rows()

    def forward(self, *args: Any, **kw: Any) -> list[Any]:
        """Run the model; hidden states of layers come as `[s, b, c]`, as SAT's do."""
        logits, *outputs_per_layer = super().forward(*args, **kw)
        for outputs in outputs_per_layer:
            if "hidden_states" in outputs:
                outputs["hidden_states"] = outputs["hidden_states"].transpose(0, 1)
        return [logits, *outputs_per_layer]

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor:
        """Return 0, 1, 2, ..., with a second row of zeros where positions have two."""
        places = super().make_position_ids(input_ids, **kw)
        assert places is not None
        return torch.stack([places, torch.zeros_like(places)], dim=1) if self.config.position_encoding_2d else places

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read 1 as masked."""
        if not isinstance(attention_mask, Tensor):
            return attention_mask
        return ~attention_mask if attention_mask.dtype == torch.bool else 1 - attention_mask

    def _double_inner_rows(self) -> None:
        config = self.config
        for layer in self.transformer.layers:
            init = self.transformer.init_method
            wide = Linear(config.hidden_size, 2 * config.inner_size, config.use_bias, init)
            layer.mlp.dense_h_to_4h = wide.to(self.transformer.word_embeddings.weight.dtype)
