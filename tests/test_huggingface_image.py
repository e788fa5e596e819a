"""The image families equal Hugging Face's on random weights, and come back byte for byte."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint.huggingface import save_huggingface
from sat_lightning.cli import main
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.models import ViTModel
from tests.families import FAMILIES
from tests.hf_parity import check_folder_parity, check_same_files, randomise

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 36, "patch_size": 4,
    "image_size": [12, 8], "num_channels": 2, "attn_implementation": "eager",
}  # fmt: skip
IMAGE = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
THEIRS, OURS = {"pixel_values": IMAGE}, {"image": IMAGE}


def flat(out):
    """All tensors of what a call of ours returned."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [tensor for part in (out.values() if isinstance(out, dict) else out) for tensor in flat(part)]


def logits(out):
    return out.logits


VIT = {
    "ViTForImageClassification": ("ViTConfig", {"num_labels": 5}, logits),
    "ViTForImageClassification of two classes": ("ViTConfig", {"image_size": 8, "layer_norm_eps": 1e-5}, logits),
    "ViTModel": ("ViTConfig", {}, lambda out: out.last_hidden_state),
    "DeiTForImageClassification": ("DeiTConfig", {"num_labels": 3}, logits),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", {"num_labels": 3}, logits),
    "DeiTModel": ("DeiTConfig", {}, lambda out: out.last_hidden_state),
}


@pytest.mark.parametrize("name", VIT)
def test_vit_and_deit(name, tmp_path):
    config_name, options, pick = VIT[name]
    config = getattr(transformers, config_name)(**(SIZES | options))
    theirs = getattr(transformers, name.split()[0])(config)
    image = IMAGE[:, :, :8] if config.image_size == 8 else IMAGE
    ours = check_folder_parity(theirs, tmp_path, {"pixel_values": image}, pick, our_kwargs={"image": image})
    if name.endswith("Model"):
        with torch.no_grad():
            pooled = ours.get_mixin("pooler")(ours(image=image)[0])
            assert_close(pooled, theirs.float()(image).pooler_output, atol=1e-5, rtol=1e-5)


def test_another_image_size_is_what_hugging_face_makes_of_it(tmp_path):
    # Theirs stretches the table in every call, and takes the one it was trained with for a square.
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**(SIZES | {"image_size": 8}))).eval()
    randomise(theirs, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path, image_size=[20, 16], resize_positions="interpolate")
    image = torch.randn(2, 2, 20, 16)
    with torch.no_grad():
        expected = theirs(image, interpolate_pos_encoding=True).logits
        assert_close(ours(image=image)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_mid_positions", [True, False])
def test_yolos(has_mid_positions, tmp_path):
    config = transformers.YolosConfig(
        **SIZES, num_detection_tokens=3, num_labels=5, use_mid_position_embeddings=has_mid_positions
    )
    theirs = transformers.YolosForObjectDetection(config)
    check_folder_parity(
        theirs,
        tmp_path,
        THEIRS,
        lambda out: torch.cat([out.logits, out.pred_boxes], dim=-1),
        our_kwargs=OURS,
        our_pick=lambda out: torch.cat([out[0]["pred_logits"], out[0]["pred_boxes"]], dim=-1),
    )


@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_mae(mask_ratio, tmp_path):
    config = transformers.ViTMAEConfig(
        **(SIZES | {"image_size": 16}), mask_ratio=mask_ratio, decoder_num_hidden_layers=3, decoder_hidden_size=16,
        decoder_num_attention_heads=2, decoder_intermediate_size=20,
    )  # fmt: skip
    image, noise = torch.randn(2, 2, 16, 16), torch.rand(2, 16)
    theirs = transformers.ViTMAEForPreTraining(config)
    ours = check_folder_parity(
        theirs,
        tmp_path,
        {"pixel_values": image, "noise": noise},
        logits,
        our_kwargs={"image": image, "noise": noise},
        our_pick=lambda out: out[1],
        bf16_atol=None,  # noise in bf16 has ties
    )
    with torch.no_grad():
        expected, got = theirs(image, noise=noise), ours(image=image, noise=noise)[2][0]
    assert torch.equal(got["mask"], expected.mask)
    assert torch.equal(got["ids_restore"], expected.ids_restore)


@pytest.mark.parametrize("end", [2, 49])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(end, activation, tmp_path):
    sizes = {"hidden_act": activation, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"hidden_size": 18, "intermediate_size": 20, "vocab_size": 50, "max_position_embeddings": 16}
    vision = {"hidden_size": 24, "intermediate_size": 36, "image_size": 8, "patch_size": 4, "num_channels": 2}
    more = {"num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": end, "bos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=sizes | text | more, vision_config=sizes | vision, projection_dim=10)
    image, ids = IMAGE[:, :, :8], torch.randint(3, 49, (3, 9))
    ids[[0, 1, 2], [8, 4, 6]] = 49
    padding = torch.ones(3, 9, dtype=torch.long)
    padding[1, 5:] = padding[2, 7:] = 0
    for folder, mask in (("full", None), ("padded", padding)):
        theirs = transformers.CLIPModel(config)
        (tmp_path / folder).mkdir()
        check_folder_parity(
            theirs,
            tmp_path / folder,
            {"pixel_values": image, "input_ids": ids, "attention_mask": mask},
            lambda out: torch.cat(
                [out.logits_per_text, out.text_embeds, out.image_embeds.T.flatten()[:6].view(3, 2)], 1
            ),
            our_kwargs={"image": image, "text_input_ids": ids, "text_attention_mask": mask},
            our_pick=lambda out: torch.cat([out[2], out[1], out[0].T.flatten()[:6].view(3, 2)], 1),
            std=0.1,
            bf16_atol=0.2,  # of similarities up to e^2.6
        )


def test_the_positions_that_old_clip_files_carry(tmp_path):
    save_huggingface(FAMILIES["clip-ends"].build(image_size=8), tmp_path / "one")
    file = tmp_path / "one" / "model.safetensors"
    places = {
        f"{part}_model.embeddings.position_ids": torch.arange(n)[None] for part, n in (("text", 12), ("vision", 5))
    }
    save_file(load_file(file) | places, file)
    save_huggingface(AutoModel.from_pretrained(tmp_path / "one"), tmp_path / "two")
    check_same_files(tmp_path / "one", tmp_path / "two")
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(12).flip(0)[None]}, file)
    with pytest.raises(CheckpointError, match="'text_model.embeddings.position_ids' is not what the configuration"):
        AutoModel.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("ViTConfig", {"hidden_act": "relu"}, "a 'vit' has hidden_act='relu', supported is 'gelu'"),
        ("ViTConfig", {"qkv_bias": False}, "a 'vit' has qkv_bias=False, supported is True"),
        ("CLIPConfig", {"text_config": {"hidden_act": "gelu"}}, "hidden_act='gelu', supported is 'quick_gelu'"),
        ("CLIPConfig", {"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps=1e-06, supported is 1e-05"),
        ("CLIPConfig", {"text_config": {"eos_token_id": [1, 2]}}, r"has eos_token_id=\[1, 2\] in text_config"),
    ],
)
def test_options_that_change_the_forward_are_refused(config, options, message, tmp_path):
    name = {"ViTConfig": "ViTForImageClassification", "CLIPConfig": "CLIPModel"}[config]
    getattr(transformers, config)(**options, architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        AutoModel.from_pretrained(tmp_path, build_only=True)


def test_files_with_the_names_of_the_first_transformers_are_read(tmp_path):
    ours = FAMILIES["mae-exact"].build(image_size=[8, 8]).eval()
    save_huggingface(ours, tmp_path / "one")
    names = load_file(tmp_path / "one" / "model.safetensors").keys()
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in names
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "one").eval()
    image, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 4)
    again = AutoModel.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        assert_close(again(image=image, noise=noise)[1], theirs(image, noise=noise).logits, atol=1e-5, rtol=1e-5)
    save_huggingface(again, tmp_path / "two")
    check_same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["vit", "deit", "yolos", "yolos-mid", "clip-ends"])
