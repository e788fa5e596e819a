"""Batches of samples of different lengths: padding, masks and positions; buckets and token budgets."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from sat_lightning import TransformerConfig
from sat_lightning.data.collate import PadCollate, batch_by_tokens, bucket_by_length
from sat_lightning.errors import DataError
from sat_lightning.models import GPT2Model


def sample(*ids: int) -> dict:
    return {"input_ids": np.array(ids), "target_ids": np.array(ids) + 1, "score": 0.5, "name": "x"}


SAMPLES = [sample(1, 2, 3), sample(4), None]


def test_padding_to_the_longest() -> None:
    batch = PadCollate(padding_id=9)(SAMPLES)
    assert set(batch) == {"input_ids", "target_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert batch["target_ids"].tolist() == [[2, 3, 4], [5, -100, -100], [-100, -100, -100]]
    assert batch["input_ids"].dtype == torch.int64
    assert PadCollate()([None])["target_ids"].tolist() == [[-100]]


def test_padding_to_a_length_and_a_multiple() -> None:
    assert PadCollate(5)(SAMPLES)["input_ids"].tolist()[0] == [1, 2, 3, 0, 0]
    assert PadCollate(multiple_of=4)(SAMPLES)["input_ids"].shape == (3, 4)
    assert PadCollate(5, multiple_of=4)(SAMPLES)["input_ids"].shape == (3, 8)
    with pytest.raises(
        DataError, match=r"sample 0 of the batch has 3 tokens, more than length=2\. Raise length, or cut"
    ):
        PadCollate(2)(SAMPLES)


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_and_positions(side: str) -> None:
    batch = PadCollate(4, side=side, attention_mask="padding", position_ids=True)(SAMPLES)
    is_left = side == "left"
    assert batch["input_ids"].tolist()[0] == ([0, 1, 2, 3] if is_left else [1, 2, 3, 0])
    expected = [[0, 1, 1, 1], [0, 0, 0, 1], [0] * 4] if is_left else [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4]
    assert batch["attention_mask"].shape == (3, 1, 1, 4) and batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][:, 0, 0].int().tolist() == expected
    assert batch["position_ids"][0].tolist() == ([0, 0, 1, 2] if is_left else [0, 1, 2, 3])
    causal = PadCollate(4, side=side, attention_mask="causal")(SAMPLES)["attention_mask"]
    assert causal.shape == (3, 1, 4, 4)
    assert torch.equal(causal, batch["attention_mask"] & torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_gives_a_padded_row_what_it_gives_the_row_alone(side: str) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
    model = GPT2Model(TransformerConfig(**sizes, max_sequence_length=8)).eval()
    batch = PadCollate(6, side=side, attention_mask="causal", position_ids=True)([sample(1, 2, 3), sample(4, 5, 6, 7)])
    together = model(batch["input_ids"], batch["position_ids"], batch["attention_mask"])[0]
    for row, ids in enumerate(([1, 2, 3], [4, 5, 6, 7])):
        alone = model(torch.tensor([ids]))[0][0]
        span = slice(6 - len(ids), 6) if side == "left" else slice(0, len(ids))
        assert torch.allclose(together[row, span], alone, atol=1e-5)


def test_settings_and_samples_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="side is 'up' and attention_mask 'none'. Set them to one of right, left"):
        PadCollate(side="up")
    with pytest.raises(DataError, match="length is 0 and multiple_of 1. Set length to 'longest' or a number above 0"):
        PadCollate(0)
    odd = {"input_ids": np.arange(3), "pixels": np.arange(2)}
    with pytest.raises(DataError, match="sample 0 of the batch has 3 input_ids and 2 of 'pixels'. Name the fields"):
        PadCollate()([odd])
    assert set(PadCollate(fields=["input_ids"])([odd])) == {"input_ids"}


LENGTHS = np.random.default_rng(0).integers(1, 200, 1000)


def test_buckets_hold_the_same_numbers_window_by_window() -> None:
    order = np.random.default_rng(1).permutation(1000).tolist()
    bucketed = list(bucket_by_length(order, LENGTHS, 100))
    for start in range(0, 1000, 100):
        window = bucketed[start : start + 100]
        assert sorted(window) == sorted(order[start : start + 100])
        assert (np.diff(LENGTHS[window]) <= 0).all()
    # Resumed at a window, it goes on as it would have.
    assert list(bucket_by_length(order[300:], LENGTHS, 100)) == bucketed[300:]
    with pytest.raises(DataError, match="window_size is 0"):
        next(bucket_by_length(order, LENGTHS, 0))


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_batches_keep_the_budget_and_lose_nothing(multiple_of: int) -> None:
    order = list(bucket_by_length(range(1000), LENGTHS.tolist().__getitem__, 100))
    batches = list(batch_by_tokens(order, LENGTHS, 1024, max_samples=50, multiple_of=multiple_of))
    assert [number for batch in batches for number in batch] == order
    padded = [len(batch) * -(-LENGTHS[batch].max() // multiple_of) * multiple_of for batch in batches]
    assert max(padded) <= 1024 and max(map(len, batches)) <= 50
    # None could have taken the next batch's first sample.
    for batch, after in zip(batches, batches[1:], strict=False):
        longest = -(-LENGTHS[[*batch, after[0]]].max() // multiple_of) * multiple_of
        assert longest * (len(batch) + 1) > 1024 or len(batch) == 50
    waste = 1 - LENGTHS.sum() / sum(padded)
    unsorted = list(batch_by_tokens(range(1000), LENGTHS, 1024, multiple_of=multiple_of))
    assert waste < 0.12 < 0.3 < 1 - LENGTHS.sum() / sum(len(batch) * LENGTHS[batch].max() for batch in unsorted)


def test_ranks_share_batches() -> None:
    batches = [list(islice(batch_by_tokens(range(100), LENGTHS, 512), rank, None, 3)) for rank in range(3)]
    assert sorted(number for rank in batches for batch in rank for number in batch) == list(range(100))


def test_sample_longer_than_the_budget() -> None:
    with pytest.raises(
        DataError, match=r"sample 1 takes 24 tokens, more than max_tokens=20\. Raise max_tokens, or cut"
    ):
        list(batch_by_tokens([0, 1], [3, 21], 20, multiple_of=8))
