"""Buckets by length and budgets of tokens: every sample once, a function of seed and position, on any ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sat_lightning.data.batches import Place, ShardedBatches
from sat_lightning.data.buckets import BucketedBatches, Buckets, BudgetBatches
from sat_lightning.data.mixture import Mixture, Share
from sat_lightning.errors import DataError

LENGTHS = np.random.default_rng(0).integers(1, 200, 2000)


def mixture_of(*sizes: int, **settings: Any) -> Mixture:
    return Mixture(sizes, seed=3, **settings)


def buckets_of(mixture: Mixture, window_size: int, lengths: np.ndarray = LENGTHS) -> Buckets:
    return Buckets(mixture, lambda ids: lengths[ids], window_size)


def budgets(mixture: Mixture, num_ranks: int, window: int = 64, max_tokens: int = 900, **settings: Any) -> list[Any]:
    shared = {"max_tokens": max_tokens, "num_replicas": num_ranks, **settings}
    return [BudgetBatches(buckets_of(mixture, window), rank=rank, **shared) for rank in range(num_ranks)]


def read(ranks: list[Any], place: Place | None = None, num_steps: int | None = None) -> list[list[list[int]]]:
    """Steps, each a batch of every rank."""
    for rank in ranks:
        rank.start_at(place or Place(), num_steps)
    return [list(step) for step in zip(*map(list, ranks), strict=True)]


def ids_of(steps: list[list[list[int]]]) -> list[int]:
    return [i for step in steps for batch in step for i in batch]


@pytest.mark.parametrize("window_size", [0, 1, 7, 64, 5000])
@pytest.mark.parametrize("stop", [None, "never"])
def test_a_bucketed_stream_holds_the_same_samples_window_by_window(window_size: int, stop: Any) -> None:
    mixture = mixture_of(300, 45, stop=stop)
    buckets = buckets_of(mixture, window_size)
    slots = np.arange(3 * 345)
    positions = buckets.positions(slots)
    size = max(window_size, 1)
    for epoch in range(3 if stop is None else 0):
        bounds = [*range(epoch * 345, (epoch + 1) * 345, size), (epoch + 1) * 345]
        for first, last in zip(bounds, bounds[1:], strict=False):
            assert sorted(positions[first:last].tolist()) == list(range(first, last))
    if window_size <= 1:
        assert np.array_equal(positions, slots)
    # Any part of it, asked for alone, is the same: no history.
    for first, last in ((0, 1), (344, 346), (500, 690)):
        assert np.array_equal(buckets_of(mixture, window_size).positions(slots[first:last]), positions[first:last])
        assert np.array_equal(buckets.lengths(first, last), LENGTHS[mixture.ids(positions[first:last])])


def test_neighbours_are_alike_in_length_and_ramps_go_both_ways() -> None:
    mixture = mixture_of(2000)
    lengths = buckets_of(mixture, 500).lengths(0, 2000).reshape(4, 500)
    steps = np.abs(np.diff(lengths, axis=1))
    assert steps.mean() < 2 < 30 < np.abs(np.diff(LENGTHS[mixture.ids(range(2000))])).mean()
    assert len({int(window.argmax()) for window in lengths}) == 4  # each window is entered at a place of its own
    # What one step deals to four ranks pads to almost the same length, so none of them waits.
    ranks = [
        BucketedBatches(buckets_of(mixture, 500), 8, num_replicas=4, rank=rank, drop_last=True) for rank in range(4)
    ]
    longest = np.array([[max(LENGTHS[batch]) for batch in step] for step in read(ranks)])
    plain = [ShardedBatches(mixture, 8, num_replicas=4, rank=rank, drop_last=True) for rank in range(4)]
    padded = [sum(max(LENGTHS[batch]) * 8 for step in read(part) for batch in step) for part in (ranks, plain)]
    assert (longest.max(axis=1) - longest.min(axis=1)).mean() < 25
    assert padded[0] < 0.62 * padded[1] and padded[0] < 1.15 * LENGTHS.sum()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("sizes", [(97,), (400, 33, 7)])
def test_budget_batches_show_every_sample_once_and_keep_the_budget(
    num_ranks: int, window: int, sizes: tuple[int, ...]
) -> None:
    mixture, size = mixture_of(*sizes), sum(sizes)
    ranks = budgets(mixture, num_ranks, window, multiple_of=8)
    stream = buckets_of(mixture, window)
    for epoch in range(3):
        steps = read(ranks, Place(epoch))
        assert all(batch for step in steps for batch in step)
        assert len(steps) == ranks[0].num_steps(0, epoch)
        ids = ids_of(steps)
        assert sorted(ids) == list(range(size))
        assert ids == mixture.ids(stream.positions(np.arange(epoch * size, (epoch + 1) * size))).tolist()
        tokens = [len(batch) * -(-max(LENGTHS[batch]) // 8) * 8 for step in steps for batch in step]
        assert max(tokens) <= 900
        assert np.mean(tokens[: -2 * num_ranks]) > (0.75 if window else 0.6) * 900  # and makes use of it
    assert len(ranks[0]) == ranks[0].num_steps(0, 0)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 3)])
def test_budget_batches_continue_where_others_stopped(before: int, after: int) -> None:
    mixture = mixture_of(250, 83)
    first, second = budgets(mixture, before), budgets(mixture, after)
    place = Place()
    seen: list[int] = []
    for num_steps, ranks in ((7, first), (0, second), (5, second), (40, first)):
        seen += ids_of(read(ranks, place, num_steps))
        places = [rank.advance(place, num_steps) for rank in ranks]
        assert len(set(places)) == 1
        # Step by step or at once, forwards or again: a place is a function of the place before.
        assert places[0] == budgets(mixture, len(ranks))[0].advance(place, num_steps)
        assert ranks[0].advance(place, max(0, num_steps - 3)) <= places[0]
        place = places[0]
    num_seen = place.epoch * 333 + place.position
    whole = mixture.ids(buckets_of(mixture, 64).positions(np.arange(num_seen))).tolist()
    assert seen == whole and place.epoch >= 1
    if before == after:
        assert read(first, Place(), 52) == [*read(first, Place(), 7), *read(second, first[0].advance(Place(), 7), 45)]


def test_positions_are_those_of_all_ranks() -> None:
    mixture = mixture_of(250, 83)
    ranks, place = budgets(mixture, 3), Place()
    for step in read(ranks, place, 30):
        assert mixture.ids(ranks[0].positions(place)).tolist() == [i for batch in step for i in batch]
        place = ranks[0].advance(place, 1)
    bucketed = [BucketedBatches(buckets_of(mixture, 50), 4, num_replicas=3, rank=rank) for rank in range(3)]
    place = Place()
    for step in read(bucketed, place, 30):
        assert mixture.ids(bucketed[0].positions(place)).tolist() == [i for batch in step for i in batch]
        place = bucketed[0].advance(place, 1)


@pytest.mark.parametrize("size", [8, 9, 11, 15, 16, 17])
def test_the_end_of_an_epoch_is_shared_out(size: int) -> None:
    lengths = np.full(size, 100)
    mixture = mixture_of(size)
    ranks = [
        BudgetBatches(buckets_of(mixture, 0, lengths), 250, num_replicas=4, rank=rank) for rank in range(4)
    ]  # two samples a batch
    steps = read(ranks, Place(), 6)
    ids = ids_of(steps)
    assert all(0 < len(batch) <= 2 for step in steps for batch in step)
    assert ids == mixture.ids(np.arange(len(ids))).tolist()
    # Samples that are fewer than the ranks, and all batches full: the next epoch lends some.
    one_each = [BudgetBatches(buckets_of(mixture, 0, lengths), 100, num_replicas=4, rank=rank) for rank in range(4)]
    steps = read(one_each)
    assert len(steps) == -(-size // 4) == len(one_each[0])
    assert ids_of(steps) == mixture.ids(np.arange(4 * len(steps))).tolist()


def test_a_mixture_without_end_is_cut_as_well() -> None:
    mixture = mixture_of(90, 10, shares=[Share(probability=0.5), Share(probability=0.5)], stop="never")
    ranks = budgets(mixture, 2)
    steps = read(ranks, Place(), 200)
    ids = ids_of(steps)
    # Buckets bring shares back within one sample at the end of each window.
    assert np.mean(np.array(ids[: len(ids) // 64 * 64]) < 90) == pytest.approx(0.5)
    assert ranks[0].num_steps() is None and ranks[0].advance(Place(), 200) == Place(0, len(ids))
    with pytest.raises(TypeError, match="never stops has no length"):
        len(ranks[0])


def test_what_cannot_be_cut_is_refused() -> None:
    mixture = mixture_of(50)
    with pytest.raises(
        DataError, match=r"a sample takes 1\d\d tokens, more than max_tokens=100\. Raise max_tokens, or"
    ):
        read(budgets(mixture, 1, max_tokens=100))
    with pytest.raises(DataError, match="batch_from_same_source cannot be had with bucket_size or max_tokens"):
        BucketedBatches(buckets_of(mixture_of(50, 50, block_size=4), 50), 4)
