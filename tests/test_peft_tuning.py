"""Prefix and prompt tuning equal PEFT's on the models of Hugging Face: outputs and gradients."""

import copy

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

from sat_lightning.mixins import PrefixTuningMixin, PromptTuningMixin
from tests.hf_parity import randomise, to_ours
from tests.test_huggingface_text import BERT, DECODER, IDS
from tests.test_peft import T5, TINY

N = 3
MODELS = {
    "gpt2": ("CAUSAL_LM", lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, eos_token_id=0))),
    "llama": (
        "CAUSAL_LM",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**(DECODER | {"num_key_value_heads": 2}))),
    ),
    "bert": ("FEATURE_EXTRACTION", lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT))),
    "t5": ("SEQ_2_SEQ_LM", lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))),
}


def make_pair(family, method, **options):
    """Return theirs with random weights and a prompt of ones, and our base."""
    torch.manual_seed(0)
    task_type, build = MODELS[family]
    theirs = build().eval()
    randomise(theirs)
    config_class = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
    config = config_class(task_type=task_type, num_virtual_tokens=N, **options)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return adapted, to_ours(theirs)[0]


def ragged(ids):
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return mask


@pytest.mark.parametrize("projection_size", [None, 7])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_tuning_equals_peft(family, projection_size):
    options = {} if projection_size is None else {"prefix_projection": True, "encoder_hidden_size": projection_size}
    theirs, ours = make_pair(family, "prefix", **options)
    config = ours.config
    # Their words have the positions after the prefix, whose keys have none.
    ours.add_mixin("prefix", PrefixTuningMixin(config, N, projection_size=projection_size, first_position=N))
    prefix = ours.get_mixin("prefix")
    sizes = (config.num_layers, 2, config.num_key_value_heads, config.head_size)
    encoder = theirs.prompt_encoder["default"]

    def by_layer(x):
        """Their last axis holds layers, keys and values, heads: `[.., layers * 2 * k * d]` to a tensor a layer."""
        return [layer.unflatten(-1, sizes[1:]) for layer in x.unflatten(-1, (sizes[0], -1)).unbind(-2)]

    with torch.no_grad():
        if projection_size is None:
            for mine, his in zip(prefix.prefix, by_layer(encoder.embedding.weight), strict=True):
                mine.copy_(his.permute(1, 2, 0, 3))
        else:
            own = prefix.projection
            own.embedding.weight.copy_(encoder.embedding.weight)
            own.dense.load_state_dict(encoder.transform[0].state_dict())
            for mine, weight, bias in zip(
                own.out, encoder.transform[2].weight.unflatten(0, (sizes[0], -1)),
                encoder.transform[2].bias.unflatten(0, (sizes[0], -1)), strict=True,
            ):  # fmt: skip
                mine.weight.copy_(weight)
                mine.bias.copy_(bias)
    expected, got = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, ours(IDS)[0]
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    got.square().mean().backward()
    if projection_size is None:
        for mine, his in zip(prefix.prefix, by_layer(encoder.embedding.weight.grad), strict=True):
            assert_close(mine.grad, his.permute(1, 2, 0, 3), atol=1e-5, rtol=1e-4)
    else:
        assert_close(prefix.projection.embedding.weight.grad, encoder.embedding.weight.grad, atol=1e-5, rtol=1e-4)
        grads = torch.cat([layer.weight.grad for layer in prefix.projection.out])
        assert_close(grads, encoder.transform[2].weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_prompt_tuning_equals_peft(family):
    theirs, ours = make_pair(family, "prompt", **({"num_transformer_submodules": 1} if family == "t5" else {}))
    part = ours.encoder if family == "t5" else ours
    part.add_mixin("prompt", PromptTuningMixin(part.config, N, keeps_prompt=family == "t5"))
    mine, his = part.get_mixin("prompt").prompt, theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        mine.copy_(his)
        if family == "bert":  # their words of the prompt are of type 0 too
            mine.add_(ours.get_mixin("bert-type").type_embeddings.weight[0])
    mask = ragged(IDS) if family != "gpt2" else torch.ones_like(IDS)
    if family == "t5":
        words = IDS[:, :4]
        expected = theirs(input_ids=IDS, attention_mask=mask, decoder_input_ids=words).logits
        got = ours(IDS, words, enc_attention_mask=mask)[1]
    else:
        expected = theirs(input_ids=IDS, attention_mask=mask).logits[:, N:]
        seen = mask[:, None, None, :].bool()
        if family != "bert":
            seen = seen & torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
        got = ours(IDS, attention_mask=seen)[0]
        expected, got = expected[mask.bool()], got[mask.bool()]
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    got.square().mean().backward()
    assert_close(mine.grad, his.grad, atol=1e-5, rtol=1e-4)
