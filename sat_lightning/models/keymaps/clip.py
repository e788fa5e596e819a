"""CLIP files."""

from __future__ import annotations

from typing import Any

import torch

from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import Inverse, KeyMap, Rule, Squeeze, require
from sat_lightning.models.keymaps.common import Fields, Part, Values, fused_query_key_value, read_fields, write_fields
from sat_lightning.models.keymaps.vit import make_image

_IMAGE: Fields = {
    "num_hidden_layers": ("num_layers", 12),
    "hidden_size": ("hidden_size", 768),
    "num_attention_heads": ("num_attention_heads", 12),
    "intermediate_size": ("inner_hidden_size", 3072),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "num_channels": ("in_channels", 3),
}
_TEXT: Fields = {
    "num_hidden_layers": ("text_num_layers", 12),
    "hidden_size": ("text_hidden_size", 512),
    "num_attention_heads": ("text_num_attention_heads", 8),
    "intermediate_size": ("text_inner_hidden_size", 2048),
    "vocab_size": ("text_vocab_size", 49408),
    "max_position_embeddings": ("text_max_sequence_length", 77),
}
_WHOLE: Fields = {
    "projection_dim": ("projection_dim", 512),
    "logit_scale_init_value": ("logit_scale_init_value", 2.6592),
}
_OLD_END = 2  # what old files say and do not mean: transformers then takes the place of the largest id


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    image, text = values.get("vision_config") or {}, values.get("text_config") or {}
    activation, epsilon = image.get("hidden_act", "quick_gelu"), image.get("layer_norm_eps", 1e-5)
    require(image, hidden_act=("quick_gelu", "gelu"))
    require({"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5} | text, hidden_act=activation, layer_norm_eps=epsilon)
    end = text.get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise ConfigError(f"config.json of a 'clip' has eos_token_id={end!r} in text_config, supported is one token.")
    return {
        **read_fields(image, _IMAGE),
        **read_fields(text, _TEXT),
        **read_fields(values, _WHOLE),
        "hidden_act": activation,
        "layernorm_epsilon": epsilon,
        "text_end_token_id": "largest" if end == _OLD_END else end,
    }


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    height, width = config.image_size
    end, tokens = config.text_end_token_id, (config.pre_len, config.post_len, config.vocab_size)
    if end is None or height != width or tokens != (1, 0, 1):
        raise ConfigError(
            "A 'clip' file has square images, one special token before the patches, and an end token whose place gives "
            f"the vector of a text; here image_size is {config.image_size}, pre_len, post_len and vocab_size are "
            f"{tokens}, text_end_token_id is {end}. Set text_end_token_id where texts end with one, or save it native."
        )
    shared = {"hidden_act": config.hidden_act, "layer_norm_eps": config.layernorm_epsilon}
    shared["projection_dim"] = config.projection_dim
    text = config.of_text()
    sizes = {theirs: getattr(text, ours.removeprefix("text_")) for theirs, (ours, _) in _TEXT.items()}
    image = write_fields(config, _IMAGE) | {"intermediate_size": config.inner_size, "image_size": height}
    sizes |= {"intermediate_size": text.inner_size, "eos_token_id": _OLD_END if end == "largest" else end}
    return write_fields(config, _WHOLE) | {
        "vision_config": {"model_type": "clip_vision_model", **image, **shared},
        "text_config": {"model_type": "clip_text_model", **sizes, **shared},
    }


def _make_example(config: Any, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random images and texts, as keywords of our call and of theirs."""
    image, end = make_image(config, generator), config.text_end_token_id
    text = torch.randint(0, config.text_vocab_size, (3, 7), generator=generator)
    text[:, 5] = config.text_vocab_size - 1 if end == "largest" else end
    return {"image": image, "text_input_ids": text}, {"pixel_values": image, "input_ids": text}


def _encoder_rules(ours: str, theirs: str, index: str, part: Part) -> tuple[Rule, ...]:
    mine, other = f"{ours}.transformer.layers.{{{index}}}", f"{theirs}.encoder.layers.{{{index}}}"
    names = {
        "attention.dense": "self_attn.out_proj",
        "input_layernorm": "layer_norm1",
        "post_attention_layernorm": "layer_norm2",
        "mlp.dense_h_to_4h": "mlp.fc1",
        "mlp.dense_4h_to_h": "mlp.fc2",
    }
    return (
        fused_query_key_value(f"{mine}.attention", f"{other}.self_attn", ("q_proj", "k_proj", "v_proj"), part=part),
        *(Rule(f"{mine}.{a}.{{kind}}", f"{other}.{b}.{{kind}}") for a, b in names.items()),
        Rule(f"{ours}.transformer.position_embeddings.weight", f"{theirs}.embeddings.position_embedding.weight"),
    )


_IMAGE_ENC, _TEXT_ENC = "image_encoder.mixins.image_enc", "text_encoder.mixins.text_enc"
KEY_MAPS = (
    KeyMap(
        model_type="clip",
        architectures=("CLIPModel",),
        ranges={"j": lambda config: range(config.of_text().num_layers)},
        rules=(
            Rule("logit_scale", "logit_scale"),
            Rule(
                "image_encoder.transformer.word_embeddings.weight",
                "vision_model.embeddings.class_embedding",
                Inverse(Squeeze(0)),
            ),
            Rule("image_encoder.mixins.patch_embedding.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
            Rule(f"{_IMAGE_ENC}.pre_layernorm.{{kind}}", "vision_model.pre_layrnorm.{kind}"),  # sic
            *_encoder_rules("image_encoder", "vision_model", "i", lambda config: config),
            Rule("image_encoder.transformer.final_layernorm.{kind}", "vision_model.post_layernorm.{kind}"),
            Rule(f"{_IMAGE_ENC}.visual_projection.weight", "visual_projection.weight"),
            Rule("text_encoder.transformer.word_embeddings.weight", "text_model.embeddings.token_embedding.weight"),
            *_encoder_rules("text_encoder", "text_model", "j", lambda config: config.of_text()),
            Rule("text_encoder.transformer.final_layernorm.{kind}", "text_model.final_layer_norm.{kind}"),
            Rule(f"{_TEXT_ENC}.text_projection.weight", "text_projection.weight"),
        ),
        buffers={
            "vision_model.embeddings.position_ids": lambda config: torch.arange(config.max_sequence_length)[None],
            "text_model.embeddings.position_ids": lambda config: torch.arange(config.of_text().max_sequence_length)[
                None
            ],
        },
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
        example=_make_example,
        outputs=(lambda out: out[2], lambda out: out.logits_per_text),
    ),
)
