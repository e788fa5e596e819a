"""One idea, one file: changes that fit any model; each is loaded when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lightning.mixins.adapter import AdapterMixin
    from sat_lightning.mixins.attention_maps import AttentionMapsMixin
    from sat_lightning.mixins.bitfit import BitFitMixin
    from sat_lightning.mixins.cached_autoregressive import CachedAutoregressiveMixin
    from sat_lightning.mixins.combine import combine_loras
    from sat_lightning.mixins.distilled_classifier import DistilledClassifierMixin
    from sat_lightning.mixins.dora import DoraMixin
    from sat_lightning.mixins.ffadd import FFADDMixin
    from sat_lightning.mixins.gated_mlp import GatedMLPMixin
    from sat_lightning.mixins.ia3 import IA3Mixin
    from sat_lightning.mixins.layernorm_tuning import LayerNormTuningMixin
    from sat_lightning.mixins.lm_head import LMHeadMixin
    from sat_lightning.mixins.local_attention import LocalAttentionMixin
    from sat_lightning.mixins.lora import LoRAMixin, LoraMixin
    from sat_lightning.mixins.masked_lm_head import MaskedLMHeadMixin
    from sat_lightning.mixins.mlp_head import MLPHeadMixin, TaskHeadsMixin
    from sat_lightning.mixins.no_mixin import NoMixin
    from sat_lightning.mixins.past_key_values import PastKeyValuesMixin
    from sat_lightning.mixins.patch_embedding import ImageConfig, PatchEmbeddingMixin, WholeTableMixin
    from sat_lightning.mixins.pooler import PoolerMixin
    from sat_lightning.mixins.prefix_tuning import PrefixTuningMixin, PTuningV2Mixin
    from sat_lightning.mixins.prompt_tuning import PromptTuningMixin
    from sat_lightning.mixins.qk_norm import QKNormMixin
    from sat_lightning.mixins.quantized import QuantizedBaseMixin, dequantize_base, quantize_base
    from sat_lightning.mixins.relative_bias import RelativeBiasMixin
    from sat_lightning.mixins.rotary import RotaryMixin
    from sat_lightning.mixins.routing import TopKRoutingMixin
    from sat_lightning.mixins.static_cache import KeyValueCache, StaticCacheMixin
    from sat_lightning.mixins.token_types import TokenTypesMixin
    from sat_lightning.mixins.tuning import TuningMixin

__all__ = [
    "AdapterMixin",
    "AttentionMapsMixin",
    "BitFitMixin",
    "CachedAutoregressiveMixin",
    "DistilledClassifierMixin",
    "DoraMixin",
    "FFADDMixin",
    "GatedMLPMixin",
    "IA3Mixin",
    "ImageConfig",
    "KeyValueCache",
    "LMHeadMixin",
    "LayerNormTuningMixin",
    "LoRAMixin",
    "LocalAttentionMixin",
    "LoraMixin",
    "MLPHeadMixin",
    "MaskedLMHeadMixin",
    "NoMixin",
    "PTuningV2Mixin",
    "PastKeyValuesMixin",
    "PatchEmbeddingMixin",
    "PoolerMixin",
    "PrefixTuningMixin",
    "PromptTuningMixin",
    "QKNormMixin",
    "QuantizedBaseMixin",
    "RelativeBiasMixin",
    "RotaryMixin",
    "StaticCacheMixin",
    "TaskHeadsMixin",
    "TokenTypesMixin",
    "TopKRoutingMixin",
    "TuningMixin",
    "WholeTableMixin",
    "combine_loras",
    "dequantize_base",
    "quantize_base",
]

# The names of each module.
_LAZY = {
    "adapter": "AdapterMixin",
    "attention_maps": "AttentionMapsMixin",
    "bitfit": "BitFitMixin",
    "cached_autoregressive": "CachedAutoregressiveMixin",
    "combine": "combine_loras",
    "distilled_classifier": "DistilledClassifierMixin",
    "dora": "DoraMixin",
    "ffadd": "FFADDMixin",
    "gated_mlp": "GatedMLPMixin",
    "ia3": "IA3Mixin",
    "layernorm_tuning": "LayerNormTuningMixin",
    "lm_head": "LMHeadMixin",
    "local_attention": "LocalAttentionMixin",
    "lora": "LoRAMixin LoraMixin",
    "masked_lm_head": "MaskedLMHeadMixin",
    "mlp_head": "MLPHeadMixin TaskHeadsMixin",
    "no_mixin": "NoMixin",
    "past_key_values": "PastKeyValuesMixin",
    "patch_embedding": "ImageConfig PatchEmbeddingMixin WholeTableMixin",
    "pooler": "PoolerMixin",
    "prefix_tuning": "PTuningV2Mixin PrefixTuningMixin",
    "prompt_tuning": "PromptTuningMixin",
    "qk_norm": "QKNormMixin",
    "quantized": "QuantizedBaseMixin dequantize_base quantize_base",
    "relative_bias": "RelativeBiasMixin",
    "rotary": "RotaryMixin",
    "routing": "TopKRoutingMixin",
    "static_cache": "KeyValueCache StaticCacheMixin",
    "token_types": "TokenTypesMixin",
    "tuning": "TuningMixin",
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names.split():
            return getattr(importlib.import_module(f"sat_lightning.mixins.{module}"), name)
    raise AttributeError(f"module 'sat_lightning.mixins' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
