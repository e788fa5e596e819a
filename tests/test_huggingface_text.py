"""The text families equal Hugging Face's on random weights, and come back byte for byte."""

import pytest
import torch
from safetensors.torch import load_file

from sat_lightning import AutoModel
from sat_lightning.checkpoint.huggingface import RECORD, save_huggingface
from sat_lightning.checkpoint.keymap import plan_export
from sat_lightning.errors import ConfigError
from sat_lightning.models import LLaMAModel, MixtralModel
from tests.families import FAMILIES
from tests.hf_parity import check_outputs, check_parity, randomise

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def padded(side):
    """Return a padding mask `[b, s]`, the same under the causal mask `[b, 1, s, s]`, and positions."""
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[1, slice(7, None) if side == "right" else slice(None, 4)] = 0
    mask = padding[:, None, None, :].bool() & torch.ones(11, 11, dtype=torch.bool).tril()
    return padding, mask, (padding.cumsum(-1) - 1).clamp(min=0)


def check_decoder(build, **options):
    """Compare without padding, and with it on either side; a model once in bf16 keeps rounded frequencies."""
    check_parity(build(), {"input_ids": IDS}, lambda out: out.logits, **options)
    for side in ("right", "left"):
        padding, mask, positions = padded(side)
        check_parity(
            build(),
            {"input_ids": IDS, "attention_mask": padding, "position_ids": positions},
            lambda out: out.logits,
            our_kwargs={"input_ids": IDS, "attention_mask": mask, "position_ids": positions},
            visible=padding.bool(),
            bf16_atol=None,
            **options,
        )


LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
DECODERS = {
    "llama": ("Llama", {}),
    "llama tied, grouped": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "llama odd heads": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("Mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 8, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_key_value_heads": 4},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_llama_and_its_relatives(name):
    family, options = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**(DECODER | options))
    check_decoder(lambda: getattr(transformers, f"{family}ForCausalLM")(config))


BERT = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36,
    "max_position_embeddings": 20, "attn_implementation": "eager",
}  # fmt: skip


def check_encoder(build, pick, our_pick=None, **more):
    """Compare without padding and with it on either side, given as `[b, s]` to both."""
    inputs = {"input_ids": IDS, **more}
    check_parity(build(), inputs, pick, our_pick=our_pick)
    for side in ("right", "left"):
        padding = padded(side)[0]
        visible = padding.bool() if pick(build().eval()(**inputs)).dim() == 3 else None
        check_parity(
            build(), {**inputs, "attention_mask": padding}, pick, our_pick=our_pick, visible=visible, bf16_atol=None
        )


@pytest.mark.parametrize("bare", [False, True])
def test_bert(bare):
    config = transformers.BertConfig(**BERT, type_vocab_size=3)
    kind, field = ("BertModel", "last_hidden_state") if bare else ("BertForMaskedLM", "logits")
    types = torch.randint(0, 3, IDS.shape)
    check_encoder(lambda: getattr(transformers, kind)(config), lambda out: getattr(out, field), token_type_ids=types)


