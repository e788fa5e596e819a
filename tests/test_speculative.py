"""Speculative decoding: the texts of the model alone, whatever the draft, and their distribution."""

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import (
    AllowedTokens,
    BaseStrategy,
    BeamSearchStrategy,
    SpeculationCounts,
    generate,
    generate_speculatively,
    greedy,
)
from sat_lightning.generation.speculative import accept, rest_after
from tests.families import FAMILIES
from tests.test_generate import prompts_of

#: Learned, rotary and two-dimensional positions, relative biases, windows, grouped queries, full prompts, an encoder.
NAMES = ["gpt2", "gptneo", "llama3", "mistral", "chatglm2", "glm-blank", "chatglm", "t5"]


def build(name, std=0.3, seed=0, **changes):
    model = FAMILIES[name].build(**changes).eval()
    return near(model, std, seed)


def near(model, noise, seed=1):
    """A draft that agrees the more often, the smaller the noise."""
    generator = torch.Generator().manual_seed(seed)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return draft


def texts(results):
    return [(result.tokens, result.finish) for result in results]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_the_model_alone_token_for_token(name):
    model, rows = build(name, max_sequence_length=32), prompts_of(name)
    free = generate(model, rows, max_new_tokens=14)
    ends = sorted({free[0].tokens[5], free[2].tokens[9]})  # rows end at places of their own
    for noise, num_drafts in ((0.0, 3), (0.02, 1), (0.02, 4), (2.0, 2)):
        draft, counts = near(model, noise), SpeculationCounts()
        for end_tokens in ([], ends):
            settings = {"max_new_tokens": 14, "end_tokens": end_tokens}
            found = generate_speculatively(model, draft, rows, num_drafts=num_drafts, counts=counts, **settings)
            assert texts(found) == texts(generate(model, rows, **settings)), (noise, num_drafts, end_tokens)
        assert 0 <= counts.num_kept <= counts.num_proposed
        if noise == 0:
            assert counts.num_rounds <= 2 * math.ceil(13 / 4), "not every proposal of the model itself was kept"


RULES = [
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"signed_repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_new_tokens": 6, "end_tokens": [3, 5, 7, 9]},
    {"bad_words": [[4], [3, 5]], "min_tgt_length": 9, "end_tokens": [2, 3, 11], "invalid_slices": [slice(20, 30)]},
    {"processors": [AllowedTokens(lambda prefix: [(prefix[-1] * 7 + 1) % 50, (prefix[-1] + len(prefix)) % 50])]},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: next(iter(rules)))
def test_rules_that_look_back_are_those_of_the_model_alone(rules):
    model, rows = build("gpt2"), prompts_of("gpt2")
    settings = {"strategy": greedy(**rules), "max_new_tokens": 12}
    for noise in (0.0, 0.03):
        found = generate_speculatively(model, near(model, noise), rows, num_drafts=3, **settings)
        assert texts(found) == texts(generate(model, rows, **settings))


def test_a_seed_gives_the_same_text_whatever_the_batch():
    model, rows = build("llama3"), prompts_of("llama3")
    draft = near(model, 0.05)
    settings = {"strategy": BaseStrategy(temperature=0.8, top_k=20), "max_new_tokens": 12, "seed": 3}
    together = texts(generate_speculatively(model, draft, rows, **settings))
    for batch_size in (1, 2):
        assert texts(generate_speculatively(model, draft, rows, batch_size=batch_size, **settings)) == together
    assert texts(generate_speculatively(model, draft, rows, **(settings | {"seed": 4}))) != together