def test_models_built_here_are_written_and_read(name, tmp_path):
    changes = {"vocab_size": 1} if name == "vit" else {"vocab_size": 4} if name.startswith("yolos") else {}
    changes = {"image_size": 8} if name == "clip-ends" else changes
    ours = FAMILIES[name].build(**changes).eval()
    model_type = name.partition("-")[0]
    save_huggingface(ours, tmp_path / "one", model_type=model_type)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "one")  # its config is theirs, too
    assert theirs.config.model_type == model_type
    again = AutoModel.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        image = torch.randn(2, 3, *ours.config.image_size)
        kwargs = FAMILIES[name].inputs(0) | {"image": image}
        for one, other in zip(flat(again(**kwargs)), flat(ours(**kwargs)), strict=True):
            assert torch.equal(one, other)
    save_huggingface(again, tmp_path / "two")
    check_same_files(tmp_path / "one", tmp_path / "two")


def test_special_tokens_without_a_place_are_refused(tmp_path):
    ours = ViTModel(FAMILIES["vit"].build().config.replace(post_len=1))
    with pytest.raises(ConfigError, match="text_end_token_id is None. Set text_end_token_id where texts end with one"):
        save_huggingface(FAMILIES["clip"].build(image_size=8), tmp_path)
    with pytest.raises(ConfigError, match="1 tokens before the patches, 0 after .* here there are 1, 1 and 2. Save it"):
        save_huggingface(ours, tmp_path)


@pytest.mark.parametrize("name", ["vit", "yolos-mid", "mae-exact", "clip-ends"])
def test_convert_verifies_every_format(name, tmp_path, capsys):
    changes = {"vit": {"vocab_size": 1}, "yolos-mid": {"vocab_size": 4}}.get(name, {"image_size": 8})
    save_huggingface(FAMILIES[name].build(**changes), tmp_path / "hf")
    for source, target, to in (("hf", "sat", "sat"), ("sat", "native", "native"), ("native", "back", "hf")):
        more = ["--model-parallel-size", "2"] if to == "sat" and name in ("vit", "yolos-mid") else []
        words = ["convert", str(tmp_path / source), str(tmp_path / target), "--to", to, "--verify", *more]
        main(words)
        said = capsys.readouterr().out
        assert float(said.split("maximum difference ")[1].split()[0]) < 1e-5
        if "hf" in (source, to):
            assert re.search("outputs of (ViT|Yolos|CLIP)", said), said
    check_same_files(tmp_path / "hf", tmp_path / "back")
