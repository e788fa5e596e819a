"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

What differs from the plain transformer:
- the mask is causal;
- the head has its own weights (`mixins.gpt2-final.lm_head`), where the paper ties them to the word embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins import LMHeadMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.model.keymap import KeyMap, Rule, Transpose, require
from sat_lightning.nn import Transformer

# Dropout is a choice of the training, not of the weights: it is neither read nor written.
_FIELDS = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_sequence_length",
    "n_inner": "inner_hidden_size",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "layernorm_epsilon",
}


def config_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of their config.json."""
    require(
        values,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    return {ours: values[theirs] for theirs, ours in _FIELDS.items() if theirs in values}


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Write the fields of their config.json."""
    return {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()} | {"activation_function": "gelu_new"}


KEY_MAP = KeyMap(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    prefix="transformer.",
    rules=(
        Rule("transformer.word_embeddings.weight", "transformer.wte.weight"),
        Rule("transformer.position_embeddings.weight", "transformer.wpe.weight"),
        *(
            Rule(f"transformer.layers.{{i}}.{ours}.{{kind}}", f"transformer.h.{{i}}.{theirs}.{{kind}}", Transpose())
            for ours, theirs in {
                "input_layernorm": "ln_1",
                "attention.query_key_value": "attn.c_attn",
                "attention.dense": "attn.c_proj",
                "post_attention_layernorm": "ln_2",
                "mlp.dense_h_to_4h": "mlp.c_fc",
                "mlp.dense_4h_to_h": "mlp.c_proj",
            }.items()
        ),
        Rule("transformer.final_layernorm.{kind}", "transformer.ln_f.{kind}"),
        Rule("mixins.gpt2-final.lm_head.weight", "lm_head.weight"),
    ),
    tied={"lm_head.weight": "transformer.wte.weight"},
    is_tied_by_default=True,
    buffers={
        "transformer.h.{i}.attn.bias": lambda c: torch.ones(1, 1, c.max_sequence_length, c.max_sequence_length).tril(),
        "transformer.h.{i}.attn.masked_bias": lambda c: torch.tensor(-1e4),
    },
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
)


@register_model
class GPT2Model(BaseModel):
    """A causal decoder with learned positions, norms before each block, tanh-GELU.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    default_mask = "causal"
    key_maps = (KEY_MAP,)

    def __init__(
        self,
        config: TransformerConfig,
        transformer: Transformer | None = None,
        **transformer_overrides: Any,
    ) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        self.add_mixin("gpt2-final", LMHeadMixin(self.config))
