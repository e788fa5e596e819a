"""SAT's iterative entropy filter: which places are hot, what stays, and the shares of a long run."""

import math

import pytest
import torch
from torch.testing import assert_close

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import IterativeEntfilterStrategy
from sat_lightning.generation.entropy_filter import keep_drawn_top_k, top_entropy


def test_entropy_of_the_best():
    logits = torch.tensor([[0.0, 0.0, -50.0, -60.0], [9.0, 1.0, 1.0, 1.0]])
    p = torch.tensor([math.e**8, 1.0]) / (math.e**8 + 1)
    expected = torch.tensor([math.log(2), -(p * p.log()).sum()])
    assert_close(top_entropy(logits, 2), expected)


def test_a_draw_outside_the_best_becomes_the_last_of_them():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).expand(4, -1)
    assert keep_drawn_top_k(torch.tensor([0, 1, 2, 3]), logits, 2).tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsure_places_have_one_temperature_and_sure_ones_the_other(dtype):
    """Exact shares: the last of the three kept tokens also takes what is drawn outside."""
    sure, unsure = torch.tensor([4.0, 0.5, 0.25, 0.0, -1.0]), torch.tensor([1.0, 0.5, 0.25, 0.0, -1.0])
    logits = torch.stack([sure, unsure]).to(dtype)[None].expand(20_000, -1, -1)
    tokens = torch.full((20_000, 3), 4)
    strategy = IterativeEntfilterStrategy(invalid_slices=[slice(1, 2)], topk=3)
    generator = torch.Generator().manual_seed(0)
    out = strategy.forward(
        logits, tokens, temperature=2.0, entfilter=1.0, filter_topk=3, temperature2=0.5, generator=generator
    )
    assert out.shape == tokens.shape and (out[:, 0] == 4).all()
    for place, (raw, heat) in enumerate(((sure, 0.5), (unsure, 2.0)), start=1):
        probs = (raw / heat).masked_fill(torch.arange(5) == 1, -math.inf).softmax(-1)
        expected = torch.tensor([probs[0], 0.0, probs[2], probs[3] + probs[4], 0.0])
        shares = torch.bincount(out[:, place], minlength=5) / 20_000
        assert_close(shares, expected, atol=0.015, rtol=0)
    again = strategy.forward(logits[:5], tokens[:5], generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, strategy.forward(logits[:5], tokens[:5], generator=torch.Generator().manual_seed(1)))


def test_what_does_not_fit_is_refused():
    strategy, logits = IterativeEntfilterStrategy(), torch.randn(1, 3, 20)
    with pytest.raises(InputError, match="3 tokens and logits of 3 places"):
        strategy.forward(logits, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="entfilter= needs temperature2="):
        strategy.forward(logits, torch.zeros(1, 4, dtype=torch.int64), entfilter=1.0)
    with pytest.raises(ConfigError, match="topk=10 and filter_topk=5 for 8 tokens"):
        strategy.forward(logits[..., :8], torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0.0"):
        IterativeEntfilterStrategy(temperature=0)
