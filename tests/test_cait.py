"""CaiT: what its masks hide, what nothing uses, talking heads written out, another size of image, refusals."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.errors import ConfigError
from sat_lightning.models import CaiT
from tests.families import FAMILIES

IMAGE = FAMILIES["cait"].inputs(0)["image"]


def build(**changes):
    return FAMILIES["cait"].build(**changes).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_class_token_may_be_left_out_or_given_once():
    model = build()
    outputs, logits, *layers = model(image=IMAGE, output_hidden_states=True)
    assert (outputs.shape, logits.shape, len(layers)) == ((2, 6, 32), (2, 5), 1)
    for input_ids in (torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)):
        places = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
        assert torch.equal(model(input_ids, *places, image=IMAGE)[1], logits)
    other = model(torch.ones(1, 1, dtype=torch.long), image=IMAGE)
    assert torch.equal(other[0], outputs)
    assert not torch.allclose(other[1], logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_hidden_patches_are_seen_by_nobody(dtype):
    model = build()
    for linear in model.encoder.get_mixin("attn").proj_w:
        linear.bias.zero_()  # it gives weight to every key, hidden or not
    visible = torch.ones(2, 1, 1, 6, dtype=dtype)
    visible[..., 4:] = 0
    changed = IMAGE.clone()
    changed[:, :, 8:] = 0  # the last row of patches
    masks = {"enc_attention_mask": visible, "cross_attention_mask": visible}
    expected = model(image=IMAGE, **masks)
    got = model(image=changed, **masks)
    assert_close(got[0][:, :4], expected[0][:, :4])
    assert_close(got[1], expected[1])
    for name in masks:
        assert not torch.allclose(model(image=changed, **{name: visible})[1], expected[1], atol=1e-3)


def test_heads_talk_before_and_after_the_softmax():
    model = build(num_multi_query_heads=2)
    mixin, layer_id = model.encoder.get_mixin("attn"), 1
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask, weights = (torch.rand(5, 6) > 0.3).float(), torch.randn(2, 1, 5, 6)
    kw = {"layer_id": layer_id, "hooks": model.encoder.hooks, "full_mask": None}
    got = mixin.attention_fn(query, key, value, mask, log_attention_weights=weights, **kw)
    before, after = mixin.proj_l[layer_id], mixin.proj_w[layer_id]
    scores = torch.einsum("bhsd,bhtd->bhst", query, key[:, [0, 0, 1, 1]]) / 8**0.5
    scores = torch.einsum("bhst,gh->bgst", scores, before.weight) + before.bias[:, None, None] + weights
    shares = (scores * mask - 10000 * (1 - mask)).softmax(-1)
    shares = torch.einsum("bhst,gh->bgst", shares, after.weight) + after.bias[:, None, None]
    assert_close(got, torch.einsum("bhst,bhtd->bhsd", shares, value[:, [0, 0, 1, 1]]), atol=1e-5, rtol=1e-4)


def test_what_nothing_uses_does_not_learn():
    frozen = {name for name, p in build().named_parameters() if not p.requires_grad}
    kinds = ("attention.query_key_value", "attention.dense", "post_attention_layernorm")
    wanted = {f"decoder.transformer.layers.0.{kind}.{end}" for kind in kinds for end in ("weight", "bias")}
    assert frozen == wanted | {"decoder.transformer.position_embeddings.weight"}


def test_branches_and_weights_are_dropped_while_training():
    for changes in ({"drop_path": 0.9}, {"attention_dropout": 0.5}):
        model = build(**changes)
        expected = model(image=IMAGE)[1]
        assert torch.equal(model(image=IMAGE)[1], expected)
        assert not torch.allclose(model.train()(image=IMAGE)[1], expected, atol=1e-4)


def test_another_size_of_image_stretches_positions(tmp_path):
    build().save_pretrained(tmp_path)
    larger = AutoModel.from_pretrained(tmp_path, image_size=[16, 16], resize_positions="interpolate")
    assert larger(image=torch.randn(2, 3, 16, 16))[0].shape == (2, 16, 32)


def test_a_decoder_may_be_deeper_and_have_another_table_but_no_other_width():
    model = build(dec_num_layers=3, dec_max_sequence_length=2, dec_num_attention_heads=2)
    assert model.decoder.transformer.position_embeddings.weight.shape == (2, 32)
    assert len(model(image=IMAGE)) == 5
    with pytest.raises(ConfigError, match="dec_hidden_size is 16, hidden_size is 32: class token and patches are one"):
        CaiT.config_class(hidden_size=32, num_attention_heads=4, dec_hidden_size=16)