def test_the_pooled_vector_of_bert():
    theirs = transformers.BertModel(transformers.BertConfig(**BERT))
    ours = check_parity(theirs, {"input_ids": IDS}, lambda out: out.last_hidden_state, bf16_atol=None)
    with torch.no_grad():
        pooled = ours.get_mixin("pooler")(ours(IDS)[0])
        torch.testing.assert_close(pooled, theirs(IDS).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bare", [False, True])
def test_roberta(bare):
    config = transformers.RobertaConfig(**BERT, type_vocab_size=1, pad_token_id=1)
    kind, field = ("RobertaModel", "last_hidden_state") if bare else ("RobertaForMaskedLM", "logits")
    check_encoder(lambda: getattr(transformers, kind)(config), lambda out: getattr(out, field))


def test_roberta_counts_positions_behind_padding():
    config = transformers.RobertaConfig(**BERT, type_vocab_size=1, pad_token_id=1)
    ids = IDS.clone()
    ids[0, :3], ids[1, 8:] = 1, 1
    check_parity(
        transformers.RobertaForMaskedLM(config),
        {"input_ids": ids, "attention_mask": (ids != 1).long()},
        lambda out: out.logits,
        our_kwargs={"input_ids": ids},
        visible=ids != 1,
    )


@pytest.mark.parametrize("part", ["QuestionEncoder", "ContextEncoder", "Reader"])
def test_dpr(part):
    config = transformers.DPRConfig(**BERT)
    if part == "Reader":
        pick, ours = (
            lambda out: torch.cat([out.start_logits, out.end_logits, out.relevance_logits[:, None]], dim=1),
            lambda out: torch.cat([out[0][0], out[0][1], out[0][2][:, None]], dim=1),
        )
    else:
        pick, ours = lambda out: out.pooler_output, None
    check_encoder(lambda: getattr(transformers, f"DPR{part}")(config), pick, ours)


def test_gptneo():
    config = transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=24, num_layers=3, num_heads=4, max_position_embeddings=32, window_size=4,
        attention_types=[[["global", "local"], 1], [["local"], 1]], attn_implementation="eager", bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    check_decoder(lambda: transformers.GPTNeoForCausalLM(config))


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("form", ["relu", "gated-gelu"])
def test_t5(form, is_scaled):
    config = transformers.T5Config(
        vocab_size=61, d_model=24, d_kv=5, d_ff=30, num_layers=2, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=8, feed_forward_proj=form, tie_word_embeddings=is_scaled,
        attn_implementation="eager", decoder_start_token_id=0,
    )  # fmt: skip

    def build():
        model = transformers.T5ForConditionalGeneration(config)
        if not is_scaled:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    decoder_ids = IDS[:, :7].contiguous()
    theirs = {"input_ids": IDS, "decoder_input_ids": decoder_ids}
    ours = {"enc_input_ids": IDS, "dec_input_ids": decoder_ids}
    second = lambda out: out[1]  # noqa: E731
    check_parity(build(), theirs, lambda out: out.logits, our_kwargs=ours, our_pick=second)
    for side in ("right", "left"):
        padding = padded(side)[0]
        check_parity(
            build(),
            {**theirs, "attention_mask": padding},
            lambda out: out.logits,
            our_kwargs={**ours, "enc_attention_mask": padding},
            our_pick=second,
            bf16_atol=None,
        )


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 1, "head_dim": 12}])
def test_glm4(options):
    config = transformers.GlmConfig(
        **(DECODER | {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0} | options)
    )
    check_parity(transformers.GlmForCausalLM(config), {"input_ids": IDS}, lambda out: out.logits)


def _names_on_disk(parameters, inner_size):
    """Part the experts that transformers 5 holds fused in memory, as it does when it saves."""
    found = {}
    for name, tensor in parameters.items():
        place = name.partition(".mlp.")[0] + ".block_sparse_moe"
        if name.endswith("mlp.gate.weight"):
            found[f"{place}.gate.weight"] = tensor
        elif name.endswith("gate_up_proj"):
            for e, expert in enumerate(tensor):
                found[f"{place}.experts.{e}.w1.weight"], found[f"{place}.experts.{e}.w3.weight"] = expert.split(
                    inner_size
                )
        elif name.endswith("down_proj"):
            found |= {f"{place}.experts.{e}.w2.weight": expert for e, expert in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "sliding_window": 4, "num_key_value_heads": 1}])