def test_what_is_kept_and_what_follows_have_exactly_the_models_distribution():
    """Every draft and every outcome, summed: the first two tokens are distributed as p says, not nearly so."""
    v, generator = 4, torch.Generator().manual_seed(0)
    p1, q1 = torch.randn(2, v, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    p2, q2, p3 = torch.randn(3, v, v, v, generator=generator, dtype=torch.float64).mul(2).softmax(-1)[:, 0]
    q1, q2[1] = q1.clone(), p2[1]  # a draft that is right after token 1
    q1[2] = 0
    q1 = q1 / q1.sum()
    joint = torch.zeros(v, v, dtype=torch.float64)
    for x1, x2 in itertools.product(range(v), repeat=2):
        if q1[x1] == 0:
            continue
        probs, draft_probs = torch.stack([p1, p2[x1], p3[x2]])[None], torch.stack([q1, q2[x1]])[None]
        drafts = torch.tensor([[x1, x2]])
        limits = [min(1.0, (p1[x1] / q1[x1]).item()), min(1.0, (p2[x1, x2] / q2[x1, x2]).item())]
        for kept in itertools.product([True, False], repeat=2):
            # Just inside or outside of the probability to be kept: where that is 1 nothing is outside.
            share = math.prod(limit if is_kept else 1 - limit for limit, is_kept in zip(limits, kept, strict=True))
            if share < 1e-12:
                continue
            edges = [x - 1e-9 if is_kept else x + 1e-9 for x, is_kept in zip(limits, kept, strict=True)]
            num_kept = accept(probs, draft_probs, drafts, torch.tensor([edges], dtype=torch.float64))
            assert num_kept.tolist() == [2 if all(kept) else 1 if kept[0] else 0]
            follows = rest_after(probs, draft_probs, num_kept)[0]
            follows = follows / follows.sum()
            mass = q1[x1] * q2[x1, x2] * share
            if num_kept == 0:  # then the second token comes from a later round, whose first it is
                joint += mass * follows[:, None] * p2
            elif num_kept == 1:
                joint[x1] += mass * follows
            else:
                joint[x1, x2] += mass
    assert_close(joint, p1[:, None] * p2, atol=1e-12, rtol=0)


def test_nothing_is_left_where_draft_and_model_agree_and_a_broken_draft_is_refused():
    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    assert_close(rest_after(p, p[:, :1], torch.tensor([0])), p[:, 0])
    assert_close(rest_after(p, p[:, :1], torch.tensor([1])), p[:, 1])
    broken = torch.full((1, 1, 2), math.nan)
    assert accept(p, broken, torch.tensor([[1]]), torch.zeros(1, 1)).tolist() == [0]
    assert_close(rest_after(p, broken, torch.tensor([0])), p[:, 0])


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 3, "temperature": 1.5}], ids=["all", "top-k"])
def test_texts_drawn_have_the_models_distribution(settings):
    """A chi-square test of 3-token texts over many rows of three lengths; the seed is fixed."""
    vocab_size, num_rows, num_steps = 5, 700, 3
    model = build("gpt2", std=0.15, vocab_size=vocab_size, num_layers=1)
    draft, strategy = near(model, 0.15), BaseStrategy(**settings)
    prompts, counts = ([1, 2, 3], [4], [0, 2]), SpeculationCounts()
    found = generate_speculatively(
        model, draft, [p for p in prompts for _ in range(num_rows)], num_drafts=2, strategy=strategy,
        max_new_tokens=num_steps, seed=0, counts=counts,
    )  # fmt: skip
    assert 0.1 < counts.num_kept / counts.num_proposed < 0.9, "a draft always right or wrong tests little"
    tails = torch.tensor(list(itertools.product(range(vocab_size), repeat=num_steps)))
    for number, prompt in enumerate(prompts):
        rows = torch.cat([torch.tensor([prompt]).expand(len(tails), -1), tails], dim=1)
        with torch.no_grad():
            logits = model(rows)[0][:, len(prompt) - 1 : -1].flatten(0, 1)
        state = strategy.start(make_state())
        probs = strategy.filter(strategy.process(logits, state)).softmax(-1).view(len(tails), num_steps, vocab_size)
        expected = probs.gather(2, tails[..., None])[..., 0].prod(1) * num_rows
        drawn = torch.tensor([r.tokens for r in found[number * num_rows : (number + 1) * num_rows]])
        index = (drawn * vocab_size ** torch.arange(num_steps - 1, -1, -1)).sum(1)
        observed = torch.bincount(index, minlength=len(tails))
        assert not observed[expected == 0].any()
        rare = expected < 5
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
        degrees = len(expected) - 1
        statistic = ((observed - expected) ** 2 / expected).sum().item()
        assert degrees > 5 and abs(statistic - degrees) < 5 * math.sqrt(2 * degrees), (statistic, degrees)


def make_state():
    from sat_lightning.generation import DecodingState

    return DecodingState.create(torch.ones(1, 1, dtype=torch.int64), 1, seed=0)


def test_bfloat16_models_write_whole_texts():
    model = build("llama3").bfloat16()
    found = generate_speculatively(model, near(model, 0.02), prompts_of("llama3"), max_new_tokens=9, cache_dtype="int8")
    assert [len(result.tokens) for result in found] == [9] * 4


def test_what_does_not_go_together_is_refused():
    model, rows = build("gpt2"), [[1, 2]]
    refuse = [
        (model, {}, ConfigError, "the draft is the model itself"),
        (build("gpt2", vocab_size=40), {}, ConfigError, "the draft has a vocabulary of 40 tokens, the model one of"),
        (build("t5"), {}, ConfigError, "one has an encoder: both must, or none"),
        (near(model, 0.1), {"strategy": BeamSearchStrategy(2)}, ConfigError, "BeamSearchStrategy is none"),
        (near(model, 0.1), {"num_drafts": 0}, ConfigError, "num_drafts must be an integer at least 1, not 0"),
        (near(model, 0.1), {"end_tokens": [10**6]}, ConfigError, r"end tokens \[1000000\] are outside the vocabulary"),
    ]
    for draft, settings, error, message in refuse:
        with pytest.raises(error, match=message):
            generate_speculatively(model, draft, rows, **({"max_new_tokens": 4} | settings))
    broken = near(model, 0.0)
    with torch.no_grad():
        broken.transformer.final_layernorm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="step 0, row 0: the logits are NaN or infinite"):
        generate_speculatively(broken, model, rows, max_new_tokens=4)
    expected = generate(model, rows, max_new_tokens=6)
    assert texts(generate_speculatively(model, broken, rows, max_new_tokens=6)) == texts(expected)


def test_useless_logits_name_the_prompt_whatever_its_batch():
    model = build("gpt2", std=0.0)
    draft = near(model, 0.01)
    with torch.no_grad():
        model.transformer.word_embeddings.weight[7] = float("nan")
    with pytest.raises(InputError, match="step 0, row 2: the logits are NaN or infinite"):
        generate_speculatively(model, draft, [[5, 6, 8], [5], [7, 8]], max_new_tokens=3, batch_size=1)
