"""ViT, DeiT and YOLOS files, and what other image models share with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.mixins import DistilledClassifierMixin, PoolerMixin
from sat_lightning.model.keymap import Chain, Fused, Inverse, KeyMap, Rule, Squeeze, Stacked, require
from sat_lightning.models.keymaps.common import Fields, Part, Values, fused_query_key_value, read_fields, write_fields

SIZES: Fields = {
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "intermediate_size": ("inner_hidden_size", None),
}
IMAGE_FIELDS: Fields = {
    **SIZES,
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "num_channels": ("in_channels", 3),
    "layer_norm_eps": ("layernorm_epsilon", 1e-12),
}


def read_image_config(values: Values) -> dict[str, Any]:
    """Read what all image models share."""
    require(values, hidden_act="gelu", qkv_bias=True, pooler_act="tanh", pooler_output_size=values.get("hidden_size"))
    return read_fields(values, IMAGE_FIELDS)


def write_image_config(config: Any, pre_len: int, post_len: int = 0) -> dict[str, Any]:
    """Write what all image models share.

    Raises:
        ConfigError: for special tokens that such a file has no place for.
    """
    tokens, words = (config.pre_len, config.post_len), config.vocab_size
    if tokens != (pre_len, post_len) or words != pre_len + post_len:
        raise ConfigError(
            f"Such a file of Hugging Face has {pre_len} tokens before the patches, {post_len} after them and as many "
            f"words; here there are {tokens[0]}, {tokens[1]} and {words}. Save it native."
        )
    found = write_fields(config, IMAGE_FIELDS) | {"hidden_act": "gelu", "qkv_bias": True}
    found["intermediate_size"] = config.inner_size
    height, width = config.image_size
    return found | {"image_size": height if height == width else [height, width]}


def read_num_labels(values: Values) -> int:
    """Count the classes; a file that names none has two."""
    return int(values.get("num_labels") or len(values.get("id2label") or (0, 1)))


def write_num_labels(num_labels: int) -> dict[str, Any]:
    """Name the classes, which is how their config.json says how many there are."""
    names = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def layer_rules(ours: str, theirs: str, part: Part = lambda config: config) -> tuple[Rule, ...]:
    """Return the rules of one layer; both names hold the placeholder, `part` is as in `fused_query_key_value`."""
    names = {
        "attention.dense": "attention.output.dense",
        "input_layernorm": "layernorm_before",
        "post_attention_layernorm": "layernorm_after",
        "mlp.dense_h_to_4h": "intermediate.dense",
        "mlp.dense_4h_to_h": "output.dense",
    }
    return (
        fused_query_key_value(
            f"{ours}.attention", f"{theirs}.attention.attention", ("query", "key", "value"), part=part
        ),
        *(Rule(f"{ours}.{mine}.{{kind}}", f"{theirs}.{other}.{{kind}}") for mine, other in names.items()),
    )


def image_rules(theirs: str, tokens: Mapping[str, Callable[[Any], int]], ours: str = "") -> tuple[Rule, ...]:
    """Return the rules of an image encoder.

    Args:
        theirs: what their names begin with.
        tokens: their names of special tokens, in our order, and how many each is.
        ours: what our names begin with.
    """
    sizes = tuple(tokens.values())
    return (
        Rule(
            f"{ours}transformer.word_embeddings.weight",
            tuple(f"{theirs}embeddings.{name}" for name in tokens),
            Chain(Squeeze(0), Fused(lambda config: [size(config) for size in sizes])),
        ),
        Rule(f"{ours}transformer.position_embeddings.weight", f"{theirs}embeddings.position_embeddings", Squeeze(0)),
        Rule(f"{ours}mixins.patch_embedding.proj.{{kind}}", f"{theirs}embeddings.patch_embeddings.projection.{{kind}}"),
        *layer_rules(f"{ours}transformer.layers.{{i}}", f"{theirs}encoder.layer.{{i}}"),
        Rule(f"{ours}transformer.final_layernorm.{{kind}}", f"{theirs}layernorm.{{kind}}"),
    )


def make_image(config: Any, generator: torch.Generator) -> Tensor:
    """Return two random images of the model's size."""
    return torch.randn(2, config.in_channels, *config.image_size, generator=generator)


