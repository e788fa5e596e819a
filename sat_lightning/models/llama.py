"""LLaMA (Touvron et al. 2023, arXiv:2302.13971), and by configuration LLaMA 2 and 3, Mistral, Qwen2 and Qwen3.

What differs from the plain transformer:
- RMSNorm, SiLU and a gated MLP, in files usually without biases;
- rotary positions;
- the head has weights of its own (`mixins.lm`), unless `tie_word_embeddings`;
- the mask is causal; with `sliding_window` it also ends so many keys back (Mistral);
- with `has_qk_norm` queries and keys are normalised (Qwen3).

Two layouts, as in SAT, switched independently: with `is_rotary_emb` the backbone rotates, without it
`mixins.rotary`; with `is_gated_mlp` the backbone holds the gate, without it `mixins.mlp.gate_proj`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.mixins import GatedMLPMixin, LMHeadMixin, LocalAttentionMixin, QKNormMixin, RotaryMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.models.keymaps.llama import KEY_MAPS
from sat_lightning.nn import RMSNorm, Transformer


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig(TransformerConfig):
    """LLaMA's options, and those of its relatives."""

    tie_word_embeddings: bool = False
    """Whether the head is the table of word embeddings."""
    sliding_window: int | None = None
    """How many keys a query sees, its own among them. Default: all before it."""
    num_full_layers: int = 0
    """How many of the first layers ignore `sliding_window` (Qwen2)."""
    has_qk_norm: bool = False
    """An RMSNorm on every query and key head (Qwen3)."""

    def __post_init__(self) -> None:
        """Refuse a window of nothing."""
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ConfigError(f"sliding_window is {self.sliding_window}, it must be above 0, or left out for none.")


@register_model
class LLaMAModel(BaseModel):
    """A causal decoder with RMSNorm, a gated SiLU MLP and rotary positions.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = LLaMAConfig
    default_mask = "causal"
    key_maps = KEY_MAPS
    config: LLaMAConfig

    def __init__(
        self, config: LLaMAConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        own = {"layernorm": RMSNorm, "activation_func": F.silu, "has_position_table": False}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        config = self.config
        if not config.is_rotary_emb:
            self.add_mixin("rotary", RotaryMixin(config))
        if not config.tie_word_embeddings:
            self.add_mixin("lm", LMHeadMixin(config))
        if not config.is_gated_mlp:
            self.add_mixin("mlp", GatedMLPMixin(config, name="gate_proj"))
        if config.has_qk_norm:
            self.add_mixin("qk-norm", QKNormMixin(config))
        if config.sliding_window is not None:
            windows = [config.sliding_window if i >= config.num_full_layers else None for i in range(config.num_layers)]
            self.add_mixin("window", LocalAttentionMixin(windows))
