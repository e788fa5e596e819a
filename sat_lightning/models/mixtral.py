"""Mixtral (Jiang et al. 2024, arXiv:2401.04088).

What differs from the plain transformer:
- as LLaMA: RMSNorm, SiLU, gated MLPs, a head of its own (`mixins.lm`), a causal mask;
- rotary positions with base 1e6, in `mixins.rotary` (or in the backbone, with `is_rotary_emb`);
- each MLP is several experts; a gate (`mixins.mlp.gates`) sends every token to the best few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.mixins import LMHeadMixin, LocalAttentionMixin, RotaryMixin, TopKRoutingMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.models.keymaps.mixtral import KEY_MAPS
from sat_lightning.nn import RMSNorm, Transformer


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(TransformerConfig):
    """Mixtral's options."""

    num_experts: int = 8
    """Experts of each MLP."""
    num_experts_per_tok: int = 2
    """Experts that each token goes to."""
    rotary_base: float = 1e6
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool = False
    """Whether the head is the table of word embeddings."""
    sliding_window: int | None = None
    """How many keys a query sees, its own among them. Default: all before it."""

    def __post_init__(self) -> None:
        """Refuse more experts for a token than there are."""
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, it must be from 1 to num_experts "
                f"({self.num_experts})."
            )


@register_model
class MixtralModel(BaseModel):
    """LLaMA with several experts in each layer.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = MixtralConfig
    default_mask = "causal"
    key_maps = KEY_MAPS
    config: MixtralConfig

    def __init__(
        self, config: MixtralConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        own = {"layernorm": RMSNorm, "activation_func": F.silu, "has_position_table": False}
        super().__init__(config, transformer=transformer, **(own | transformer_overrides))
        config = self.config
        if not config.is_rotary_emb:
            self.add_mixin("rotary", RotaryMixin(config))
        if not config.tie_word_embeddings:
            self.add_mixin("lm", LMHeadMixin(config))
        if config.num_experts > 1:
            self.add_mixin("mlp", TopKRoutingMixin(config, config.num_experts_per_tok))
        if config.sliding_window is not None:
            self.add_mixin("window", LocalAttentionMixin([config.sliding_window] * config.num_layers))
