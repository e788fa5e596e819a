"""Logits processors: equal to Hugging Face's on random logits, and to a plain loop where it has none."""

import math
from functools import partial

import pytest
import torch
import transformers
from torch.testing import assert_close

from sat_lightning.errors import ConfigError
from sat_lightning.generation import BaseStrategy, DecodingState, processors
from sat_lightning.generation.sampling import draw_token

V, ROWS, LENGTH = 31, 6, 12
PROMPT = 5
theirs = transformers.generation.logits_process


def random_case(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, V, generator=generator) * 3).to(dtype).float()
    return logits, torch.randint(0, 6, (ROWS, LENGTH), generator=generator)


BAD_WORDS = [[3], [1, 2], [4, 0, 5], [2, 2, 2, 2], [5, 1]]
PAIRS = {
    "top_k": (lambda x, t: processors.keep_top_k(x, 7), theirs.TopKLogitsWarper(7)),
    "top_p": (lambda x, t: processors.keep_top_p(x, 0.8), theirs.TopPLogitsWarper(0.8)),
    "min_p": (lambda x, t: processors.keep_min_p(x, 0.1), theirs.MinPLogitsWarper(0.1)),
    "typical": (lambda x, t: processors.keep_typical(x, 0.7), theirs.TypicalLogitsWarper(0.7)),
    "repetition": (
        lambda x, t: processors.signed_repetition_penalty(x, t, 1.4),
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    "bad words": (
        lambda x, t: processors.ban_words(x, t, *processors.pack_words(BAD_WORDS, "cpu")),
        theirs.NoBadWordsLogitsProcessor(BAD_WORDS, eos_token_id=30),
    ),
    **{
        f"{n}-grams": (
            lambda x, t, n=n: processors.ban_repeated_ngrams(x, t, n),
            theirs.NoRepeatNGramLogitsProcessor(n),
        )
        for n in (1, 2, 3)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_processor_equals_hugging_face(name, dtype):
    ours, other = PAIRS[name]
    num_changed = 0
    for seed in range(20):
        logits, tokens = random_case(seed, dtype)
        before = logits.clone()
        got = ours(logits, tokens)
        assert torch.equal(logits, before), "in place"
        # Where rounding makes two logits equal, the order of a sort is nobody's promise: compare what is kept by value.
        assert_close(got.sort(-1).values, other(tokens, logits.clone()).sort(-1).values)
        if dtype == torch.float32:
            assert_close(got, other(tokens, logits.clone()))
        num_changed += int((got != logits).sum())
    assert num_changed > 0


@pytest.mark.parametrize("name", ["bad words", "1-grams", "2-grams", "3-grams"])
def test_bans_of_ragged_rows_are_those_of_each_row_alone(name):
    ban, _ = PAIRS[name]
    for seed in range(10):
        logits, tokens = random_case(seed)
        lengths = torch.arange(ROWS) + 1
        ragged = torch.where(torch.arange(LENGTH) < LENGTH - lengths[:, None], -1, tokens)
        alone = [ban(logits[i : i + 1], tokens[i : i + 1, LENGTH - n :]) for i, n in enumerate(lengths.tolist())]
        assert torch.equal(ban(logits, ragged), torch.cat(alone))


def test_ngrams_that_end_in_the_prompt_count_only_if_asked():
    logits, tokens = torch.zeros(1, V), torch.tensor([[1, 2, 1, 3, 4, 3, 1]])
    all_counted = processors.ban_repeated_ngrams(logits, tokens, 2)
    assert all_counted[0].isinf().nonzero().flatten().tolist() == [2, 3]
    for first_column, banned in ((1, [2, 3]), (2, [3]), (3, [3]), (4, [])):  # 1 2 ends in column 1, 1 3 in column 3
        generated = processors.ban_repeated_ngrams(logits, tokens, 2, first_column)
        assert generated[0].isinf().nonzero().flatten().tolist() == banned


def test_sat_penalty_divides_whatever_the_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert processors.sat_repetition_penalty(logits, torch.tensor([[0, 1, 1, -1]]), 2.0).tolist() == [[1.0, -1.0, 1.0]]
    signed = processors.signed_repetition_penalty(logits, torch.tensor([[0, 1, 1, -1]]), 2.0)
    assert signed.tolist() == [[1.0, -4.0, 1.0]]


def test_frequency_counts_each_time_and_presence_once():
    got = processors.count_penalty(torch.zeros(2, 4), torch.tensor([[0, 1, 1], [3, -1, -1]]), 0.5, 0.25)
    assert got.tolist() == [[-0.75, -1.25, 0.0, 0.0], [0.0, 0.0, 0.0, -0.75]]


@pytest.mark.parametrize("top_k", [1, 5, 30, 31, 200])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.99, 1.0])
def test_candidates_equal_one_filter_after_the_other(top_k, top_p):
    strategy = BaseStrategy(top_k=top_k, top_p=top_p, min_p=0.02, typical_p=0.95)
    for seed in range(5):
        logits, _ = random_case(seed)
        expected = processors.keep_top_p(processors.keep_top_k(logits, top_k), top_p)
        expected = processors.keep_typical(processors.keep_min_p(expected, 0.02), 0.95)
        assert torch.equal(strategy.filter(logits), expected)
        kept, places = strategy.candidates(logits)
        if top_k < V:
            assert kept.shape == (ROWS, top_k) and (places.diff(dim=1) > 0).all()
            assert torch.equal(expected.gather(1, places), kept)


def test_of_equal_logits_no_more_than_top_k_are_drawn():
    strategy = BaseStrategy(top_k=3)
    assert strategy.filter(torch.zeros(2, V)).isfinite().sum(1).tolist() == [3, 3]


def test_off_means_untouched():
    logits, _ = random_case(0)
    for keep in (processors.keep_top_p, processors.keep_typical):
        assert keep(logits, 0.0) is logits and keep(logits, 1.0) is logits
    assert processors.keep_top_k(logits, 0) is logits and processors.keep_min_p(logits, 0.0) is logits


RULES = {
    "all": {
        "invalid_slices": [slice(3, 6), 9],
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.97,
        "repetition_penalty": 1.2,
        "signed_repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "bad_words": BAD_WORDS,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 9,
        "min_tgt_length": 9,
        "end_tokens": [7],
    }
}


def make_state(tokens, num_steps=4):
    state = DecodingState.create(tokens[:, :PROMPT], LENGTH - PROMPT + num_steps, seed=0)
    for column in range(PROMPT, LENGTH):
        state.append(tokens[:, column])
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rules_together_equal_the_parts_one_by_one(dtype):
    strategy = BaseStrategy(**RULES["all"])
    logits, tokens = random_case(3, dtype)
    state = strategy.start(make_state(tokens))
    x = processors.sat_repetition_penalty(logits, tokens[:, PROMPT:], 1.2)
    x = processors.signed_repetition_penalty(x, tokens, 1.1)
    x = processors.count_penalty(x, tokens[:, PROMPT:], 0.3, 0.2) / 0.7
    x[:, [3, 4, 5, 9, 7]] = -math.inf  # the end token too: 7 of at least 9 tokens are there
    x = PAIRS["bad words"][1](tokens, x)
    x = processors.ban_repeated_ngrams(x, tokens, 2, first_column=PROMPT)
    assert_close(strategy.process(logits, state), x)
    x = processors.keep_top_p(processors.keep_top_k(x, 20), 0.95)
    x = processors.keep_typical(processors.keep_min_p(x, 0.01), 0.97)
    drawn = draw_token(x, state.uniforms[:, LENGTH - PROMPT])
    assert torch.equal(strategy.step(logits.to(dtype), state)[0], drawn)


def test_no_row_ends_before_its_least_length():
    logits = torch.zeros(2, V)
    logits[:, 7] = 50.0
    prompts = torch.tensor([[-1, -1, 1], [1, 2, 3]])
    for settings, expected in (
        ({"min_new_tokens": 2}, [[False, False], [False, False], [True, True]]),
        ({"min_tgt_length": 4}, [[False, False], [False, True], [False, True], [True, True]]),
    ):
        strategy = BaseStrategy(top_k=1, end_tokens=[7], **settings)
        state = strategy.start(DecodingState.create(prompts, 5))
        for is_end in expected:
            next_tokens, state = strategy.step(logits, state)
            assert ((next_tokens == 7) | state.is_done).tolist() == is_end
            state.append(next_tokens)


def test_own_processors_come_behind_the_penalties_and_before_the_temperature():
    seen = []

    def double(logits, state):
        seen.append((logits.clone(), state.length))
        return logits * 2

    strategy = BaseStrategy(temperature=0.5, frequency_penalty=1.0, processors=[double])
    logits, tokens = random_case(1)
    state = make_state(tokens)
    assert_close(
        strategy.process(logits, state), processors.count_penalty(logits, tokens[:, PROMPT:], 1.0, 0.0) * 2 / 0.5
    )
    assert_close(seen[0][0], processors.count_penalty(logits, tokens[:, PROMPT:], 1.0, 0.0))
    assert seen[0][1] == LENGTH


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": -0.1}, "min_p must be a finite number at least 0.0 and at most 1.0, not -0.1"),
        ({"typical_p": 2}, "typical_p must be"),
        ({"signed_repetition_penalty": 0.0}, "signed_repetition_penalty must be a finite number above 0.0"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be a finite number, not inf"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size must be an integer at least 0, not -2"),
        ({"min_new_tokens": True}, "min_new_tokens must be an integer"),
        ({"bad_words": [[1], []]}, r"bad_words must be lists of one id or more, not \[\[1\], \[\]\]"),
    ],
)
def test_rules_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BaseStrategy(**settings)


