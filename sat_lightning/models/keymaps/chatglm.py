"""GLM-4 files in Hugging Face's own layout (`glm`): ChatGLM4 with rotated neighbours and the gate in the backbone."""

from __future__ import annotations

from typing import Any

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import Fused, Inverse, KeyMap, Rule, require
from sat_lightning.models.keymaps.common import (
    Fields,
    Values,
    read_fields,
    read_heads,
    read_rope,
    write_fields,
    write_heads,
    write_rope,
)
from sat_lightning.models.keymaps.llama import DECODER_RULES, LAYER, THEIR_LAYER
from sat_lightning.models.keymaps.llama import FIELDS as DECODER_FIELDS

FIELDS: Fields = {
    **{theirs: row for theirs, row in DECODER_FIELDS.items() if theirs != "tie_word_embeddings"},
    "max_position_embeddings": ("max_sequence_length", 131072),
    "rms_norm_eps": ("layernorm_epsilon", 1.5625e-07),
    "attention_bias": ("use_qkv_bias", True),
}


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    require(values, hidden_act="silu", tie_word_embeddings=False)
    rope = values.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor", 0.5)
    head_size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    shape = read_fields(values, FIELDS) | read_heads(values) | read_rope(values)
    flags = {"use_bias": False, "is_gated_mlp": True, "rotary_interleaved": True}
    return shape | flags | {"rotary_dim": int(head_size * part)}


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    if not config.rotary_interleaved or not config.is_gated_mlp:
        raise ConfigError(
            "A 'glm' file rotates neighbouring features and holds the gate in the MLP: this model needs "
            "rotary_interleaved and is_gated_mlp. Save it native."
        )
    head_size = config.head_size
    part = (config.rotary_dim or config.hidden_size // config.num_attention_heads // 2) / head_size
    values = write_fields(config, FIELDS) | write_heads(config) | write_rope(config)
    values["rope_parameters"]["partial_rotary_factor"] = part
    # Their default padding is a word of the published vocabulary, which another may not have.
    return values | {"hidden_act": "silu", "partial_rotary_factor": part, "pad_token_id": None}


def _halves(config: TransformerConfig) -> tuple[int, int]:
    return config.inner_size, config.inner_size


_REPLACED = "mixins.lm.lm_head.weight"
KEY_MAPS: tuple[KeyMap, ...] = (
    KeyMap(
        model_type="glm",
        architectures=("GlmForCausalLM",),
        prefix="model.",
        rules=(
            *(rule for rule in DECODER_RULES if rule.ours != _REPLACED),
            Rule("mixins.chatglm-final.lm_head.weight", "lm_head.weight"),
            Rule(
                (f"{LAYER}.mlp.dense_h_to_4h_gate.weight", f"{LAYER}.mlp.dense_h_to_4h.weight"),
                f"{THEIR_LAYER}.mlp.gate_up_proj.weight",
                Inverse(Fused(_halves)),
            ),
            Rule(f"{LAYER}.mlp.dense_4h_to_h.weight", f"{THEIR_LAYER}.mlp.down_proj.weight"),
        ),
        derived=("*.inv_freq",),
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
    ),
)
