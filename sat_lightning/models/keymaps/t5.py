"""T5 files, of the first version and of 1.1."""

from __future__ import annotations

from typing import Any

import torch

from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import Copies, Fused, KeyMap, Rule, require
from sat_lightning.models.keymaps.common import Fields, Values, fused_query_key_value, read_fields, write_fields

FIELDS: Fields = {
    "num_layers": ("num_layers", None),
    "d_model": ("hidden_size", None),
    "num_heads": ("num_attention_heads", None),
    "d_ff": ("inner_hidden_size", None),
    "vocab_size": ("vocab_size", None),
    "n_positions": ("max_sequence_length", 512),
    "layer_norm_epsilon": ("layernorm_epsilon", 1e-6),
    "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
}
_ALIKE = "hidden_size num_attention_heads inner_hidden_size hidden_size_per_attention_head layernorm_order".split()
_GATED = ("gated-gelu", "gated-gelu_new")


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    require(values, feed_forward_proj=("relu", *_GATED), relative_attention_max_distance=128)
    num_layers, size = values["num_layers"], values.get("d_kv", 64)
    num_decoder_layers = values.get("num_decoder_layers") or num_layers
    # Since transformers 5 tie_word_embeddings is always true there, and another field says whether the head is scaled.
    is_scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True))
    return read_fields(values, FIELDS) | {
        "dec_num_layers": None if num_decoder_layers == num_layers else num_decoder_layers,
        "hidden_size_per_attention_head": size,
        "cross_hidden_size_per_attention_head": size,
        "gated_gelu_mlp": values.get("feed_forward_proj", "relu") != "relu",
        "no_share_embeddings": not is_scaled,
    }


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    if config.head_size != config.cross_head_size:
        raise ConfigError(
            f"A 't5' file has one size of heads; here self-attention has {config.head_size} and cross attention "
            f"{config.cross_head_size}. Save it native."
        )
    given = {f"dec_{name}": getattr(config, f"dec_{name}") for name in _ALIKE}
    if strange := {name: value for name, value in given.items() if value is not None}:
        raise ConfigError(f"A 't5' file has a decoder of the encoder's sizes; here {strange}. Save it native.")
    is_scaled = not config.no_share_embeddings
    return write_fields(config, FIELDS) | {
        "num_decoder_layers": config.dec_num_layers or config.num_layers,
        "d_kv": config.head_size,
        "feed_forward_proj": "gated-gelu" if config.gated_gelu_mlp else "relu",
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": is_scaled,
        "scale_decoder_outputs": is_scaled,
    }


def _cross_sizes(config: Any) -> tuple[int, int]:
    size = config.num_attention_heads * config.cross_head_size
    return size, size


def _stack_rules(part: str, index: str, last: int) -> tuple[Rule, ...]:
    """Return what encoder and decoder share; `last` is the place of the MLP in a block of theirs."""
    ours, theirs = f"{part}.transformer.layers.{{{index}}}", f"{part}.block.{{{index}}}"
    mlp, their_mlp = f"{ours}.mlp", f"{theirs}.layer.{last}.DenseReluDense"
    return (
        fused_query_key_value(f"{ours}.attention", f"{theirs}.layer.0.SelfAttention", ("q", "k", "v"), "weight"),
        Rule(f"{ours}.attention.dense.weight", f"{theirs}.layer.0.SelfAttention.o.weight"),
        Rule(f"{ours}.input_layernorm.weight", f"{theirs}.layer.0.layer_norm.weight"),
        Rule(f"{mlp}.dense_h_to_4h.weight", f"{their_mlp}.wi.weight"),
        Rule(
            (f"{mlp}.dense_h_to_4h.weight", f"{part}.mixins.gated-mlp.gated_h_to_4h_list.{{{index}}}.weight"),
            (f"{their_mlp}.wi_0.weight", f"{their_mlp}.wi_1.weight"),
        ),
        Rule(f"{mlp}.dense_4h_to_h.weight", f"{their_mlp}.wo.weight"),
        Rule(
            f"{part}.mixins.t5-attention.relative_attention_bias.weight",
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        Rule(f"{part}.transformer.final_layernorm.weight", f"{part}.final_layer_norm.weight"),
    )


def _make_example(config: Any, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random words to read and to write, as keywords of our call and of theirs."""
    read, written = (torch.randint(0, config.vocab_size, (2, length), generator=generator) for length in (9, 7))
    return {"enc_input_ids": read, "dec_input_ids": written}, {"input_ids": read, "decoder_input_ids": written}


_DECODER, _THEIRS = "decoder.transformer.layers.{j}", "decoder.block.{j}.layer"
KEY_MAPS = (
    KeyMap(
        model_type="t5",
        architectures=("T5ForConditionalGeneration",),
        ranges={"j": lambda config: range(config.dec_num_layers or config.num_layers)},
        rules=(
            Rule(
                ("encoder.transformer.word_embeddings.weight", "decoder.transformer.word_embeddings.weight"),
                "shared.weight",
                Copies(2),
            ),
            *_stack_rules("encoder", "i", 1),
            Rule(
                "encoder.transformer.layers.{i}.post_attention_layernorm.weight",
                "encoder.block.{i}.layer.1.layer_norm.weight",
            ),
            *_stack_rules("decoder", "j", 2),
            Rule(f"{_DECODER}.post_attention_layernorm.weight", f"{_THEIRS}.2.layer_norm.weight"),
            Rule(f"{_DECODER}.post_cross_attention_layernorm.weight", f"{_THEIRS}.1.layer_norm.weight"),
            Rule(f"{_DECODER}.cross_attention.query.weight", f"{_THEIRS}.1.EncDecAttention.q.weight"),
            Rule(
                f"{_DECODER}.cross_attention.key_value.weight",
                (f"{_THEIRS}.1.EncDecAttention.k.weight", f"{_THEIRS}.1.EncDecAttention.v.weight"),
                Fused(_cross_sizes),
            ),
            Rule(f"{_DECODER}.cross_attention.dense.weight", f"{_THEIRS}.1.EncDecAttention.o.weight"),
            Rule("decoder.mixins.t5-final.lm_head.weight", "lm_head.weight"),
        ),
        copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
        tied={"lm_head.weight": "shared.weight"},
        tie_fields=("scale_decoder_outputs", "tie_word_embeddings"),
        is_tied_by_default=True,
        unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        example=_make_example,
        outputs=(lambda out: out[1], lambda out: out.logits),
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
    ),
)
