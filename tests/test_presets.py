"""Named sizes have the number of parameters that their authors publish."""

import pytest
import torch

from sat_lightning import models
from sat_lightning.errors import ConfigError
from sat_lightning.models import PRESETS, preset

#: Parameters of the published files, and what ours has beside them (a head of its own, biases of SAT's layout).
PUBLISHED = {
    "gpt2": (124_439_808, 50257 * 768),
    "gpt2-xl": (1_557_611_200, 50257 * 1600),
    "gpt-neo-125m": (125_198_592, 12 * 3 * 768),
    "gpt-neo-2.7b": (2_651_307_520, 32 * 3 * 2560),
    "bert-base-uncased": (109_514_298, 30522 * 768),
    "roberta-base": (124_697_433, 50265 * 768 - 768),
    "llama-7b": (6_738_415_616, 0),
    "llama-13b": (13_015_864_320, 0),
    "llama-30b": (32_528_943_616, 0),
    "llama-65b": (65_285_660_672, 0),
    "llama-2-70b": (68_976_648_192, 0),
    "llama-3-8b": (8_030_261_248, 0),
    "llama-3-70b": (70_553_706_496, 0),
    "llama-3.2-1b": (1_235_814_400, 0),
    "llama-3.2-3b": (3_212_749_824, 0),
    "mistral-7b-v0.1": (7_241_732_096, 0),
    "qwen2-0.5b": (494_032_768, 0),
    "qwen2-7b": (7_615_616_512, 0),
    "qwen3-0.6b": (596_049_920, 0),
    "qwen3-8b": (8_190_735_360, 0),
    "mixtral-8x7b": (46_702_792_704, 0),
    "t5-small": (60_506_624, 0),
    "t5-base": (222_903_552, 0),
    "t5-large": (737_668_096, 0),
    "t5-3b": (2_851_598_336, 0),
    "t5-11b": (11_307_321_344, 0),
    "chatglm-6b": (6_173_286_400, 130528 * 4096),
    "chatglm2-6b": (6_243_584_000, 0),
    "glm-4-9b": (9_399_951_360, 0),
    "vit-base-patch16-224": (86_567_656, 0),
    "vit-base-patch16-384": (86_859_496, 0),
    "vit-large-patch16-224": (304_326_632, 0),
    "clip-vit-base-patch32": (151_277_313, 0),
    "clip-vit-base-patch16": (149_620_737, 0),
    "clip-vit-large-patch14": (427_616_513, 0),
    "cait-s24-224": (46_916_200, 2 * 4 * 385 * 384 + 2 * 768 + 196 * 384),  # what nothing uses in the decoder
    "vit-mae-base": (111_907_840, 0),
    "vit-mae-large": (329_541_888, 0),
    "deit-tiny-distilled-patch16-224": (5_910_800, -1000 * 193),  # the second head is a mixin of its own
    "deit-base-distilled-patch16-224": (87_338_192, -1000 * 769),
}


def count(name):
    """Count by building with one layer and with two, on no device: layers are alike."""
    config = preset(name)
    sizes = []
    for num_layers in (1, 2):
        with torch.device("meta"):
            model = getattr(models, PRESETS[name][0])(
                preset(name, num_layers=num_layers) if name[:7] != "gpt-neo" else _neo(name, num_layers)
            )
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    return sizes[0] + (config.num_layers - 1) * (sizes[1] - sizes[0])


def _neo(name, num_layers):
    return preset(name, num_layers=num_layers, attention_types=["global"] * num_layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name):
    published, ours = PUBLISHED[name]
    assert count(name) == published + ours


@pytest.mark.parametrize("name", PRESETS)
def test_names_a_class_and_fields_that_exist(name):
    config = preset(name)
    assert isinstance(config, getattr(models, PRESETS[name][0]).config_class)


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match="No preset is named 'lama-7b'.*Did you mean 'llama-7b'"):
        preset("lama-7b")
    with pytest.raises(ConfigError, match="Did you mean 'num_layers'"):
        preset("gpt2", num_layer=3)