def make_example(config: Any, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random images as keywords of our call and of theirs."""
    image = make_image(config, generator)
    return {"image": image}, {"pixel_values": image}


def _one(config: Any) -> int:
    return 1


def _key_map(model_type: str, architecture: str, rules: tuple[Rule, ...], num_tokens: int = 1, **more: Any) -> KeyMap:
    prefix, tokens = f"{model_type}.", ("cls_token", "distillation_token")[:num_tokens]

    def read(values: Values) -> dict[str, Any]:
        special = {"pre_len": num_tokens, "vocab_size": num_tokens, "num_classes": read_num_labels(values)}
        return read_image_config(values) | special

    def write(config: Any) -> dict[str, Any]:
        return write_image_config(config, num_tokens) | write_num_labels(config.num_classes)

    return KeyMap(
        model_type=model_type,
        architectures=(architecture,),
        prefix=prefix,
        rules=image_rules(prefix, dict.fromkeys(tokens, _one)) + rules,
        config_from_hf=read,
        config_to_hf=write,
        example=make_example,
        **more,
    )


_HEAD = "mixins.cls.classifier.{kind}"
_BARE: dict[str, Any] = {"without": ("cls",), "adds": {"pooler": PoolerMixin}}
_SECOND_HEAD = {"distillation": lambda config: DistilledClassifierMixin(config, config.num_classes)}


def _pooler(prefix: str) -> tuple[Rule, ...]:
    return (Rule("mixins.pooler.dense.{kind}", f"{prefix}pooler.dense.{{kind}}"),)


VIT_KEY_MAPS = (
    _key_map("vit", "ViTForImageClassification", (Rule(_HEAD, "classifier.{kind}"),)),
    _key_map("vit", "ViTModel", _pooler("vit."), **_BARE),
    _key_map("deit", "DeiTForImageClassification", (Rule(_HEAD, "classifier.{kind}"),), num_tokens=2),
    _key_map(
        "deit", "DeiTForImageClassificationWithTeacher",
        (
            Rule(_HEAD, "cls_classifier.{kind}"),
            Rule("mixins.distillation.classifier.{kind}", "distillation_classifier.{kind}"),
        ),
        num_tokens=2, adds=_SECOND_HEAD,
    ),
    _key_map("deit", "DeiTModel", _pooler("deit."), num_tokens=2, **_BARE),
)  # fmt: skip


def _read_yolos(values: Values) -> dict[str, Any]:
    return read_image_config(values) | {
        "num_det_tokens": values.get("num_detection_tokens", 100),
        "num_det_classes": read_num_labels(values) + 1,  # the last is "nothing here"
        "has_mid_positions": values.get("use_mid_position_embeddings", True) and values["num_hidden_layers"] > 1,
    }


def _write_yolos(config: Any) -> dict[str, Any]:
    return (
        write_image_config(config, 1, config.num_det_tokens)
        | write_num_labels(config.num_det_classes - 1)
        | {
            "num_detection_tokens": config.num_det_tokens,
            "use_mid_position_embeddings": config.has_mid_positions,
            "image_size": list(config.image_size),
        }
    )


YOLOS_KEY_MAPS = (
    KeyMap(
        model_type="yolos",
        architectures=("YolosForObjectDetection",),
        prefix="vit.",
        ranges={"j": lambda config: range(3), "between": lambda config: range(config.num_layers - 1)},
        rules=(
            *image_rules("vit.", {"cls_token": _one, "detection_tokens": lambda config: config.num_det_tokens}),
            Rule(
                "mixins.mid_positions.tables.{between}.weight",
                "vit.encoder.mid_position_embeddings",
                Chain(Squeeze(1), Inverse(Stacked())),
            ),
            Rule("mixins.det_head.class_embed.layers.{j}.{kind}", "class_labels_classifier.layers.{j}.{kind}"),
            Rule("mixins.det_head.bbox_embed.layers.{j}.{kind}", "bbox_predictor.layers.{j}.{kind}"),
        ),
        config_from_hf=_read_yolos,
        config_to_hf=_write_yolos,
        example=make_example,
        outputs=(lambda out: out[0]["pred_logits"], lambda out: out.logits),
    ),
)
