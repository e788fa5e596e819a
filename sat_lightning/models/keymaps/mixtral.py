"""Mixtral files."""

from __future__ import annotations

from typing import Any

from sat_lightning.model.keymap import KeyMap, Rule
from sat_lightning.models.keymaps.common import Fields, Values, inv_freq_of
from sat_lightning.models.keymaps.llama import DECODER_RULES, LAYER, THEIR_LAYER, read_decoder, write_decoder
from sat_lightning.models.keymaps.llama import FIELDS as DECODER_FIELDS

FIELDS: Fields = {
    **DECODER_FIELDS,
    "max_position_embeddings": ("max_sequence_length", 131072),
    "rms_norm_eps": ("layernorm_epsilon", 1e-5),
    "num_local_experts": ("num_experts", 8),
    "num_experts_per_tok": ("num_experts_per_tok", 2),
}


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    return read_decoder(values, FIELDS, base=1e6) | {"sliding_window": values.get("sliding_window")}


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    return write_decoder(config, FIELDS) | {"sliding_window": config.sliding_window}


_MOE = f"{THEIR_LAYER}.block_sparse_moe"
KEY_MAPS = (
    KeyMap(
        model_type="mixtral",
        architectures=("MixtralForCausalLM",),
        prefix="model.",
        rules=(
            *DECODER_RULES,
            Rule("mixins.mlp.gates.{i}.weight", f"{_MOE}.gate.weight"),
            Rule(f"{LAYER}.mlp.dense_h_to_4h_gate{{e}}.weight", f"{_MOE}.experts.{{e}}.w1.weight"),
            Rule(f"{LAYER}.mlp.dense_4h_to_h{{e}}.weight", f"{_MOE}.experts.{{e}}.w2.weight"),
            Rule(f"{LAYER}.mlp.dense_h_to_4h{{e}}.weight", f"{_MOE}.experts.{{e}}.w3.weight"),
        ),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        derived=("*.inv_freq",),
        buffers={f"{THEIR_LAYER}.self_attn.rotary_emb.inv_freq": inv_freq_of},
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
    ),
)
