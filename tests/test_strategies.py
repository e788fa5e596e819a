"""Strategies: what they choose, what a state remembers, and what they refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import BaseStrategy, DecodingState, greedy, top_k_logits

RECORDED = load_file(Path(__file__).parent / "data" / "generation_steps.safetensors")
V = 23


def ragged(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([[-1] * (width - len(row)) + row for row in rows])


def run(strategy, logits_of, prompts, num_steps, **options):
    """Drive a strategy with `logits_of(tokens of a row) -> [v]`, a model without a cache."""
    state = strategy.start(DecodingState.create(ragged(prompts), num_steps, **options))
    while state.length < state.capacity:
        rows = state.tokens[:, : state.length]
        logits = torch.stack([logits_of(row[row >= 0].tolist()) for row in rows])
        next_tokens, state = strategy.step(logits, state)
        state.append(next_tokens)
        if state.all_done():
            break
    return [texts[0].tokens.tolist() for texts in strategy.finalize(state)]


def table_model(seed=0, vocab_size=V, scale=2.0):
    """Logits that depend on the last two tokens and the length of a row."""
    table = torch.randn(vocab_size, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return lambda row: table[row[-1], row[len(row) // 2]]


def test_penalty_and_invalid_slices_of_sat_token_for_token():
    case = "gen_rep_penalty_invalid"
    seq = RECORDED[f"{case}.seq"]
    strategy = BaseStrategy(temperature=1, top_k=1, repetition_penalty=1.7, invalid_slices=[slice(50, 60)])
    state = strategy.start(DecodingState.create(seq[None, seq >= 0], int((seq < 0).sum())))
    for step in range(9):
        logits = RECORDED[f"{case}.step{step}.logits"]
        next_tokens, state = strategy.step(logits, state)
        state.append(next_tokens)
    assert state.tokens.tolist() == RECORDED[f"{case}.tokens"].tolist()
    unpunished = [RECORDED[f"{case}.step{step}.logits"].argmax().item() for step in range(9)]
    assert unpunished != state.tokens[0, -9:].tolist()


def test_each_row_stops_on_its_own_and_equals_the_row_alone():
    model, prompts = table_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    options = {"end_tokens": (11,)}
    together = run(greedy(end_tokens=[3]), model, prompts, 40, **options)
    alone = [run(greedy(end_tokens=[3]), model, [prompt], 40, **options)[0] for prompt in prompts]
    assert together == alone
    assert len({len(row) for row in together}) > 1
    for row, prompt in zip(together, prompts, strict=True):
        assert row[: len(prompt)] == prompt
        assert not {3, 11} & set(row[len(prompt) : -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_the_same_text_whatever_the_batch(dtype):
    table, prompts = table_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    strategy = BaseStrategy(top_k=12, top_p=0.9, temperature=1.3)

    def model(row):
        return table(row).to(dtype)

    together = run(strategy, model, prompts, 30, seed=7)
    alone = [run(strategy, model, [p], 30, seed=7, row_ids=[i])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != run(strategy, model, prompts, 30, seed=8)
    torch.manual_seed(3)
    first = run(strategy, model, prompts, 30)
    torch.manual_seed(3)
    assert first == run(strategy, model, prompts, 30)


def test_equal_prompts_of_one_call_get_texts_of_their_own():
    first, second = run(BaseStrategy(top_k=0), table_model(), [[1, 2], [1, 2]], 20, seed=0)
    assert first != second


def test_top_k_logits_keeps_the_name_and_not_the_fault():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert top_k_logits(logits, 3).tolist() == [[3.0, 2.0, 1.0, -65504.0]]
    assert top_k_logits(logits, 3, 0.5).tolist() == [[3.0, -65504.0, -65504.0, -65504.0]]
    assert top_k_logits(logits, 0, 0.9).tolist() == [[3.0, 2.0, 1.0, -65504.0]]
    assert logits.tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_nan_logits_name_the_step_and_the_row():
    def model(row):
        logits = torch.randn(V)
        return logits.fill_(torch.nan) if len(row) == 6 else logits

    with pytest.raises(InputError, match=r"step 3, row 1: the logits are NaN or infinite"):
        run(greedy(), model, [[1], [1, 2, 3]], 5)


def test_of_several_failures_the_first_is_named():
    state = DecodingState.create(torch.tensor([[1], [2]]), 4)
    for best in ([0.0, 0.0], [0.0, torch.nan], [torch.nan, torch.nan]):
        state.note_best(torch.tensor(best))
        state.length += 1
    with pytest.raises(InputError, match="step 1, row 1: the logits are NaN or infinite"):
        state.all_done()


def test_nothing_allowed_is_an_error_and_not_a_token():
    strategy = greedy(invalid_slices=[slice(None)])
    with pytest.raises(InputError, match="step 0, row 0: no token is allowed"):
        run(strategy, lambda row: torch.randn(V), [[1]], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number at least 0.0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number at least 0.0, not nan"),
        ({"top_k": -1}, "top_k must be an integer at least 0, not -1"),
        ({"top_k": 2.5}, "top_k must be an integer at least 0, not 2.5"),
        ({"top_p": 1.5}, "top_p must be a finite number at least 0.0 and at most 1.0, not 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0.0, not 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BaseStrategy(**settings)


@pytest.mark.parametrize("where", ["strategy", "state"])
@pytest.mark.parametrize("token", [V, -1])
def test_an_end_token_outside_the_vocabulary_is_refused(where, token):
    strategy = greedy(end_tokens=[token] if where == "strategy" else None)
    options = {"end_tokens": [token]} if where == "state" else {}
    message = rf"end tokens \[{token}\] are outside the vocabulary of {V} tokens"
    with pytest.raises(ConfigError, match=message):
        run(strategy, table_model(), [[1]], 2, **options)


def test_a_state_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match=r"prompts must be ids \[b, s\]"):
        DecodingState.create(torch.zeros(2, 0, dtype=torch.int64), 3)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 0, not -1"):
        DecodingState.create(torch.ones(1, 1), -1)
    state = DecodingState.create(torch.ones(1, 1), 0)
    with pytest.raises(InputError, match="all 1 columns of the state are filled"):
        state.append(torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"call strategy.start\(state\) first"):
        BaseStrategy().step(torch.randn(1, V), DecodingState.create(torch.ones(1, 1), 2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bad_words": [[5], [3, 60]]}, r"bad_words holds the ids \[60\], outside the vocabulary of 60 tokens"),
        ({"bad_words": [[-1]]}, r"bad_words holds the ids \[-1\]"),
        (
            {"invalid_slices": [slice(3, 5), 60]},
            r"invalid_slices is \[slice\(3, 5, None\), 60\], for a vocabulary of 60",
        ),
        ({"invalid_slices": ["a"]}, r"invalid_slices is \['a'\]"),
    ],
)
def test_words_that_the_model_does_not_have_are_named(settings, text):
    strategy = greedy(**settings)
    state = strategy.start(DecodingState.create(torch.ones(1, 2), 2))
    with pytest.raises(ConfigError, match=text):
        strategy.step(torch.randn(1, 60), state)
