"""MAE files."""

from __future__ import annotations

from typing import Any

import torch

from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import KeyMap, Rule, Squeeze
from sat_lightning.models.keymaps.common import Values
from sat_lightning.models.keymaps.vit import (
    image_rules,
    layer_rules,
    make_image,
    read_image_config,
    write_image_config,
)

_DECODER = {
    "decoder_num_hidden_layers": ("num_layers", 8),
    "decoder_hidden_size": ("hidden_size", 512),
    "decoder_num_attention_heads": ("num_attention_heads", 16),
    "decoder_intermediate_size": ("inner_hidden_size", 2048),
}


def config_from_hf(values: Values) -> dict[str, Any]:
    """Read the fields of their config.json."""
    decoder = {f"dec_{ours}": values.get(theirs, default) for theirs, (ours, default) in _DECODER.items()}
    more = {"mask_ratio": values.get("mask_ratio", 0.75), "dec_hidden_act": values.get("hidden_act", "gelu")}
    return read_image_config(values) | decoder | more


def config_to_hf(config: Any) -> dict[str, Any]:
    """Write the fields of their config.json."""
    decoder = config.of_decoder()
    if decoder.max_sequence_length != config.max_sequence_length:
        raise ConfigError(
            f"A 'vit_mae' file has a position for every token of the decoder; here it has {config.max_sequence_length} "
            f"tokens and dec_max_sequence_length is {decoder.max_sequence_length}. Save it native."
        )
    sizes = {theirs: getattr(decoder, ours) for theirs, (ours, _) in _DECODER.items()}
    sizes |= {"decoder_intermediate_size": decoder.inner_size, "mask_ratio": config.mask_ratio}
    return write_image_config(config, 1) | sizes


def _make_example(config: Any, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random images and what decides which patches are removed."""
    image, noise = make_image(config, generator), torch.rand(2, config.num_patches, generator=generator)
    return {"image": image, "noise": noise}, {"pixel_values": image, "noise": noise}


_OURS = "decoder.mixins.mask_forward"
KEY_MAPS = (
    KeyMap(
        model_type="vit_mae",
        architectures=("ViTMAEForPreTraining",),
        ranges={"j": lambda config: range(config.of_decoder().num_layers)},
        rules=(
            *image_rules("vit.", {"cls_token": lambda config: 1}, ours="encoder."),
            Rule("decoder.transformer.word_embeddings.weight", "decoder.mask_token", Squeeze(0)),
            Rule("decoder.transformer.position_embeddings.weight", "decoder.decoder_pos_embed", Squeeze(0)),
            Rule(f"{_OURS}.decoder_embed.{{kind}}", "decoder.decoder_embed.{kind}"),
            *layer_rules(
                "decoder.transformer.layers.{j}", "decoder.decoder_layers.{j}", lambda config: config.of_decoder()
            ),
            Rule("decoder.transformer.final_layernorm.{kind}", "decoder.decoder_norm.{kind}"),
            Rule(f"{_OURS}.decoder_pred.{{kind}}", "decoder.decoder_pred.{kind}"),
        ),
        legacy_parts={"decoder.decoder_encoder.layer.": "decoder.decoder_layers."},  # as transformers 5 writes them
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
        example=_make_example,
        outputs=(lambda out: out[1], lambda out: out.logits),
    ),
)
