"""EVA-02 and EVA-CLIP's encoder: masked patches, rotation by rows and columns, another size of image, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.errors import CheckpointError, ConfigError, InputError
from sat_lightning.models import EVA2Model
from tests.families import FAMILIES, embed
from tests.golden_cases import Case

CALL = FAMILIES["eva2"].inputs(0)
IMAGE, MASK = CALL["image"], CALL["bool_masked_pos"]


@pytest.fixture
def eva2():
    return FAMILIES["eva2"].build().eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_only_masked_patches_are_given_in_the_order_of_the_batch(eva2):
    mask = MASK.clone()
    mask[1, 0], mask[1, 1:] = True, False  # ragged: three of one image, one of the other
    got = eva2(image=IMAGE, bool_masked_pos=mask)[0]
    assert got.shape == (4, 7)
    assert_close(eva2(image=IMAGE, bool_masked_pos=mask, num_masked_pos=4)[0], got)
    assert_close(eva2(image=IMAGE, bool_masked_pos=mask.int())[0], got)
    alone = torch.cat([eva2(image=IMAGE[i : i + 1], bool_masked_pos=mask[i : i + 1])[0] for i in range(2)])
    assert_close(got, alone, atol=1e-6, rtol=1e-5)


def test_what_is_masked_is_not_seen(eva2):
    expected, changed = eva2(image=IMAGE, bool_masked_pos=MASK)[0], IMAGE.clone()
    for row, patch in MASK.nonzero().tolist():
        down, right = 4 * (patch // 2), 4 * (patch % 2)
        changed[row, :, down : down + 4, right : right + 4] = 0
    assert_close(eva2(image=changed, bool_masked_pos=MASK)[0], expected)
    assert not torch.allclose(eva2(image=IMAGE)[0][MASK], expected, atol=1e-3)


def test_patches_turn_by_row_and_column(eva2):
    """Written out with complex numbers, on a grid of three rows and two columns."""
    mixin, features = eva2.get_mixin("eva2-attn"), torch.randn(1, 4, 7, 8)
    got, _ = mixin.query_key_forward(features, features)
    assert torch.equal(got[:, :, 0], features[:, :, 0])
    for patch in range(6):
        places = [patch // 2] * 2 + [patch % 2] * 2
        angles = [place * 10000 ** (-2 * j / 4) for place, j in zip(places, [0, 1, 0, 1], strict=True)]
        turn = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles])
        numbers = torch.view_as_complex(features[:, :, 1 + patch].unflatten(-1, (4, 2)).contiguous())
        assert_close(got[:, :, 1 + patch], torch.view_as_real(numbers * turn).flatten(-2), atol=1e-6, rtol=1e-5)


def test_a_new_model_makes_the_tables_that_files_hold():
    loaded = Case("eva2").model
    fresh = EVA2Model(loaded.config)
    for name, table in loaded.get_mixin("eva2-attn").rope.named_buffers():
        assert_close(fresh.get_mixin("eva2-attn").rope.get_buffer(name), table, atol=1e-6, rtol=1e-6)


def test_another_size_of_image_needs_new_tables(eva2, tmp_path):
    eva2.save_pretrained(tmp_path / "model")
    wanted = {"image_size": [16, 16], "resize_positions": "interpolate"}
    with pytest.raises(CheckpointError, match=r"mixins.eva2-attn.rope.freqs_cos"):
        AutoModel.from_pretrained(tmp_path / "model", **wanted)
    larger = AutoModel.from_pretrained(tmp_path / "model", **wanted, may_mismatch=["mixins.eva2-attn.rope.*"])
    assert larger(image=torch.randn(1, 3, 16, 16))[0].shape == (1, 16, 7)
    assert larger.get_mixin("eva2-attn").rope.freqs_sin.shape == (16, 8)


def test_refusals_name_the_cure(eva2):
    with pytest.raises(InputError, match=r"bool_masked_pos has shape \[2, 5\]; for the patches .* must be \[2, 6\]"):
        eva2(image=IMAGE, bool_masked_pos=MASK[:, :5])
    with pytest.raises(ConfigError, match="heads have 6 features; rotation by rows and columns needs fours"):
        EVA2Model.config_class(hidden_size=24, num_attention_heads=4)


def test_branches_are_normalised_before_they_are_added():
    model = FAMILIES["eva2clip"].build(num_layers=1).eval()
    layer = model.transformer.layers[0]
    expected = embed(model, torch.zeros(2, 1, dtype=torch.long), image=IMAGE)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.zero_()
        expected = expected + norm.bias
    assert_close(model(image=IMAGE)[0], expected[:, 1:])


def test_a_whole_branch_is_dropped_while_training():
    model = FAMILIES["eva2clip"].build(num_layers=1, drop_path=0.999).train()
    embedded = embed(model, torch.zeros(2, 1, dtype=torch.long), image=IMAGE)
    assert_close(model(image=IMAGE)[0], embedded[:, 1:])
    assert not torch.allclose(model.eval()(image=IMAGE)[0], embedded[:, 1:], atol=1e-3)
