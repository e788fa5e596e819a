"""GLM-4V: where images stand among words, what reaches the image encoder, pasts, partitions, refusals."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint.sat import save_sat
from sat_lightning.errors import InputError
from tests.families import FAMILIES, embed

FAMILY = FAMILIES["glm4v"]
CALL = FAMILY.inputs(0)
IDS, MASK, IMAGE = CALL["input_ids"], CALL["image_embed_mask"], CALL["vision_image"]


@pytest.fixture
def model():
    return FAMILY.build().eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_features_stand_where_the_mask_says_in_order(model):
    mixin = model.get_mixin("eva")
    features = mixin(image=IMAGE)
    assert features.shape == (2, 3, 32)
    assert_close(features[:, 0], mixin.boi[0].expand(2, -1))
    assert_close(features[:, -1], mixin.eoi[0].expand(2, -1))
    got = embed(model, IDS, image_embed_mask=MASK, vision_image=IMAGE)
    assert torch.equal(got[MASK.bool()], features.flatten(0, 1))
    assert torch.equal(got[~MASK.bool()], model.transformer.word_embeddings(IDS)[~MASK.bool()])
    both_in_one = torch.zeros_like(MASK)
    both_in_one[1, 1:4], both_in_one[1, 5:8] = 1, 1
    got = embed(model, IDS, image_embed_mask=both_in_one.bool(), vision_image=IMAGE)
    assert torch.equal(got[both_in_one.bool()], features.flatten(0, 1))
    assert torch.equal(got[0], model.transformer.word_embeddings(IDS[0]))


def test_what_stands_under_an_image_does_not_matter_and_the_image_does(model):
    expected = model(**CALL)[0]
    other = IDS.clone()
    other[MASK.bool()] = 0
    assert torch.equal(model(**{**CALL, "input_ids": other})[0], expected)
    assert not torch.allclose(model(**{**CALL, "vision_image": IMAGE.flip(0)})[0], expected, atol=1e-3)
    text = model(IDS)[0]
    assert torch.equal(model(IDS, image_embed_mask=torch.zeros_like(MASK))[0], text)
    assert not torch.allclose(expected, text, atol=1e-3)


def test_keywords_reach_the_image_encoder(model):
    expected = model(**CALL)[0]
    assert torch.equal(model(**CALL, vision_input_ids=torch.zeros(2, 1, dtype=torch.long))[0], expected)
    hidden = torch.ones(2, 1, 1, 7)
    hidden[..., 3:] = 0
    assert not torch.allclose(model(**CALL, vision_attention_mask=hidden)[0], expected, atol=1e-4)


def test_a_past_holds_the_images(model):
    expected = model(**CALL)[0]
    first = {**CALL, "input_ids": IDS[:, :-1], "image_embed_mask": MASK[:, :-1]}
    past = [layer["past_key_values"] for layer in model(**first)[1:]]
    assert_close(model(IDS, past_key_values=past)[0], expected[:, -1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"Leave both out where a past holds the images already"):
        model(**CALL, past_key_values=past)


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(InputError, match=r"image_embed_mask is missing; with vision_image it must be \[2, 9\]"):
        model(IDS, vision_image=IMAGE)
    few = MASK.clone()
    few[0, 1] = 0
    with pytest.raises(RuntimeError, match="image_embed_mask must have as many ones as there are features .*: 6"):
        model(**{**CALL, "image_embed_mask": few})
    with pytest.raises(InputError, match=r"image is of shape \[2, 3, 8, 8\], it must be \['batch', 3, 12, 8\]"):
        model(**{**CALL, "vision_image": IMAGE[..., :8, :8]})


def test_partitions_follow_the_encoders_own_sizes(tmp_path):
    eva = {**FAMILY.options["eva_args"], "num_attention_heads": 2}
    model = FAMILY.build(vocab_size=1000, eva_args=eva).eval()
    save_sat(model, tmp_path, model_parallel_size=2)
    rank = torch.load(tmp_path / "1" / "mp_rank_01_model_states.pt", weights_only=True)["module"]
    encoder = "mixins.eva.vit_model.transformer."
    weight = model.state_dict()[f"{encoder}layers.0.attention.query_key_value.weight"]
    wanted = torch.cat([block[12:] for block in weight.split(24)])  # every head has a key and a value of its own
    assert torch.equal(rank[f"{encoder}layers.0.attention.query_key_value.weight"], wanted)
    assert rank[f"{encoder}word_embeddings.weight"].shape == (1, 24)
    assert rank["transformer.word_embeddings.weight"].shape == (500, 32)
    assert rank["transformer.layers.0.attention.query_key_value.weight"].shape == (32, 32)
    again = AutoModel.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