def test_mixtral_through_its_folder(tmp_path, options):
    sizes = DECODER | {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2} | options
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    randomise(theirs, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoModel.from_pretrained(tmp_path / "theirs")
    expected, got = theirs(input_ids=IDS).logits, ours(IDS)[0]
    check_outputs(theirs, ours, expected, got)
    expected.square().mean().backward()
    got.square().mean().backward()
    record = ours.config.extra[RECORD]
    is_tied = bool(sizes.get("tie_word_embeddings"))
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    plan = plan_export(MixtralModel.key_maps[0], mine, ours.config, layout=record.get("layout"), is_tied=is_tied)
    back = dict(plan.write(mine, "gradients"))
    grads = _names_on_disk({name: p.grad for name, p in theirs.named_parameters()}, sizes["intermediate_size"])
    assert back.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(back[name], gradient, atol=1e-4, rtol=1e-3)
    save_huggingface(ours, tmp_path / "back")
    written, read = (load_file(tmp_path / folder / "model.safetensors") for folder in ("back", "theirs"))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in read.items())
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


BORN_HERE = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gptneo": ("GPTNeoForCausalLM", {"has_qkv_bias": False}),
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "dpr-question": ("DPRQuestionEncoder", {}),
    "dpr-context": ("DPRContextEncoder", {"hidden_act": "gelu"}),
    "dpr-reader": ("DPRReader", {}),
    "chatglm4": ("GlmForCausalLM", {"rotary_interleaved": True}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-old": ("LlamaForCausalLM", {}),
    "llama3": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "t5": ("T5ForConditionalGeneration", {}),
    "t5-gated": ("T5ForConditionalGeneration", {}),
}
FIRST = {"dpr-question": "pooler_output", "dpr-context": "pooler_output", "dpr-reader": "start_logits"}


@pytest.mark.parametrize("name", BORN_HERE)
def test_what_was_made_here_is_what_hugging_face_reads(name, tmp_path):
    architecture, changes = BORN_HERE[name]
    family = FAMILIES[name]
    ours = family.build(**changes).eval()
    model_type = {"mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}.get(name)
    save_huggingface(ours, tmp_path / "model", model_type=model_type)
    theirs, report = getattr(transformers, architecture).from_pretrained(
        tmp_path / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    kw = {"input_ids": IDS} if name == "dpr-reader" else family.inputs(0)  # their reader takes no token types
    theirs_kw = {
        {"enc_input_ids": "input_ids", "dec_input_ids": "decoder_input_ids"}.get(k, k): v for k, v in kw.items()
    }
    with torch.no_grad():
        expected = getattr(theirs.eval()(**theirs_kw), FIRST.get(name, "logits"))
        returned = ours(**kw)
    got = returned[0][0] if name == "dpr-reader" else returned[1 if "t5" in name else 0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    model_class = type(ours) if name.startswith("dpr") else AutoModel
    again = model_class.from_pretrained(tmp_path / "model")(**kw)
    back = again[0][0] if name == "dpr-reader" else again[1 if "t5" in name else 0]
    torch.testing.assert_close(back, got, atol=1e-6, rtol=1e-6)


REFUSED = [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
    ("llama", {"attention_bias": True}, "attention_bias=True, supported is False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', supported is 'silu'"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
        "layer_types",
    ),
]


@pytest.mark.parametrize(("model_type", "values", "message"), REFUSED)
def test_options_that_would_change_the_numbers_are_refused(model_type, values, message):
    key_map = next(key_map for key_map in LLaMAModel.key_maps if key_map.model_type == model_type)
    with pytest.raises(ConfigError, match=message):
        key_map.config_from_hf(DECODER | {"model_type": model_type} | values)


def test_a_file_that_cannot_say_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="A 'llama' file cannot say has_qk_norm=True"):
        save_huggingface(FAMILIES["qwen3"].build(), tmp_path / "model", model_type="llama")
    with pytest.raises(ConfigError, match="A 't5' file has a decoder of the encoder's sizes; here {'dec_hidden_size'"):
        save_huggingface(FAMILIES["t5"].build(dec_hidden_size=32), tmp_path / "model")
    with pytest.warns(UserWarning, match="Hugging Face has one epsilon for all norms"):
        save_huggingface(FAMILIES["bert"].build(layernorm_epsilon=1e-3), tmp_path / "model")
