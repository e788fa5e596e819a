"""Parity with PEFT on the models of Hugging Face, and its files in and out."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sat_lightning.checkpoint import load_peft, save_peft
from sat_lightning.checkpoint.peft_layout import read_modules
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin
from sat_lightning.model import BaseModel
from tests.families import FAMILIES
from tests.hf_parity import randomise, to_ours
from tests.test_huggingface_text import BERT, DECODER, IDS

TINY = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0}
T5 = {
    "vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 30, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "attn_implementation": "eager", "decoder_start_token_id": 0,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu"}
#: Family -> builder of theirs, targets of LoRA, of IA3 and the latter's feedforward.
MODELS = {
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, eos_token_id=0)),
        (["c_attn", "c_proj", "c_fc"], ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**(DECODER | {"num_key_value_heads": 2}))),
        (["q_proj", "v_proj", "o_proj", "up_proj", "gate_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        (["query", "value", "intermediate.dense"], ["key", "value", "output.dense"], ["output.dense"]),
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        (["q", "v", "wo", "wi"], ["k", "v", "wo"], ["wo"]),
    ),
    "t5-gated": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **GATED)),
        (["k", "o", "wi_1"], ["k", "v", "wo"], ["wo"]),
    ),
}
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"0": 2}, "alpha_pattern": {"1": 7}},
    "ia3": None,
    "table": {},
}
TABLES = {"gpt2": "wte", "llama": "embed_tokens", "bert": "word_embeddings"}
SHARED = ("t5", "t5-gated")  # one table for both stacks


def make_pair(family, method):
    """Return their model, the same with a PEFT adapter of random weights, and ours."""
    torch.manual_seed(0)
    build, (target, ia3_target, feedforward) = MODELS[family]
    theirs = build().eval()
    randomise(theirs)
    options = METHODS[method]
    if options is None:
        config = peft.IA3Config(target_modules=ia3_target, feedforward_modules=feedforward)
    else:
        patterns = {k: {target[int(i)]: n for i, n in v.items()} for k, v in options.items() if k.endswith("pattern")}
        target = target + [TABLES.get(family)] * (method == "table")
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=target, **(options | patterns))
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs, adapted, to_ours(theirs)[0]


def answer(model, family):
    is_theirs = not hasattr(model, "get_mixin")
    if family.startswith("t5"):
        names = ("input_ids", "decoder_input_ids") if is_theirs else ("enc_input_ids", "dec_input_ids")
        output = model(**dict(zip(names, (IDS, IDS[:, :7]), strict=True)))
        return output.logits if is_theirs else output[1]
    output = model(input_ids=IDS)
    return output.logits if is_theirs else output[0]


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_equals_peft_in_and_out(family, method, tmp_path):
    if method == "table" and family in SHARED:
        return  # refused: see below
    theirs, adapted, ours = make_pair(family, method)
    base, expected = answer(theirs, family), answer(adapted, family)
    adapted.save_pretrained(tmp_path / "theirs")
    names = load_peft(ours, tmp_path / "theirs", "tuned")
    assert names == (["encoder.tuned", "decoder.tuned"] if family in SHARED else ["tuned"])
    assert_close(answer(ours, family), expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    check_gradients(family, adapted, ours, names, tmp_path)
    save_peft(ours, tmp_path / "back", "tuned", base="somewhere")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "back").eval()
    assert_close(answer(again, family), expected, atol=1e-5, rtol=1e-5)
    if method != "table":
        [ours.get_mixin(name).merge() for name in names]
        assert_close(answer(ours, family), answer(adapted.merge_and_unload(), family), atol=1e-5, rtol=1e-5)


def check_gradients(family, adapted, ours, names, folder):
    """Compare by files: the gradients are written as if they were what was learnt."""
    torch.manual_seed(1)
    direction = torch.randn_like(answer(adapted, family))
    (answer(adapted, family) * direction).sum().backward()
    (answer(ours, family) * direction).sum().backward()
    wanted, twin = copy.deepcopy(adapted), copy.deepcopy(ours)
    with torch.no_grad():
        for model, source in ((wanted, adapted), (twin, ours)):
            for parameter, other in zip(model.parameters(), source.parameters(), strict=True):
                parameter.copy_(torch.zeros_like(parameter) if other.grad is None else other.grad)
    wanted.save_pretrained(folder / "wanted")
    for name in names:  # a gradient of B is not multiplied by what B is multiplied by
        twin.get_mixin(name).scale = 1.0
    save_peft(twin, folder / "found", "tuned")
    wanted, found = (load_file(folder / name / "adapter_model.safetensors") for name in ("wanted", "found"))
    assert {name for name in wanted if "base_layer" not in name} == found.keys()
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], atol=1e-5 * max(1.0, float(wanted[name].abs().max())), rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["parts", "two parts", "one rslora", "pissa", "dora", "ia3"])
def test_what_only_we_can_train_is_written_as_peft_reads_it(family, method, tmp_path):
    theirs, _, ours = make_pair(family, "lora")
    attention = r"\.attention\.query_key_value"
    for part in getattr(ours, "parts", {"": ours}).values():
        make = {
            "parts": lambda c: LoraMixin(c, alpha_pattern={"value": 3}),
            "two parts": lambda c: LoraMixin(c, rank=2, target=rf"{attention}\.[qv]", rank_pattern={"value": 3}),
            "one rslora": lambda c: LoraMixin(c, target=rf"{attention}$", use_rslora=True, alpha=3),
            "pissa": lambda c: LoraMixin(c, rank=2, init="pissa"),
            "dora": lambda c: DoraMixin(c, rank=2, target=rf"{attention}\.(query|value)"),
            "ia3": lambda c: IA3Mixin(c, target=rf"{attention}\.value"),
        }[method]
        part.add_mixin("mine", make(part.config), reinit=True)
        torch.manual_seed(2)
        with torch.no_grad():
            [parameter.add_(torch.randn_like(parameter) * 0.2) for parameter in part.get_mixin("mine").parameters()]
        part.get_mixin("mine").scale = 0.75 if method != "dora" else 1.0
    save_peft(ours, tmp_path, "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
    assert_close(answer(again, family), answer(ours, family), atol=1e-5, rtol=1e-5)
    back = to_ours(theirs)[0]
    load_peft(back, tmp_path, "mine")
    assert_close(answer(back, family), answer(ours, family), atol=1e-5, rtol=1e-5)


def test_every_linear_of_their_models_is_known():
    for family, (build, _) in MODELS.items():
        theirs = build()
        linears = {
            name for name, module in theirs.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and "head" not in name and "cls" not in name
        }  # fmt: skip
        known = read_modules(to_ours(theirs)[0])
        assert linears <= known.keys(), (family, linears - known.keys())


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_read_is_refused_and_nothing_is_added(tmp_path):
    _, adapted, ours = make_pair("gpt2", "lora")
    names = set(ours.state_dict())

    def refuses(message, name="x"):
        with pytest.raises(CheckpointError, match=message):
            load_peft(ours, tmp_path / name)
        assert set(ours.state_dict()) == names

    refuses("is no PEFT adapter: it has no adapter_config.json")
    for option, value in {"bias": "all", "modules_to_save": ["score"], "peft_type": "LOHA"}.items():
        adapted.save_pretrained(tmp_path / option)
        edited(tmp_path / option, **{option: value})
        refuses(option, option)
    adapted.save_pretrained(tmp_path / "weights")
    file = tmp_path / "weights" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.score.weight": torch.zeros(2)}, file)
    refuses("'base_model.model.score.weight' is no weight of LoRA, DoRA or IA3", "weights")
    odd = {name.replace("c_attn", "c_attention"): tensor for name, tensor in tensors.items()}
    save_file(odd, file)
    refuses("about 'transformer.h.0.attn.c_attention', and a GPT2Model has no such linear", "weights")
    other = FAMILIES["gpt2"].build(num_layers=1, hidden_size=24, num_attention_heads=4)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.attn"):
        load_peft(other, tmp_path / "weights")
    assert isinstance(other, BaseModel) and not [name for name in other.mixins if name == "peft"]


def test_what_peft_cannot_hold_is_refused(tmp_path):
    _, _, ours = make_pair("gpt2", "lora")
    with pytest.raises(CheckpointError, match="save_peft: 'lora' is nothing here"):
        save_peft(ours, tmp_path, "lora")
    plain = FAMILIES["t5"].build()
    plain.decoder.add_mixin("lora", LoraMixin(plain.decoder.config, target="attention"))
    plain.decoder.add_mixin("table", LoraMixin(plain.decoder.config, target="word_embeddings"))
    with pytest.raises(CheckpointError, match=r"decoder\.word_embeddings is no linear of the Hugging Face model"):
        save_peft(plain, tmp_path, "table")
    save_peft(plain, tmp_path, "lora")
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names and all(name.startswith("decoder.") for name in names)


def test_pissa_of_peft_is_read_as_peft_reads_it(tmp_path):
    """Its file holds what was learnt beside a base without its main singular vectors."""
    theirs, _, ours = make_pair("gpt2", "lora")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
    expected = answer(adapted, "gpt2")
    assert_close(answer(again, "gpt2"), expected, atol=1e-4, rtol=1e-4)
    load_peft(ours, tmp_path)
    assert_close(answer(ours, "gpt2"), expected, atol=1e-5, rtol=1e-5)
    edited(tmp_path, init_lora_weights="olora")
    with pytest.raises(CheckpointError, match=r"init_lora_weights='olora' is not supported.*merge_and_unload"):
        load_peft(ours, tmp_path, "second")


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "table"])
def test_an_adapter_of_another_size_is_refused(method, tmp_path):
    _, adapted, _ = make_pair("gpt2", method)
    adapted.save_pretrained(tmp_path)
    other = FAMILIES["gpt2"].build(num_layers=2, hidden_size=28, num_attention_heads=4)
    names = set(other.state_dict())
    with pytest.raises(
        CheckpointError, match=r"' is \[.*\], and the model's own is a matrix \[\d+, \d+\]\. Load the b"
    ):
        load_peft(other, tmp_path)
    assert set(other.state_dict()) == names
