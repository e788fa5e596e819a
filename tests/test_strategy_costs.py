"""What a step may not do: ask the device, draw from the global generator, or keep anything in the strategy."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sat_lightning.generation import BaseStrategy, BeamSearchStrategy, DecodingState, PlainBeamScoring, greedy
from tests.test_processors import RULES, V

STRATEGIES = {
    "greedy": greedy(end_tokens=[3]),
    "drawn": BaseStrategy(end_tokens=[3]),
    "all rules": BaseStrategy(**RULES["all"]),
    "beams": BeamSearchStrategy(3, end_tokens=[3, 5], no_repeat_ngram_size=2, min_tgt_length=6, bad_words=[[1, 2]]),
    "plain beams": BeamSearchStrategy(2, end_tokens=[3], scoring=PlainBeamScoring(early_stopping="never")),
}


def steps(strategy, logits_of, num_steps=4):
    state = strategy.start(DecodingState.create(torch.ones(2, 4, dtype=torch.int64), num_steps, seed=0))
    for step in range(num_steps):
        next_tokens, state = strategy.step(logits_of(step, len(state.tokens)), state)
        state.append(next_tokens)
    return state


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_step_asks_the_device(name):
    """A fake tensor has no values: whoever reads one is told so."""
    with FakeTensorMode():
        state = steps(STRATEGIES[name], lambda step, b: torch.randn(b, V))
        with pytest.raises(DataDependentOutputException):
            state.all_done()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_serves_any_number_of_calls_and_leaves_the_global_generator(name):
    strategy = STRATEGIES[name]
    table = torch.randn(4, 6, V, generator=torch.Generator().manual_seed(0))
    settings, chance = copy.deepcopy(vars(strategy)), torch.get_rng_state()
    first = steps(strategy, lambda step, b: table[step, :b].bfloat16())
    second = steps(strategy, lambda step, b: table[step, :b].bfloat16())
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(torch.get_rng_state(), chance)
    assert vars(strategy) == settings
