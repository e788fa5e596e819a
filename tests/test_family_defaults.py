"""What each family does where the caller says little: masks, positions, padding, pasts; and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel, TransformerConfig
from sat_lightning.errors import ConfigError, HookError, InputError
from sat_lightning.mixins import LMHeadMixin
from sat_lightning.models import DistillModel, GLMModel, GPT2Model, LLaMAModel, RobertaModel
from tests.families import FAMILIES, MODERN, NEW, SIZES, ids

IDS = ids()


def built(name, **changes):
    return FAMILIES[name].build(**changes).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-old", "mixtral", "mistral", "qwen3", "glm130b"])
def test_an_explicit_none_is_full_attention_and_an_omitted_mask_is_not(name):
    model = built(name)
    full = model(IDS, attention_mask=None)[0]
    changed = IDS.clone()
    changed[:, -1] = 0
    assert not torch.allclose(model(changed, attention_mask=None)[0][:, 0], full[:, 0], atol=1e-4)
    assert_close(model(IDS, attention_mask=-1)[0], model(IDS)[0])
    assert not torch.allclose(full, model(IDS)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "roberta", "dpr-context", "t5"])
def test_encoders_read_b_s_as_padding(name):
    """Padding on either side changes nothing where text stands, also where a batch has as many rows as tokens."""
    model = built(name)
    key = "enc_" if name == "t5" else ""
    rest = {"dec_input_ids": ids(9, 4)} if name == "t5" else {}
    text = ids(9, 9)

    def run(input_ids, **kw):
        returned = model(**{f"{key}input_ids": input_ids, **{f"{key}{k}": v for k, v in kw.items()}}, **rest)
        return returned[0] if name != "dpr-context" else returned[0][:, None]

    padding = torch.ones(9, 9, dtype=torch.long)
    padding[:, 7:] = 0
    short = run(text[:, :7])
    assert_close(run(text, attention_mask=padding)[:, :7], short, atol=1e-5, rtol=1e-5)
    assert_close(run(text, attention_mask=padding.bool())[:, :7], short, atol=1e-5, rtol=1e-5)
    assert_close(run(text, attention_mask=padding[:, None, None, :].float())[:, :7], short, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(text)[:, :1], short[:, :1], atol=1e-4)


def test_an_encoder_hides_padding_that_it_knows():
    model = built("bert", pad_token_id=0)
    text = IDS.clone()
    text[1, 6:] = 0
    assert_close(model(text)[0][1, :6], model(text[1:, :6])[0][0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(text, attention_mask=None)[0][1, :6], model(text)[0][1, :6], atol=1e-4)
    roberta = built("roberta")
    text[1, 6:], padded = 1, text.clone()
    padded[1] = torch.cat([torch.ones(3, dtype=torch.long), text[1, :6]])
    assert_close(roberta(padded)[0][1, 3:], roberta(text[1:, :6])[0][0], atol=1e-5, rtol=1e-5)


def test_roberta_refuses_what_its_table_cannot_number():
    model = RobertaModel(RobertaModel.config_class(**(SIZES | {"max_sequence_length": 10})))
    model(ids(1, 8))
    with pytest.raises(InputError, match="9 tokens, max_sequence_length is 10, of which 2 stand before the first"):
        model(ids(1, 9))


def test_a_window_ends_so_many_keys_back_whatever_the_mask():
    model = built("mistral", num_layers=1)
    changed = IDS.clone()
    changed[:, 2] = 0
    seen = (model(changed)[0] - model(IDS)[0]).abs().amax((0, 2)) > 1e-6
    assert seen.tolist() == [False, False, True, True, True, True, False, False, False]
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    assert_close(model(IDS, attention_mask=mask)[0], model(IDS)[0], atol=1e-6, rtol=1e-5)
    assert_close(model(IDS, attention_mask=mask.float())[0], model(IDS)[0], atol=1e-6, rtol=1e-5)
    mask[1, ..., 0] = False
    got = model(IDS, attention_mask=mask)[0]
    assert not torch.allclose(got[1, 1:4], model(IDS)[0][1, 1:4], atol=1e-4)
    assert_close(got[:, 4:], model(IDS)[0][:, 4:], atol=1e-6, rtol=1e-5)


def test_gptneo_is_causal_whatever_the_mask_and_takes_padding():
    model = built("gptneo")
    assert_close(model(IDS, attention_mask=None)[0], model(IDS)[0])
    padding = torch.ones(2, 1, 1, 9)
    padding[1, ..., :3] = 0
    places = torch.stack([torch.arange(9), (torch.arange(9) - 3).clamp(min=0)])
    got = model(IDS, places, padding)[0]
    assert_close(got[1, 3:], model(IDS[1:, 3:])[0][0], atol=1e-5, rtol=1e-5)


def test_glm_makes_two_rows_of_positions():
    model = built("glm")
    places = torch.stack([torch.arange(9), torch.zeros(9, dtype=torch.long)])[None]
    assert_close(model(IDS)[0], model(IDS, places, None)[0])
    with pytest.raises(InputError, match=r"position_ids has shape \[1, 9\]; GLM needs \[batch, 2, length\]"):
        model(IDS, torch.arange(9)[None])


def test_glm_lays_a_blank_out_by_its_ids():
    model = GLMModel(GLMModel.config_class(**SIZES, sop_token_id=2, mask_token_ids=(1,)))
    text = torch.tensor([[7, 1, 8, 2, 9, 10]])
    places = model.make_position_ids(text)
    assert places.tolist() == [[[0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]]]
    mask = model.make_attention_mask(text)[0, 0].int()
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]


def test_chatglm_reads_true_as_masked():
    for name in ("chatglm", "chatglm2", "chatglm4", "glm130b"):
        model, text = built(name), FAMILIES[name].inputs(0)["input_ids"]
        mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
        visible = mask.float() if name != "glm130b" else 1 - mask.float()
        kw = {"position_ids": torch.stack([torch.arange(9)] * 2)[None]} if name == "chatglm" else {}
        assert_close(model(text, attention_mask=~mask, **kw)[0], model(text, attention_mask=visible, **kw)[0])


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "chatglm3", "chatglm4"])
@pytest.mark.parametrize("gives_all_ids", [True, False])
def test_a_past_gives_what_the_whole_gives(name, gives_all_ids):
    model, text = built(name), FAMILIES[name].inputs(0)["input_ids"]
    expected = model(text)
    past = [layer["past_key_values"] for layer in model(text[:, :-1])[1:]]
    kw = {}
    if name == "chatglm" and not gives_all_ids:
        kw["position_ids"] = model.make_position_ids(text)
        with pytest.raises(InputError, match="The past holds 8 tokens and input_ids 1"):
            model(text[:, -1:], past_key_values=past)
        text, past = text[:1], [tuple(x[:, :1] for x in pair) for pair in past]  # without padding: it is not in the ids
        kw["position_ids"] = kw["position_ids"][:1]
        expected = [expected[0][:1]]
    got = model(text if gives_all_ids else text[:, -1:], past_key_values=past, **kw)
    assert_close(got[0], expected[0][:, -1:], atol=1e-5, rtol=1e-5)
    if name != "chatglm":  # there padding looks at nothing, that is, at the mean of as many keys as there are
        for layer, whole in zip(got[1:], expected[1:], strict=True):
            assert_close(layer["past_key_values"], whole["past_key_values"], atol=1e-5, rtol=1e-5)


def test_chatglm2_pads_with_a_past():
    model, text = built("chatglm2"), IDS
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0
    expected = model(text, attention_mask=padding)
    past = [layer["past_key_values"] for layer in model(text[:, :-1], attention_mask=padding[:, :-1])[1:]]
    got = model(text[:, -1:], attention_mask=padding, past_key_values=past)
    assert_close(got[0], expected[0][:, -1:], atol=1e-5, rtol=1e-5)


def test_no_past_is_kept_while_training():
    model = built("chatglm2").train()
    assert model(IDS)[1:] == [{}, {}]


@pytest.mark.parametrize("name", ["encoder-decoder", "t5"])
def test_reading_and_writing_can_be_done_apart(name):
    model, short = built(name), ids(2, 7, seed=1)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 6:] = 0
    outputs, logits, *_ = model(IDS, dec_input_ids=short, enc_attention_mask=padding)
    encoded = model.encode(IDS, attention_mask=padding)
    assert_close(encoded, outputs)
    mask = padding[:, None, None, :]
    assert_close(model.decode(short, encoder_outputs=encoded, cross_attention_mask=mask)[0], logits)
    if name == "t5":
        assert_close(model.encode(IDS, padding), outputs)


def test_parts_of_a_composed_model_take_mixins_by_name():
    model = built("encoder-decoder")
    assert set(model.parts) == {"encoder", "decoder"}
    assert model.hook_origins["encoder.final_forward"] == "final"
    assert "decoder" in model.explain_hooks()
    model.add_mixin("decoder.head", LMHeadMixin(model.decoder.config))
    assert model.get_mixin("decoder.head") is model.decoder.mixins["head"]
    assert model(IDS, dec_input_ids=IDS)[1].shape == (2, 9, 60)
    model.reinit(["decoder.head"])
    model.del_mixin("decoder.head")
    assert "head" not in model.decoder.mixins
    with pytest.raises(HookError, match="'head' names no mixin of a EncoderDecoderModel: say of which part, as in"):
        model.add_mixin("head", LMHeadMixin(model.config))


def test_a_decoder_may_differ_from_its_encoder():
    changes = {"dec_hidden_size": 16, "dec_num_attention_heads": 2, "dec_max_sequence_length": 12}
    from sat_lightning.models import EncoderDecoderModel

    config = EncoderDecoderModel.config_class(**SIZES, **changes)
    model = EncoderDecoderModel(config, tie_word_embeddings=False)
    assert model.decoder.transformer.layers[0].cross_attention.key_value.weight.shape == (32, 32)
    assert model(IDS, dec_input_ids=IDS)[1].shape == (2, 9, 60)


def test_a_teacher_never_learns():
    teacher, student = built("gpt2"), built("llama")
    model = DistillModel(teacher, student).train()
    assert not teacher.training and student.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.enable_grad():
        wanted, got = model({"input_ids": IDS}, {"input_ids": IDS})
        (got.log_softmax(-1) - wanted.log_softmax(-1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert_close(wanted, teacher(IDS)[0])
    twin = DistillModel(type(model.config).from_dict(model.config.to_dict(everything=True)))
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert {name.split(".")[0] for name in twin.state_dict()} == {"teacher", "student"}
    assert twin.config == model.config
    with pytest.raises(ConfigError, match="DistillModel needs a student beside its teacher"):
        DistillModel(teacher)


def test_a_teacher_and_a_student_are_saved_and_loaded(tmp_path):
    model = DistillModel(built("gpt2"), built("llama")).eval()
    model.save_pretrained(tmp_path / "pair")
    twin, kw = AutoModel.from_pretrained(tmp_path / "pair"), {"input_ids": IDS}
    assert_close(twin(kw, kw), model(kw, kw), atol=0, rtol=0)


def test_two_models_share_a_backbone():
    config = LLaMAModel.config_class(**(SIZES | NEW))
    first = LLaMAModel(config)
    second = LLaMAModel(config, transformer=first.transformer)
    assert second.transformer is first.transformer
    second.get_mixin("lm").load_state_dict(first.get_mixin("lm").state_dict())
    assert_close(second(IDS)[0], first(IDS)[0])


REFUSED = [
    (LLaMAModel, {"sliding_window": 0}, "sliding_window is 0, it must be above 0"),
    (FAMILIES["mixtral"].class_name, {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
    ("GPTNeoModel", {"attention_types": ["global"]}, "give each of the 2 layers 'global' or 'local'"),
    ("DPRReader", {"projection_dim": 4}, "projection_dim is 4"),
    ("DPRReader", {"hidden_act": "relu"}, "hidden_act: unknown value 'relu', known are gelu_tanh, gelu"),
]


@pytest.mark.parametrize(("model_class", "options", "message"), REFUSED)
def test_refusals_name_the_cure(model_class, options, message):
    from sat_lightning import models

    cls = getattr(models, model_class) if isinstance(model_class, str) else model_class
    with pytest.raises(ConfigError, match=message):
        cls.config_class(**(SIZES | options))


def test_rotary_positions_of_a_wrong_shape_are_refused():
    with pytest.raises(InputError, match=r"position_ids has shape \[1, 9\]; this model needs \[batch, 2, length\]"):
        built("chatglm")(IDS, torch.arange(9)[None], None)
    with pytest.raises(InputError, match="position_ids is None, and rotary positions need them"):
        built("llama-old")(IDS, None)


def test_a_config_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="config is a dict, it must be a TransformerConfig"):
        GPT2Model({"num_layers": 2})
    with pytest.raises(ConfigError, match="config is a dict, it must be a LLaMAConfig"):
        LLaMAModel({"num_layers": 2})
    model = LLaMAModel(TransformerConfig(**(SIZES | MODERN)))
    assert type(model.config).__name__ == "LLaMAConfig"
    assert not model.config.use_bias
