"""Prompt tuning: what a prompt does to positions, masks and heads, and how it goes on as a prefix."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.errors import ConfigError, HookError, InputError
from sat_lightning.mixins import CachedAutoregressiveMixin, PastKeyValuesMixin, PromptTuningMixin
from tests.families import FAMILIES, ids

N = 3


def with_prompt(family, prompt_len=N, **options):
    model = FAMILIES[family].build()
    mixin = PromptTuningMixin(model.config, prompt_len, **options)
    model.add_mixin("prompt", mixin)
    with torch.no_grad():
        mixin.prompt.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


def with_words(model, count=N):
    """The same as words: a model whose first words are the prompt, to be given in front of every sequence."""
    with torch.no_grad():
        prompt = model.get_mixin("prompt").prompt.clone()
        model.get_mixin("prompt").disable()
        if "bert-type" in model.mixins:  # which a prompt does not have
            prompt -= model.get_mixin("bert-type").type_embeddings.weight[0]
        model.transformer.word_embeddings.weight[:count] = prompt
    return model


def in_front(input_ids, count=N):
    return torch.cat([torch.arange(count).expand(len(input_ids), -1), input_ids], dim=1)


def padding(is_left):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    return mask if is_left else mask.flip(1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-old", "mistral", "bert", "gptneo", "qwen3", "mixtral"])
def test_it_is_words_in_front_that_are_cut_off(family):
    model, input_ids = with_prompt(family), ids()
    with torch.no_grad():
        got = model(input_ids)[0]
        assert got.shape[1] == 9
        expected = with_words(model)(in_front(input_ids))[0][:, N:]
    got, expected = (logits[..., N:] for logits in (got, expected))  # a head may be tied to the changed words
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.parametrize(("family", "is_causal"), [("gpt2", True), ("llama", True), ("bert", False)])
def test_masks_make_room(family, is_causal, is_left):
    model, input_ids, keep = with_prompt(family), ids(), padding(is_left)
    long = torch.cat([torch.ones(2, N, dtype=torch.bool), keep], dim=1)
    causal = [torch.ones(n, n, dtype=torch.bool).tril() if is_causal else True for n in (9, 9 + N)]
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(input_ids, positions, keep[:, None, None] & causal[0])[0]
        moved = torch.cat([torch.arange(N).expand(2, -1), positions + N], dim=1)
        expected = with_words(model)(in_front(input_ids), moved, long[:, None, None] & causal[1])[0][:, N:]
    assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_other_tensors_of_pairs_make_room():
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=60, max_sequence_length=24, is_decoder=True
    )
    torch.manual_seed(0)
    model = BaseModel(config).eval()
    model.add_mixin("prompt", PromptTuningMixin(config, N))
    weights, cross = torch.randn(1, 1, 9, 9), torch.ones(2, 1, 9, 5)
    cross[0, ..., 3:] = 0
    encoder_outputs = torch.randn(2, 5, 32)
    with torch.no_grad():
        crossed = model(ids(), attention_mask=-1, cross_attention_mask=cross, encoder_outputs=encoder_outputs)[0]
        weighed = model(ids(), log_attention_weights=weights)[0]
        twin, long = with_words(model), in_front(ids())
        one_row = cross[:, :, :1]
        expected = twin(long, attention_mask=-1, cross_attention_mask=one_row, encoder_outputs=encoder_outputs)[0]
        assert_close(crossed[..., N:], expected[:, N:, N:], atol=1e-5, rtol=1e-5)
        expected = twin(long, log_attention_weights=torch.nn.functional.pad(weights, (N, 0, N, 0)))[0]
        assert_close(weighed[..., N:], expected[:, N:, N:], atol=1e-5, rtol=1e-5)


def test_heads_and_losses_see_the_words_alone():
    model, input_ids = with_prompt("gpt2"), ids()
    targets = torch.randint(0, 60, (2, 9))
    loss = model(input_ids, target_ids=targets)[0]
    assert_close(loss, torch.nn.functional.cross_entropy(model(input_ids)[0].flatten(0, 1), targets.flatten()))
    image = with_prompt("vit")
    assert FAMILIES["vit"].run(image).shape == (2, 5)
    before = FAMILIES["vit"].run(FAMILIES["vit"].build().eval())
    assert not torch.allclose(FAMILIES["vit"].run(image), before)


class BlindMixin(BaseMixin):
    """Hides the prompt from all."""

    @non_conflict
    def attention_fn(self, query, key, value, *args, old_impl, **kw):
        return old_impl(query, key[:, :, N:], value[:, :, N:], *args, **kw)


@pytest.mark.parametrize("family", ["vit", "yolos", "yolos-mid", "eva2"])
def test_patches_stay_in_their_places_behind_a_prompt(family):
    """Tables that are added and angles by row and column: whoever does not see the prompt finds the image as it was."""
    expected = FAMILIES[family].run(FAMILIES[family].build().eval())
    model = with_prompt(family)
    assert not torch.allclose(FAMILIES[family].run(model), expected)
    model.add_mixin("blind", BlindMixin())
    assert_close(FAMILIES[family].run(model), expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_may_hand_its_prompt_to_the_decoder():
    family = FAMILIES["t5"]
    model = family.build().eval()
    model.add_mixin("encoder.prompt", PromptTuningMixin(model.encoder.config, N, keeps_prompt=True))
    given = family.inputs(0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        outputs, logits, *_ = model(**given, enc_attention_mask=mask)
        assert outputs.shape[1] == 9 + N
        with_words(model.encoder)
        given["enc_input_ids"] = in_front(given["enc_input_ids"])
        long = model(**given, enc_attention_mask=torch.cat([torch.ones(2, N, dtype=torch.long), mask], 1))
    assert_close(logits[..., N:], long[1][..., N:], atol=1e-5, rtol=1e-5)
    assert_close(outputs, long[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "llama-old"])
def test_folded_it_is_a_prefix_and_writes_with_a_cache(family):
    from sat_lightning.generation import generate

    model, input_ids = with_prompt(family), ids()
    with torch.no_grad():
        expected = model(input_ids)[0]
        sequence = input_ids[:, :4]
        for _ in range(5):
            sequence = torch.cat([sequence, model(sequence)[0][:, -1:].argmax(-1)], dim=1)
    if family == "mistral":
        with pytest.raises(HookError, match="window"):
            model.get_mixin("prompt").folded(model)
        return
    prefix = model.get_mixin("prompt").folded(model)
    assert list(model.mixins)[-1] == "prompt"
    model.del_mixin("prompt")
    model.add_mixin("prompt", prefix)
    with torch.no_grad():
        assert_close(model(input_ids)[0], expected, atol=1e-5, rtol=1e-5)
    written = generate(model, input_ids[:, :4].tolist(), max_new_tokens=5)
    assert [result.tokens for result in written] == sequence[:, 4:].tolist()


def test_memories_are_refused_with_the_cure():
    model = with_prompt("gpt2")
    model.add_mixin("cache", CachedAutoregressiveMixin())
    mems = torch.zeros(2, 2, 3, 64)
    with pytest.raises(InputError, match=r"mems holds earlier tokens.*folded\(model\)"):
        model(ids(), mems=mems)
    model.del_mixin("cache")
    model.add_mixin("cache", PastKeyValuesMixin())
    with pytest.raises(InputError, match="past_key_values holds earlier tokens"):
        model(ids(), past_key_values=[(torch.zeros(2, 4, 1, 8),) * 2] * 2)


def test_what_cannot_be_says_why():
    model = with_prompt("gpt2", prompt_len=20)
    with pytest.raises(InputError, match=r"20 tokens of a prompt and 9 of the sequence are 29, max_sequence_length"):
        model(ids())
    with pytest.raises(HookError, match="BertModel is not causal: its prompt reads the words"):
        bert = with_prompt("bert")
        bert.get_mixin("prompt").folded(bert)
    with pytest.raises(HookError, match="has no scale"):
        model.get_mixin("prompt").scale = 0.5
    prompt = model.get_mixin("prompt")
    with pytest.raises(HookError, match="there is no such prompt. Enable this one in the model it belongs to"):
        prompt.folded(FAMILIES["gpt2"].build())
    model.add_mixin("second", PromptTuningMixin(model.config, 2))
    with pytest.raises(HookError, match="there is another prompt too, so that it stands elsewhere"):
        prompt.folded(model)
    model.get_mixin("second").disable()
    assert prompt.folded(model).prefix_len == 20
    prompt.disable()
    with pytest.raises(HookError, match="In this model there is no such prompt"):
        prompt.folded(model)
    with pytest.raises(ConfigError, match="prompt_len is 0"):
        PromptTuningMixin(model.config, 0)
    with pytest.raises(InputError, match=r"position_ids has shape \[2, 2, 9\], and cannot be moved along"):
        FAMILIES["glm-blank"].run(with_prompt("glm-blank"))


def test_it_starts_as_words_if_told_which():
    model = FAMILIES["gpt2"].build()
    model.add_mixin("prompt", PromptTuningMixin(model.config, 5, init_token_ids=[7, 9]), reinit=True)
    table = model.transformer.word_embeddings.weight
    assert torch.equal(model.get_mixin("prompt").prompt, table[[7, 9, 7, 9, 7]])


def test_two_prompts_stand_one_before_the_other():
    model = with_prompt("gpt2")
    model.add_mixin("second", PromptTuningMixin(model.config, 2))
    with torch.no_grad():
        got = model(ids())[0]
        both = torch.cat([model.get_mixin("second").prompt, model.get_mixin("prompt").prompt])
        for name in ("prompt", "second"):
            model.del_mixin(name)
        model.transformer.word_embeddings.weight[:5] = both
        assert_close(got, model(in_front(ids(), 5))[0][:, 5:], atol=1e-5, rtol=1e-5)
