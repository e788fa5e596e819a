"""Files of PEFT's prefix tuning, prompt tuning and P-tuning, in and out, with equal logits on Hugging Face's models."""

import copy
import json
from functools import partial

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sat_lightning.checkpoint import load_peft, save_peft
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins import PrefixTuningMixin, PromptTuningMixin
from tests.families import FAMILIES
from tests.hf_parity import randomise, to_ours
from tests.test_huggingface_text import BERT, DECODER, IDS
from tests.test_peft import T5, TINY

N = 3
CAUSAL, ENCODER, BOTH = "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"
LLAMA = DECODER | {"num_key_value_heads": 2}
NEO = {
    "vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32,
    "attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# PEFT takes heads to be as wide as the hidden size says.
MODELS = {
    "gpt2": (CAUSAL, lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, eos_token_id=0))),
    "gptneo": (CAUSAL, lambda: transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**NEO))),
    "llama": (CAUSAL, lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))),
    "bert": (ENCODER, lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT))),
    "t5": (BOTH, lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**(T5 | {"d_kv": 6})))),
}  # fmt: skip
METHODS = {
    "prefix": peft.PrefixTuningConfig,
    "prefix-mlp": partial(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=7),
    "prompt": peft.PromptTuningConfig,
    "p-tuning": partial(peft.PromptEncoderConfig, encoder_hidden_size=7),
}
WITH_WINDOWS = ("gptneo",)


def make_pair(family, method):
    """Return theirs, the same with a prompt of random weights, and ours."""
    torch.manual_seed(0)
    task, build = MODELS[family]
    theirs = build().eval()
    randomise(theirs)
    num_layers = T5["num_decoder_layers"] if family == "t5" else None
    config = METHODS[method](task_type=task, num_virtual_tokens=N, num_layers=num_layers)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return theirs, adapted, to_ours(theirs)[0]


def padding():
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    return mask


def answer(model, family):
    """Return the logits of what no padding hides."""
    mask, is_theirs = padding(), not hasattr(model, "get_mixin")
    if family == "t5":
        if is_theirs:
            return model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :7]).logits
        return model(IDS, IDS[:, :7], enc_attention_mask=mask)[1]
    if is_theirs:
        return model(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1] :][mask.bool()]
    seen = mask[:, None, None, :].bool()
    if family != "bert":
        seen = seen & torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    return model(IDS, attention_mask=seen)[0][mask.bool()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_equals_peft_in_and_out(family, method, tmp_path):
    theirs, adapted, ours = make_pair(family, method)
    adapted.save_pretrained(tmp_path / "theirs")
    names = set(ours.state_dict())
    if method.startswith("prefix") and family in WITH_WINDOWS:
        with pytest.raises(CheckpointError, match="a LocalAttentionMixin, hides what is far .* Use prompt tuning"):
            load_peft(ours, tmp_path / "theirs")
        assert set(ours.state_dict()) == names
        return
    base, expected = answer(theirs, family), answer(adapted, family)
    added = load_peft(ours, tmp_path / "theirs", "tuned")
    part = "decoder" if method.startswith("prefix") else "encoder"
    assert added == ([f"{part}.tuned"] if family == "t5" else ["tuned"])
    assert_close(answer(ours, family), expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    save_peft(ours, tmp_path / "back", "tuned", base="somewhere")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "back").eval()
    assert_close(answer(again, family), expected, atol=1e-5, rtol=1e-5)
    assert again.peft_config["default"].base_model_name_or_path == "somewhere"
    twin = to_ours(theirs)[0]
    load_peft(twin, tmp_path / "back")
    assert_close(answer(twin, family), expected, atol=1e-5, rtol=1e-5)


def test_a_reparametrised_prefix_of_ours_is_written_folded(tmp_path):
    theirs, _, ours = make_pair("llama", "prefix")
    ours.add_mixin("mine", PrefixTuningMixin(ours.config, 4, projection_size=6, first_position=4))
    save_peft(ours, tmp_path, "mine")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path).eval()
    assert_close(answer(again, "llama"), answer(ours, "llama"), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_added(tmp_path):
    _, adapted, ours = make_pair("gpt2", "prefix")
    adapted.save_pretrained(tmp_path)
    names = set(ours.state_dict())
    file, tensors = tmp_path / "adapter_model.safetensors", load_file(tmp_path / "adapter_model.safetensors")

    def refuses(message, model=ours):
        with pytest.raises(CheckpointError, match=message):
            load_peft(model, tmp_path)
        assert set(ours.state_dict()) == names

    save_file({"prompt_embeddings": tensors["prompt_embeddings"][:, :-1].contiguous()}, file)
    refuses(r"'prompt_embeddings' is \[3, 95\], for this model it must be \[3, 96\]")
    save_file(tensors | {"base_model.classifier.weight": torch.zeros(2)}, file)
    refuses("it holds base_model.classifier.weight, prompt_embeddings, where a prompt is 'prompt_embeddings' and noth")
    save_file(tensors, file)
    refuses("PEFT puts no prompt before the words of a ViTModel", FAMILIES["vit"].build())
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "CPT"}))
    refuses("peft_type is 'CPT', readable are LORA .*, IA3, PREFIX_TUNING, PROMPT_TUNING, P_TUNING")


def test_what_peft_cannot_hold_is_refused(tmp_path):
    _, _, ours = make_pair("gpt2", "prefix")
    ours.add_mixin("first", PrefixTuningMixin(ours.config, 2))
    with pytest.raises(CheckpointError, match=r"first_position is 0, and .* Train with first_position=2"):
        save_peft(ours, tmp_path, "first")
    ours.add_mixin("second", PrefixTuningMixin(ours.config, 2, first_position=2))
    ours.get_mixin("second").scale = 0.5
    with pytest.raises(CheckpointError, match=r"scale is 0\.5, and a prefix of PEFT's has none"):
        save_peft(ours, tmp_path, "second")
    t5 = make_pair("t5", "prompt")[2]
    t5.encoder.add_mixin("prompt", PromptTuningMixin(t5.encoder.config, 2))
    with pytest.raises(CheckpointError, match=r"Train with keeps_prompt=True"):
        save_peft(t5, tmp_path, "prompt")
    t5.decoder.add_mixin("prompt", PromptTuningMixin(t5.decoder.config, 2))
    with pytest.raises(CheckpointError, match=r"encoder has one, decoder has one; PEFT has one, in the encoder"):
        save_peft(t5, tmp_path, "prompt")
    t5.encoder.add_mixin("prefix", PrefixTuningMixin(t5.encoder.config, 2, first_position=2))
    with pytest.raises(CheckpointError, match=r"encoder has one; PEFT has one, in the decoder"):
        save_peft(t5, tmp_path, "prefix")
    assert not list(tmp_path.iterdir())
