"""What a token passes through: masks, norms, attention, MLP, layer, transformer."""

from sat_lightning.nn.attention_fn import attention_fn_default, standard_attention
from sat_lightning.nn.mlp import gelu
from sat_lightning.nn.norm import LayerNorm, RMSNorm
from sat_lightning.nn.transformer import Transformer

__all__ = ["LayerNorm", "RMSNorm", "Transformer", "attention_fn_default", "gelu", "standard_attention"]
