"""GPT-Neo files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sat_lightning.model.keymap import KeyMap, Rule, require
from sat_lightning.models.keymaps.common import Fields, Values, fused_query_key_value, read_fields, write_fields

FIELDS: Fields = {
    "num_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_heads": ("num_attention_heads", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_sequence_length", 2048),
    "layer_norm_epsilon": ("layernorm_epsilon", 1e-5),
    "window_size": ("window_size", 256),
}


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    require(values, activation_function=("gelu_new", "gelu_pytorch_tanh"), tie_word_embeddings=True)
    patterns = values.get("attention_types", [[["global", "local"], 12]])
    kinds = [kind for pattern, count in patterns for kind in pattern * count]
    found = read_fields(values, FIELDS) | {"attention_types": kinds, "has_qkv_bias": False}
    return found | {"inner_hidden_size": values.get("intermediate_size")}


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    return write_fields(config, FIELDS) | {
        "activation_function": "gelu_new",
        "intermediate_size": config.inner_hidden_size,
        "attention_types": [[list(config.attention_types), 1]],
        "attention_layers": list(config.attention_types),
    }


def _layers_of(kind: str) -> Callable[[Any], list[int]]:
    return lambda config: [layer for layer, its in enumerate(config.attention_types) if its == kind]


def _make_causal(config: Any) -> torch.Tensor:
    return torch.ones(1, 1, config.max_sequence_length, config.max_sequence_length, dtype=torch.bool).tril()


LAYER, THEIR_LAYER = "transformer.layers.{i}", "transformer.h.{i}"
KEY_MAPS = (
    KeyMap(
        model_type="gpt_neo",
        architectures=("GPTNeoForCausalLM",),
        prefix="transformer.",
        rules=(
            Rule("transformer.word_embeddings.weight", "transformer.wte.weight"),
            Rule("transformer.position_embeddings.weight", "transformer.wpe.weight"),
            fused_query_key_value(
                f"{LAYER}.attention", f"{THEIR_LAYER}.attn.attention", ("q_proj", "k_proj", "v_proj"), "weight"
            ),
            *(
                Rule(f"{LAYER}.{ours}.{{kind}}", f"{THEIR_LAYER}.{theirs}.{{kind}}")
                for ours, theirs in {
                    "input_layernorm": "ln_1",
                    "attention.dense": "attn.attention.out_proj",
                    "post_attention_layernorm": "ln_2",
                    "mlp.dense_h_to_4h": "mlp.c_fc",
                    "mlp.dense_4h_to_h": "mlp.c_proj",
                }.items()
            ),
            Rule("transformer.final_layernorm.{kind}", "transformer.ln_f.{kind}"),
        ),
        tied={"lm_head.weight": "transformer.wte.weight"},
        is_tied_by_default=True,
        ranges={"wide": _layers_of("global"), "narrow": _layers_of("local")},
        buffers={
            f"{THEIR_LAYER}.attn.attention.masked_bias": lambda config: torch.tensor(-1e9),
            "transformer.h.{wide}.attn.attention.bias": _make_causal,
            "transformer.h.{narrow}.attn.attention.bias": lambda c: _make_causal(c).triu(1 - c.window_size),
        },
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
    ),
)
