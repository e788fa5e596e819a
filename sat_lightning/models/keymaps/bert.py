"""BERT, RoBERTa and DPR files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins import PoolerMixin, TokenTypesMixin
from sat_lightning.model.keymap import KeyMap, Rule, require
from sat_lightning.models.keymaps.common import Fields, Values, fused_query_key_value, read_fields, write_fields

_SIZES: Fields = {
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "intermediate_size": ("inner_hidden_size", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_sequence_length", 512),
    "layer_norm_eps": ("layernorm_epsilon", 1e-12),
}
BERT_FIELDS: Fields = {**_SIZES, "type_vocab_size": ("num_types", 2)}
_TANH = ("gelu_new", "gelu_pytorch_tanh")
_OLD_NORMS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


def _norm_after(config: TransformerConfig) -> list[tuple[str, int]]:
    """Name the norm that ends a layer of theirs: the one that begins the next of ours."""
    last = config.num_layers - 1
    return [("final_layernorm" if i == last else f"layers.{i + 1}.input_layernorm", i) for i in range(last + 1)]


def encoder_rules(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of a BERT encoder whose names begin with `prefix`."""
    ours, theirs = "transformer.layers.{i}", f"{prefix}encoder.layer.{{i}}"
    return (
        Rule("transformer.word_embeddings.weight", f"{prefix}embeddings.word_embeddings.weight"),
        Rule("transformer.position_embeddings.weight", f"{prefix}embeddings.position_embeddings.weight"),
        Rule("mixins.bert-type.type_embeddings.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
        Rule("mixins.dpr-type.type_embeddings.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
        Rule("transformer.layers.0.input_layernorm.{kind}", f"{prefix}embeddings.LayerNorm.{{kind}}"),
        fused_query_key_value(f"{ours}.attention", f"{theirs}.attention.self", ("query", "key", "value")),
        Rule(f"{ours}.attention.dense.{{kind}}", f"{theirs}.attention.output.dense.{{kind}}"),
        Rule(f"{ours}.post_attention_layernorm.{{kind}}", f"{theirs}.attention.output.LayerNorm.{{kind}}"),
        Rule(f"{ours}.mlp.dense_h_to_4h.{{kind}}", f"{theirs}.intermediate.dense.{{kind}}"),
        Rule(f"{ours}.mlp.dense_4h_to_h.{{kind}}", f"{theirs}.output.dense.{{kind}}"),
        Rule("transformer.{after}.{kind}", f"{prefix}encoder.layer.{{after}}.output.LayerNorm.{{kind}}"),
        Rule("mixins.pooler.dense.{kind}", f"{prefix}pooler.dense.{{kind}}"),
    )


def _head_rules(dense: str, norm: str, decoder: str, bias: str) -> tuple[Rule, ...]:
    ours = "mixins.bert-final.lm_head"
    return (
        Rule(f"{ours}.dense.{{kind}}", f"{dense}.{{kind}}"),
        Rule(f"{ours}.layer_norm.{{kind}}", f"{norm}.{{kind}}"),
        Rule(f"{ours}.decoder.weight", f"{decoder}.weight"),
        Rule(f"{ours}.decoder.bias", bias),
    )


def _require_plain(values: Values, activations: tuple[str, ...] = ("gelu",)) -> None:
    require(
        values,
        hidden_act=activations,
        is_decoder=False,
        add_cross_attention=False,
        position_embedding_type=("absolute", None),
    )


def _read_bert(values: Values) -> dict[str, Any]:
    _require_plain(values)
    found = read_fields(values, BERT_FIELDS)
    return found | {"head_layernorm_epsilon": found["layernorm_epsilon"]}


def _warn_of_the_head(config: Any) -> None:
    if config.head_layernorm_epsilon != config.layernorm_epsilon:
        warnings.warn(
            f"Hugging Face has one epsilon for all norms, {config.layernorm_epsilon}; the head's norm has "
            f"{config.head_layernorm_epsilon} here. Its logits will differ a little.",
            stacklevel=2,
        )


def _write_bert(config: Any) -> dict[str, Any]:
    _warn_of_the_head(config)
    return write_fields(config, BERT_FIELDS) | {"hidden_act": "gelu"}


def _read_roberta(values: Values) -> dict[str, Any]:
    _require_plain(values)
    found = read_fields(values, _SIZES) | {"pad_token_id": values.get("pad_token_id", 1)}
    return found | {"head_layernorm_epsilon": found["layernorm_epsilon"]}


def _write_roberta(config: Any) -> dict[str, Any]:
    _warn_of_the_head(config)
    return write_fields(config, _SIZES) | {
        "hidden_act": "gelu",
        "pad_token_id": config.pad_token_id,
        "type_vocab_size": _num_types(config),
    }


def _num_types(config: TransformerConfig) -> int:
    """Return how many token types the file had; RoBERTa uses the first only."""
    record = config.extra.get("hugging_face", {}).get("config", {})
    return int(record.get("type_vocab_size", 1))


def _read_dpr(values: Values) -> dict[str, Any]:
    _require_plain(values, ("gelu", *_TANH))
    require(values, projection_dim=0)
    is_tanh = values.get("hidden_act") in _TANH
    return read_fields(values, BERT_FIELDS) | {"hidden_act": "gelu_tanh" if is_tanh else "gelu"}


def _write_dpr(config: Any) -> dict[str, Any]:
    activation = "gelu_new" if config.hidden_act == "gelu_tanh" else "gelu"
    return write_fields(config, BERT_FIELDS) | {"hidden_act": activation, "projection_dim": 0}


def _make_position_ids(config: TransformerConfig) -> torch.Tensor:
    """Return what files written before transformers 4.31 carry beside the weights."""
    return torch.arange(config.max_sequence_length)[None]


def _key_map(
    model_type: str,
    architecture: str,
    prefix: str,
    read: Callable[..., Any],
    write: Callable[..., Any],
    **more: Any,
) -> KeyMap:
    rules = encoder_rules(prefix) + more.pop("rules", ())
    return KeyMap(
        model_type=model_type,
        architectures=(architecture,),
        prefix=prefix,
        rules=rules,
        ranges={"after": _norm_after},
        buffers={f"{prefix}embeddings.position_ids": _make_position_ids},
        legacy_suffixes=_OLD_NORMS,
        config_from_hf=read,
        config_to_hf=write,
        **more,
    )


_BERT_HEAD = _head_rules(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    "cls.predictions.bias",
)
_BERT_TIES: dict[str, Any] = {
    "tied": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"},
    "copies": {"cls.predictions.decoder.bias": "cls.predictions.bias"},
    "is_tied_by_default": True,
}
_ROBERTA_TIES: dict[str, Any] = {
    "tied": {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"},
    "copies": {"lm_head.decoder.bias": "lm_head.bias"},
    "is_tied_by_default": True,
}
_WITH_TYPES = {"bert-type": lambda config: TokenTypesMixin(config, _num_types(config))}
# A model of SAT's has no token types: a row of zeros adds nothing.
_NO_TYPES = {
    "roberta.embeddings.token_type_embeddings.weight": lambda config: torch.zeros(
        _num_types(config), config.hidden_size
    )
}

BERT_KEY_MAPS = (
    _key_map(
        "bert", "BertForMaskedLM", "bert.", _read_bert, _write_bert,
        rules=_BERT_HEAD, **_BERT_TIES,
    ),
    _key_map(
        "bert", "BertModel", "bert.", _read_bert, _write_bert, without=("bert-final",), adds={"pooler": PoolerMixin},
    ),
)  # fmt: skip
ROBERTA_KEY_MAPS = (
    _key_map(
        "roberta", "RobertaForMaskedLM", "roberta.", _read_roberta, _write_roberta,
        rules=_head_rules("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        **_ROBERTA_TIES, adds=_WITH_TYPES, fills=_NO_TYPES,
    ),
    _key_map(
        "roberta", "RobertaModel", "roberta.", _read_roberta, _write_roberta,
        without=("bert-final",), adds={"pooler": PoolerMixin, **_WITH_TYPES}, fills=_NO_TYPES,
    ),
)  # fmt: skip
QUESTION_KEY_MAPS = (_key_map("dpr", "DPRQuestionEncoder", "question_encoder.bert_model.", _read_dpr, _write_dpr),)
CONTEXT_KEY_MAPS = (_key_map("dpr", "DPRContextEncoder", "ctx_encoder.bert_model.", _read_dpr, _write_dpr),)
READER_KEY_MAPS = (
    _key_map(
        "dpr", "DPRReader", "span_predictor.encoder.bert_model.", _read_dpr, _write_dpr,
        rules=(
            Rule("mixins.dpr-final.qa_outputs.{kind}", "span_predictor.qa_outputs.{kind}"),
            Rule("mixins.dpr-final.qa_classifier.{kind}", "span_predictor.qa_classifier.{kind}"),
        ),
    ),
)  # fmt: skip
