"""LLaMA, Mistral, Qwen2 and Qwen3 files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import KeyMap, Rule, require
from sat_lightning.models.keymaps.common import (
    Fields,
    Values,
    fused_query_key_value,
    inv_freq_of,
    read_fields,
    read_heads,
    read_rope,
    write_fields,
    write_heads,
    write_rope,
)

FIELDS: Fields = {
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "intermediate_size": ("inner_hidden_size", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_sequence_length", 2048),
    "rms_norm_eps": ("layernorm_epsilon", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
LAYER, THEIR_LAYER = "transformer.layers.{i}", "model.layers.{i}"

#: Rules that every decoder with LLaMA's names shares.
DECODER_RULES = (
    Rule("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
    Rule(f"{LAYER}.input_layernorm.weight", f"{THEIR_LAYER}.input_layernorm.weight"),
    fused_query_key_value(f"{LAYER}.attention", f"{THEIR_LAYER}.self_attn", ("q_proj", "k_proj", "v_proj")),
    Rule(f"{LAYER}.attention.dense.{{kind}}", f"{THEIR_LAYER}.self_attn.o_proj.{{kind}}"),
    Rule(f"{LAYER}.post_attention_layernorm.weight", f"{THEIR_LAYER}.post_attention_layernorm.weight"),
    Rule("transformer.final_layernorm.weight", "model.norm.weight"),
    Rule("mixins.lm.lm_head.weight", "lm_head.weight"),
)
MLP_RULES = (
    Rule(f"{LAYER}.mlp.dense_h_to_4h_gate.weight", f"{THEIR_LAYER}.mlp.gate_proj.weight"),
    Rule("mixins.mlp.gate_proj.{i}.weight", f"{THEIR_LAYER}.mlp.gate_proj.weight"),
    Rule(f"{LAYER}.mlp.dense_h_to_4h.weight", f"{THEIR_LAYER}.mlp.up_proj.weight"),
    Rule(f"{LAYER}.mlp.dense_4h_to_h.weight", f"{THEIR_LAYER}.mlp.down_proj.weight"),
)
QK_NORM_RULES = (
    Rule("mixins.qk-norm.query_norm.{i}.weight", f"{THEIR_LAYER}.self_attn.q_norm.weight"),
    Rule("mixins.qk-norm.key_norm.{i}.weight", f"{THEIR_LAYER}.self_attn.k_norm.weight"),
)


def read_decoder(values: Values, fields: Fields = FIELDS, base: float = 10000.0) -> dict[str, Any]:
    """Read what LLaMA, Mistral, Qwen and Mixtral write alike."""
    require(values, hidden_act="silu", mlp_bias=False)
    shape = read_fields(values, fields) | read_heads(values) | read_rope(values, base)
    return shape | {"use_bias": False, "is_rotary_emb": True, "is_gated_mlp": True}


def write_decoder(config: Any, fields: Fields = FIELDS) -> dict[str, Any]:
    """Write what LLaMA, Mistral, Qwen and Mixtral write alike."""
    return write_fields(config, fields) | write_heads(config) | write_rope(config) | {"hidden_act": "silu"}


def _read_llama(values: Values) -> dict[str, Any]:
    require(values, attention_bias=False)
    return read_decoder(values)


def _read_mistral(values: Values) -> dict[str, Any]:
    # A Mistral file that does not speak of the window means 4096.
    return read_decoder(values) | {"sliding_window": values.get("sliding_window", 4096)}


def _read_qwen(values: Values, has_qk_norm: bool) -> dict[str, Any]:
    require(values, attention_bias=False)
    found = read_decoder(values) | {"use_qkv_bias": not has_qk_norm, "has_qk_norm": has_qk_norm}
    if not values.get("use_sliding_window"):
        return found
    num_layers, num_full = found["num_layers"], values.get("max_window_layers", 28)
    kinds = ["sliding_attention" if i >= num_full else "full_attention" for i in range(num_layers)]
    if (values.get("layer_types") or kinds) != kinds:
        raise ConfigError("config.json has layer_types that are not full layers below sliding ones: not supported.")
    return found | {"sliding_window": values["sliding_window"], "num_full_layers": num_full}


def _write(config: Any, model_type: str, *, bias: bool, norm: bool, window: bool) -> dict[str, Any]:
    held = {"use_qkv_bias": bias, "has_qk_norm": norm}
    for name, is_there in {**held, "use_bias": False}.items():
        if getattr(config, name) != is_there:
            raise ConfigError(
                f"A '{model_type}' file cannot say {name}={getattr(config, name)}. Give the model_type that can: "
                "llama, mistral (window), qwen2 (qkv bias) or qwen3 (QK-norm)."
            )
    if config.sliding_window is not None and not window:
        raise ConfigError(f"A '{model_type}' file cannot say sliding_window={config.sliding_window}: use mistral.")
    return write_decoder(config)


def _write_llama(config: Any) -> dict[str, Any]:
    values = _write(config, "llama", bias=False, norm=False, window=False)
    return values | {"attention_bias": False, "mlp_bias": False}


def _write_mistral(config: Any) -> dict[str, Any]:
    values = _write(config, "mistral", bias=False, norm=False, window=True)
    return values | {"sliding_window": config.sliding_window}


def _write_qwen(config: Any, has_qk_norm: bool) -> dict[str, Any]:
    name = "qwen3" if has_qk_norm else "qwen2"
    values = _write(config, name, bias=not has_qk_norm, norm=has_qk_norm, window=True)
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    extra = {"attention_bias": False} if has_qk_norm else {}
    return values | window | {"max_window_layers": config.num_full_layers} | extra


def _key_map(model_type: str, architecture: str, read: Callable[..., Any], write: Callable[..., Any]) -> KeyMap:
    return KeyMap(
        model_type=model_type,
        architectures=(architecture,),
        prefix="model.",
        rules=(*DECODER_RULES, *MLP_RULES, *QK_NORM_RULES),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        derived=("*.inv_freq",),
        buffers={f"{THEIR_LAYER}.self_attn.rotary_emb.inv_freq": inv_freq_of},
        config_from_hf=read,
        config_to_hf=write,
    )


KEY_MAPS = (
    _key_map("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    _key_map("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
    _key_map(
        "qwen2", "Qwen2ForCausalLM", partial(_read_qwen, has_qk_norm=False), partial(_write_qwen, has_qk_norm=False)
    ),
    _key_map(
        "qwen3", "Qwen3ForCausalLM", partial(_read_qwen, has_qk_norm=True), partial(_write_qwen, has_qk_norm=True)
    ),
)
