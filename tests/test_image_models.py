"""Models of images: what a call may leave out, what is refused, and weights for another size of image."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.errors import CheckpointError, ConfigError, InputError
from sat_lightning.models import ViTModel
from tests.families import FAMILIES

IMAGE = FAMILIES["vit"].inputs(0)["image"]


@pytest.fixture
def vit():
    return FAMILIES["deit"].build().eval()


def test_special_tokens_may_be_given_left_out_or_given_once(vit):
    expected = vit(image=IMAGE)[0]
    for input_ids in (torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1]])):
        assert torch.equal(vit(input_ids, image=IMAGE)[0], expected)
        assert torch.equal(vit(input_ids, None, None, image=IMAGE)[0], expected)
    assert not torch.allclose(vit(torch.tensor([[1, 0]]), image=IMAGE)[0], expected)


def test_a_mask_over_patches_is_honoured(vit):
    visible = torch.ones(2, 1, 1, 8)
    visible[:, :, :, 5:] = 0
    changed = IMAGE.clone()
    changed[:, :, 8:] = 0  # the last row of patches, 6 and 7
    changed[:, :, 4:8, 4:] = 0  # patch 5
    hidden = vit(image=IMAGE, attention_mask=visible)[0]
    assert_close(vit(image=changed, attention_mask=visible)[0], hidden)
    assert not torch.allclose(vit(image=changed)[0], hidden, atol=1e-3)


def test_patches_are_read_row_by_row(vit):
    patches = vit.get_mixin("patch_embedding").embed_patches(IMAGE)
    weight, bias = vit.get_mixin("patch_embedding").proj.weight, vit.get_mixin("patch_embedding").proj.bias
    place = 3  # row 1, column 1 of a grid of 3 by 2
    expected = torch.einsum("bchw,kchw->bk", IMAGE[:, :, 4:8, 4:8], weight) + bias
    assert_close(patches[:, place], expected, atol=1e-5, rtol=1e-5)


def test_an_image_in_double_is_read_in_the_models_precision(vit):
    assert_close(vit(image=IMAGE.double())[0], vit(image=IMAGE)[0])


def test_what_does_not_fit_is_refused(vit):
    with pytest.raises(InputError, match=r"ViTModel needs image=\[batch, in_channels, height, width\]"):
        vit()
    with pytest.raises(InputError, match=r"image is missing, it must be \['batch', 3, 12, 8\]"):
        vit(torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match=r"image is of shape \[2, 3, 8, 12\], it must be .*image_size=\[h, w\]"):
        vit(image=IMAGE.transpose(2, 3))
    with pytest.raises(InputError, match="input_ids has 1 special tokens, the model 2 before and 0 after"):
        vit(torch.tensor([[0]]), image=IMAGE)
    with pytest.raises(ConfigError, match=r"image_size is \[12, 8\], .* at least patch_size 9"):
        vit.config.replace(patch_size=9)
    with pytest.raises(ConfigError, match=r"vocab_size is 2, pre_len \+ post_len is 2 \+ 1"):
        vit.config.replace(post_len=1)


def test_sizes_follow_from_the_image(vit):
    assert vit.config.max_sequence_length == 2 + 6
    assert vit.config.replace(image_size=16).image_size == [16, 16]
    assert vit.config.replace(image_size=16).max_sequence_length == 2 + 16
    assert vit.config.replace(image_size=[13, 15]).max_sequence_length == 2 + 9  # whole patches only


def test_another_image_size_is_an_explicit_request(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r'images of \[12, 8\], the model reads \[16, 16\].*"interpolate"'):
        AutoModel.from_pretrained(tmp_path, image_size=[16, 16])
    with pytest.raises(CheckpointError, match='resize_positions="interpolate"'):  # as many patches, in another order
        AutoModel.from_pretrained(tmp_path, image_size=[8, 12])
    with pytest.raises(CheckpointError, match='resize_positions="interpolate"'):
        AutoModel.from_pretrained(tmp_path, image_size=[16, 16], resize_positions="repeat")


@pytest.mark.parametrize("size", [[16, 16], [8, 12], [4, 4]])
def test_positions_are_stretched_and_special_tokens_keep_theirs(vit, tmp_path, size):
    vit.save_pretrained(tmp_path)
    other = ViTModel.from_pretrained(tmp_path, image_size=size, resize_positions="interpolate")
    before, after = (model.transformer.position_embeddings.weight for model in (vit, other))
    assert torch.equal(after[:2], before[:2])
    grid = before[2:].detach().reshape(3, 2, -1).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(grid, (size[0] // 4, size[1] // 4), mode="bicubic")
    assert_close(after[2:], expected[0].flatten(1).T)
    assert other(image=torch.randn(2, 3, *size))[0].isfinite().all()
    own = {name: tensor for name, tensor in vit.state_dict().items() if "position" not in name}
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in own.items())


def test_more_special_tokens_begin_anew(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    more = {"post_len": 3, "vocab_size": 5, "resize_vocab": "initial", "resize_positions": "interpolate"}
    other = AutoModel.from_pretrained(tmp_path, **more)
    before, after = (model.transformer.position_embeddings.weight for model in (vit, other))
    assert torch.equal(after[:8], before)
    assert 0 < after[8:].std() < 0.1
    assert len(other.transformer.word_embeddings.weight) == 5
