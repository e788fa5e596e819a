"""One idea, one file: changes that fit any model."""

from sat_lightning.mixins.gated_mlp import GatedMLPMixin
from sat_lightning.mixins.lm_head import LMHeadMixin
from sat_lightning.mixins.local_attention import LocalAttentionMixin
from sat_lightning.mixins.masked_lm_head import MaskedLMHeadMixin
from sat_lightning.mixins.past_key_values import PastKeyValuesMixin
from sat_lightning.mixins.pooler import PoolerMixin
from sat_lightning.mixins.qk_norm import QKNormMixin
from sat_lightning.mixins.relative_bias import RelativeBiasMixin
from sat_lightning.mixins.rotary import RotaryMixin
from sat_lightning.mixins.routing import TopKRoutingMixin
from sat_lightning.mixins.token_types import TokenTypesMixin

__all__ = [
    "GatedMLPMixin",
    "LMHeadMixin",
    "LocalAttentionMixin",
    "MaskedLMHeadMixin",
    "PastKeyValuesMixin",
    "PoolerMixin",
    "QKNormMixin",
    "RelativeBiasMixin",
    "RotaryMixin",
    "TokenTypesMixin",
    "TopKRoutingMixin",
]
