"""Models of images: what a call may leave out, what is refused, and weights for another size of image."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.checkpoint.huggingface import save_huggingface
from sat_lightning.errors import CheckpointError, ConfigError, InputError
from sat_lightning.models import YOLOS, ViTModel
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


@pytest.fixture
def mae():
    return FAMILIES["mae"].build().eval()


def test_mae_draws_anew_in_every_call_and_alike_from_one_seed(mae):
    torch.manual_seed(1)
    first, second = mae(image=IMAGE), mae(image=IMAGE)
    torch.manual_seed(1)
    again = mae(image=IMAGE)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[2][0]["ids_restore"], second[2][0]["ids_restore"])
    assert not torch.equal(first[2][0]["ids_restore"][0], first[2][0]["ids_restore"][1])


@pytest.mark.parametrize(("ratio", "num_kept"), [(0.0, 6), (0.5, 3), (0.75, 1), (0.99, 0)])
def test_mae_removes_what_it_says(mae, ratio, num_kept):
    encoder_outputs, pixels, encoder_layers, decoder_layers = mae(image=IMAGE, mask_ratio=ratio)
    assert encoder_outputs.shape == (2, 1 + num_kept, 32)
    assert pixels.shape == (2, 6, 4 * 4 * 3)
    assert encoder_layers[0]["mask"].sum(1).tolist() == [6 - num_kept] * 2
    assert (len(encoder_layers), len(decoder_layers)) == (2, 1)


def test_mae_never_sees_what_is_removed(mae):
    kw = {"noise": torch.rand(2, 6), "mask_ratio": 0.5}
    expected = mae(image=IMAGE, **kw)
    removed = expected[2][0]["mask"].view(2, 1, 3, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(removed.bool(), torch.randn_like(IMAGE), IMAGE)
    assert_close(mae(image=changed, **kw)[1], expected[1])
    assert not torch.allclose(mae(image=changed, noise=kw["noise"], mask_ratio=0.0)[1], expected[1], atol=1e-3)


def test_mae_honours_masks_over_all_patches(mae):
    """A patch that is masked says nothing, whether or not the drawing keeps it, and wherever it puts it."""
    kw = {"noise": torch.rand(2, 6), "mask_ratio": 0.5}
    keys = torch.ones(2, 1, 1, 7)
    keys[:, :, :, 4] = 0
    pairs = keys.expand(-1, -1, 7, -1)
    by_keys = mae(image=IMAGE, enc_attention_mask=keys, **kw)[0]
    assert_close(mae(image=IMAGE, enc_attention_mask=pairs, **kw)[0], by_keys)
    assert_close(mae(image=IMAGE, enc_attention_mask=pairs[:1, 0].squeeze(0), **kw)[0], by_keys)
    whole = mae.encoder(image=IMAGE, attention_mask=keys, noise=torch.arange(6.0).expand(2, -1), mask_ratio=0.0)[0]
    changed = IMAGE.clone()
    changed[:, :, 4:8, 4:] = 0  # patch 3, token 4
    other = mae.encoder(image=changed, attention_mask=keys, noise=torch.arange(6.0).expand(2, -1), mask_ratio=0.0)[0]
    rest = [0, 1, 2, 3, 5, 6]
    assert_close(other[:, rest], whole[:, rest])
    full = mae(image=IMAGE, dec_attention_mask=torch.ones(7, 7), **kw)[1]
    assert_close(full, mae(image=IMAGE, **kw)[1])
    causal = mae(image=IMAGE, dec_attention_mask="causal", **kw)[1]
    assert not torch.allclose(causal, full, atol=1e-3)


def test_mae_parts_stand_alone(mae):
    kw = {"noise": torch.rand(2, 6)}
    encoder_outputs, pixels, layers, _ = mae(torch.zeros(2, 1, dtype=torch.long), image=IMAGE, **kw)
    assert torch.equal(mae.encode(torch.zeros(2, 1, dtype=torch.long), image=IMAGE, **kw), encoder_outputs)
    again = mae.decode(encoder_outputs=encoder_outputs, ids_restore=layers[0]["ids_restore"])[0]
    assert torch.equal(again, pixels)
    places = torch.arange(7).expand(2, -1)
    assert torch.equal(mae(torch.zeros(2, 1, dtype=torch.long), None, places, image=IMAGE, **kw)[1], pixels)


def test_mae_positions_of_both_parts_are_stretched(mae, tmp_path):
    mae.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, image_size=[8, 16], resize_positions="interpolate")
    assert [len(part.transformer.position_embeddings.weight) for part in other.parts.values()] == [9, 9]
    assert other(image=torch.randn(2, 3, 8, 16))[1].shape == (2, 8, 48)
    with pytest.raises(ConfigError, match="MAE has pre_len 1 and post_len 0; here they are 2 and 0"):
        mae.config.replace(pre_len=2, vocab_size=2)
    with pytest.raises(ConfigError, match="dec_hidden_act: unknown value 'relu'"):
        mae.config.replace(dec_hidden_act="relu")


def test_a_vit_is_read_from_the_encoder_of_a_mae(mae, tmp_path):
    """The usual way on: pretrain, keep the encoder, add a head."""
    mae.save_pretrained(tmp_path)
    config = ViTModel.config_class(**{name: getattr(mae.config, name) for name in ("num_layers", "hidden_size")})
    same = ("num_attention_heads", "vocab_size", "image_size", "patch_size", "layernorm_epsilon")
    vit = ViTModel(config.replace(num_classes=5, **{name: getattr(mae.config, name) for name in same}))
    report = load_checkpoint(
        vit, tmp_path, prefix="encoder.", may_miss=("mixins.cls.*",), ignore=("decoder.*", "mixins.mask_patches.*")
    )
    assert sorted(report.missing) == ["mixins.cls.classifier.bias", "mixins.cls.classifier.weight"]
    noise = torch.arange(6.0).expand(2, -1)
    vit.del_mixin("cls")
    vit.transformer.final_layernorm.eval()
    hidden = vit.eval()(image=IMAGE, output_hidden_states=True)[-1]["hidden_states"]
    expected = mae.encoder(image=IMAGE, noise=noise, mask_ratio=0.0, output_hidden_states=True)[-1]["hidden_states"]
    assert_close(hidden, expected)


@pytest.fixture
def clip():
    return FAMILIES["clip"].build().eval()


TEXT = FAMILIES["clip"].inputs(0)["text_input_ids"]


def test_clip_compares_vectors_of_length_one(clip):
    images, texts, by_text, by_image = clip(image=IMAGE, text_input_ids=TEXT)
    assert_close(images.norm(dim=-1), torch.ones(2))
    assert_close(texts.norm(dim=-1), torch.ones(3))
    assert_close(by_text, texts @ images.T * clip.logit_scale.exp())
    assert torch.equal(by_text, by_image.T)
    assert_close(torch.nn.functional.normalize(clip.encode_image(image=IMAGE)[0]), images)
    assert_close(torch.nn.functional.normalize(clip.encode_text(TEXT)[0]), texts)
    given = clip(torch.zeros(2, 1, dtype=torch.long), None, TEXT, torch.arange(9)[None], image=IMAGE)
    assert torch.equal(given[2], by_text)


def test_clip_reads_texts_causally_whatever_the_mask(clip):
    changed = TEXT.clone()
    changed[:, 5:] = 9
    for mask in (None, -1, "causal", torch.ones(3, 9), torch.ones(3, 1, 9, 9), torch.ones(9, 9, dtype=torch.bool)):
        before, after = (
            clip.encode_text(text, attention_mask=mask, output_hidden_states=True)[-1]["hidden_states"]
            for text in (TEXT, changed)
        )
        assert_close(before[:, :5], after[:, :5])
        assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)
    assert_close(clip.text_encoder(changed)[0], clip.encode_text(changed)[0])


def test_clip_does_not_see_padding(clip):
    padding = torch.ones(3, 9, dtype=torch.long)
    padding[:, :3] = 0
    changed = TEXT.clone()
    changed[:, :3] = 9
    places = torch.arange(9)[None]
    masked = clip.encode_text(TEXT, places, padding)[0]
    assert_close(clip.encode_text(changed, places, padding)[0], masked)
    assert not torch.allclose(clip.encode_text(TEXT)[0], masked, atol=1e-3)


def test_clip_takes_the_end_of_a_text_where_it_is_known():
    whole, cut = FAMILIES["clip-ends"].build().eval(), TEXT[:, :7]
    assert_close(whole.encode_text(TEXT)[0], whole.encode_text(cut)[0])  # token 7 stands at place 6
    largest = FAMILIES["clip-ends"].build(text_end_token_id="largest").eval()
    text = TEXT.clamp(max=58)
    text[:, 4] = 59
    assert_close(largest.encode_text(text)[0], largest.encode_text(text[:, :5])[0])
    last = FAMILIES["clip-ends"].build(text_end_token_id=None).eval()
    assert not torch.allclose(last.encode_text(TEXT)[0], last.encode_text(cut)[0], atol=1e-3)


def test_clip_stretches_positions_of_images_and_not_of_texts(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, image_size=[8, 20], resize_positions="interpolate")
    assert len(other.image_encoder.transformer.position_embeddings.weight) == 11
    assert torch.equal(other.encode_text(TEXT)[0], clip.encode_text(TEXT)[0])
    longer = AutoModel.from_pretrained(tmp_path, text_max_sequence_length=20, resize_positions="repeat")
    assert torch.equal(longer.encode_text(TEXT)[0], clip.encode_text(TEXT)[0])
    assert torch.equal(longer.encode_image(image=IMAGE)[0], clip.encode_image(image=IMAGE)[0])


def test_clip_refuses_what_it_cannot_compare(clip):
    with pytest.raises(InputError, match="CLIP compares images with texts: give text_input_ids"):
        clip(image=IMAGE)
    with pytest.raises(InputError, match="image is missing|needs image="):
        clip(text_input_ids=TEXT)
    with pytest.raises(InputError, match="The sequence has 13 tokens, max_sequence_length is 12"):
        clip.encode_text(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ConfigError, match="hidden_act: unknown value 'silu', known are quick_gelu, gelu"):
        clip.config.replace(hidden_act="silu")


def test_mae_may_have_more_positions_than_it_uses(tmp_path):
    mae = FAMILIES["mae"].build(dec_max_sequence_length=11).eval()
    assert len(mae.decoder.transformer.position_embeddings.weight) == 11
    assert mae(image=IMAGE)[1].shape == (2, 6, 48)
    mae.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has 11 rows and an image of \[12, 8\] 7 tokens"):
        AutoModel.from_pretrained(tmp_path, image_size=[8, 8], resize_positions="interpolate")
    with pytest.raises(ConfigError, match="the decoder; here it has 7 tokens and dec_max_sequence_length is 11"):
        save_huggingface(mae, tmp_path / "hf")


def test_mae_draws_inside_one_graph_and_alike_when_recomputed():
    torch._dynamo.reset()
    mae = FAMILIES["mae"].build().eval()
    compiled = torch.compile(mae, fullgraph=True, backend="eager")
    first, second = (compiled(image=IMAGE)[2][0]["ids_restore"] for _ in range(2))
    assert not torch.equal(first, second)
    gradients = []
    for is_recomputed in (False, True):
        model = FAMILIES["mae"].build(checkpoint_activations=is_recomputed).train()
        torch.manual_seed(3)
        model(image=IMAGE)[1].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(*gradients)


def test_clip_takes_another_vocabulary(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    other = AutoModel.from_pretrained(tmp_path, text_vocab_size=64, resize_vocab="zeros")
    assert torch.equal(other.encode_text(TEXT)[0], clip.encode_text(TEXT)[0])
    assert not other.text_encoder.transformer.word_embeddings.weight[60:].any()


def test_a_finder_of_objects_begins_as_a_classifier(tmp_path):
    """SAT's recipe: YOLOS from a ViT, with new tokens, new heads and larger images."""
    vit = FAMILIES["vit"].build(vocab_size=1).eval()
    vit.save_pretrained(tmp_path)
    yolos = YOLOS.from_pretrained(
        tmp_path, num_det_tokens=3, num_det_classes=7, image_size=[16, 16], layernorm_epsilon=1e-5,
        resize_vocab="initial", resize_positions="interpolate", may_miss=("mixins.det_head.*",),
        ignore=("mixins.cls.*",),
    )  # fmt: skip
    assert (yolos.config.pre_len, yolos.config.post_len, yolos.config.vocab_size) == (1, 3, 4)
    assert yolos(image=torch.randn(2, 3, 16, 16))[0]["pred_logits"].shape == (2, 3, 7)
    before, after = (model.transformer.position_embeddings.weight for model in (vit, yolos))
    assert torch.equal(after[:1], before[:1])
    assert len(after) == 1 + 16 + 3
    same = YOLOS.from_pretrained(tmp_path, num_det_tokens=0, may_miss=("mixins.det_head.*",), ignore=("mixins.cls.*",))
    assert torch.equal(same.transformer.position_embeddings.weight, before)