def exact_probs(strategy, logits, state):
    return strategy.filter(strategy.process(logits, state)).softmax(-1).double()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8, "temperature": 1.7},
        {"top_k": 0, "min_p": 0.05},
        {"top_k": 0, "typical_p": 0.9, "temperature": 2.0},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_draws_have_the_exact_distribution(settings):
    """A chi-square test over the rows of one step: the uniforms of rows are those of a real call."""
    num_rows, strategy = 20_000, BaseStrategy(**settings)
    logits = random_case(5)[0][:1].expand(num_rows, -1)
    state = strategy.start(DecodingState.create(torch.ones(num_rows, 1, dtype=torch.int64), 1, seed=1))
    drawn, _ = strategy.step(logits, state)
    probs = exact_probs(strategy, logits[:1], state)[0]
    counts = torch.bincount(drawn, minlength=V)
    assert not counts[probs == 0].any()
    expected = probs[probs > 0] * num_rows
    common = expected >= 5
    statistic = ((counts[probs > 0] - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert degrees >= 2
    # Five standard deviations of the chi-square distribution; the seed is fixed, so this holds always or never.
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees), (statistic, degrees)


def test_inverse_of_the_distribution_at_its_edges():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    draw = partial(draw_token, logits)
    almost_one = torch.tensor([1.0], dtype=torch.float64).nextafter(torch.zeros(1, dtype=torch.float64))
    assert draw(torch.zeros(1)).tolist() == [1]
    assert draw(torch.tensor([0.4999])).tolist() == [1]
    assert draw(torch.tensor([0.5])).tolist() == [3]
    assert draw(almost_one).tolist() == [3]
    many = torch.randn(1, 50_000)
    many[:, -100:] = -math.inf
    assert draw_token(many, almost_one).item() < 49_900


def test_rules_and_draw_compile_in_one_graph():
    settings = {**RULES["all"], "processors": [lambda logits, state: logits + 1]}
    strategy = BaseStrategy(**settings)
    logits, tokens = random_case(2)
    state = strategy.start(make_state(tokens))
    expected = strategy.step(logits, state)[0]
    step = torch.compile(lambda x: strategy.step(x, state)[0], fullgraph=True, backend="eager")
    assert torch.equal(step(logits), expected)
