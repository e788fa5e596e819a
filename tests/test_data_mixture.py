"""Mixtures: exact shares at every prefix, every row once an epoch, one order on any ranks, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sat_lightning.data.batches import Place, ShardedBatches
from sat_lightning.data.corpus import mix
from sat_lightning.data.entries import WeightedPath, list_sources
from sat_lightning.data.mixed import MixedRows, OrderedRows
from sat_lightning.data.mixture import Mixture, Share
from sat_lightning.data.schedule import Schedule
from sat_lightning.errors import DataError


def shares_of(kind: str, *amounts: float) -> list[Share]:
    return [Share(**{kind: amount}) for amount in amounts]


def counts_at_every_prefix(owners: np.ndarray, num_sources: int) -> np.ndarray:
    """How many of each source before each position: [positions + 1, sources]."""
    return np.concatenate([np.zeros((1, num_sources)), np.cumsum(owners[:, None] == np.arange(num_sources), axis=0)])


class Numbers(Dataset):
    """Rows that are their own number, of different lengths."""

    def __init__(self, size: int, length: int = 10, name: str = "numbers") -> None:
        self.size, self.length, self.name = size, length, name

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.size
        return {"id": torch.tensor(index), "target_ids": torch.full((2,), index)}

    def num_tokens(self, index: int) -> int:
        return self.length + index % 3 - 1


@pytest.mark.parametrize("amounts", [(9, 1), (3, 1, 1), (1,) * 8, (1000, 100, 7), (5, 4, 3, 2, 1), (1, 1)])
def test_shares_are_exact_at_every_prefix(amounts: tuple[int, ...]) -> None:
    schedule = Schedule(amounts)
    turns = np.arange(3 * sum(amounts))
    owners, before = schedule(turns)
    counts = counts_at_every_prefix(owners, len(amounts))
    wanted = np.arange(len(turns) + 1)[:, None] * np.array(amounts) / sum(amounts)
    assert np.abs(counts - wanted).max() <= schedule.max_deviation < 1
    assert np.array_equal(before, counts[turns, owners])
    assert counts[sum(amounts)].tolist() == list(amounts)
    assert schedule.counts(1234) == counts_at_every_prefix(schedule(np.arange(1234))[0], len(amounts))[-1].tolist()


def test_shares_of_many_uneven_sources_stay_near() -> None:
    draw = np.random.default_rng(0)
    for num_sources in (6, 12, 40):
        amounts = draw.integers(1, 1000, num_sources).tolist()
        owners, _ = (schedule := Schedule(amounts))(np.arange(5000))
        wanted = np.arange(5001)[:, None] * np.array(amounts) / sum(amounts)
        deviation = np.abs(counts_at_every_prefix(owners, num_sources) - wanted).max()
        assert deviation <= schedule.max_deviation < 1.2


UNEVEN = [[1272, 658, 88, 64, 1], [1259, 357, 279, 163, 129, 1], [1433, 378, 335, 132, 99, 29, 1], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize("seed", range(30))
def test_uneven_sources_that_repeat_are_within_one_sample(seed: int) -> None:
    draw = np.random.default_rng(seed)
    amounts = UNEVEN[seed] if seed < len(UNEVEN) else (1 + 900 * draw.random(draw.integers(2, 10)) ** 5).astype(int)
    schedule = Schedule([int(amount) for amount in amounts])
    period = schedule.total
    owners, before = schedule(np.arange(2 * period))
    counts = counts_at_every_prefix(owners, len(amounts))
    wanted = np.arange(2 * period + 1)[:, None] * np.array(schedule.shares) / period
    assert np.abs(counts - wanted).max() <= schedule.max_deviation + 1e-9 < 1
    assert np.array_equal(before, counts[np.arange(2 * period), owners])
    for turn in (0, 1, period - 1, period, period + 1, 2 * period):
        assert schedule.counts(turn) == counts[turn].tolist()
    far = 10**12 // period * period
    assert np.array_equal(schedule(far + np.arange(period))[0], owners[:period])
    assert schedule.counts(far + 1)[0] == far // period * schedule.shares[0] + counts[1][0]


def test_some_uneven_sources_need_the_table() -> None:
    tables = [Schedule(amounts)._table is not None for amounts in UNEVEN]
    assert any(tables) and Schedule([9, 1])._table is None
    long = Schedule([amount * 1009 + 1 for amount in UNEVEN[0]])  # repeats too late for one
    assert long._table is None and 1 < long.max_deviation < 1.25


@pytest.mark.parametrize("start", [10**9, 10**12, 10**15])
@pytest.mark.parametrize("amounts", [[9, 1], [10**12 + 39, 10**11 + 3, 7], [Fraction("0.1"), Fraction(1, 3)]])
def test_far_positions_are_as_exact_as_near_ones(start: int, amounts: list) -> None:
    schedule = Schedule(amounts)
    total = sum(Fraction(amount) for amount in amounts)
    owners, before = schedule(np.arange(start, start + 50))
    for turn in range(0, 50, 7):
        counts = schedule.counts(start + turn)
        assert sum(counts) == start + turn and counts[owners[turn]] == before[turn]
        for count, amount in zip(counts, amounts, strict=True):
            assert abs(count - (start + turn) * Fraction(amount) / total) < 1


@pytest.mark.parametrize(
    ("kind", "amounts", "sizes", "stop", "epoch"),
    [
        ("weight", (1, 1, 1), (1000, 100, 7), None, [1000, 100, 7]),
        ("weight", (0.5, 1, 3), (1000, 100, 7), None, [500, 100, 21]),
        ("weight", (0.5,), (1000,), None, [500]),
        ("probability", (0.9, 0.1), (1000, 1000), "first_exhausted", [1000, 111]),
        ("probability", (0.9, 0.1), (1000, 1000), "all_exhausted", [8996, 1000]),
        ("probability", (3, 1, 1), (1000, 100, 7), "first_exhausted", [22, 7, 7]),
        ("probability", (3, 1, 1), (1000, 100, 7), "all_exhausted", [1000, 333, 333]),
        ("probability", (3, 1, 1), (1000, 100, 7), "never", None),
    ],
)
def test_an_epoch_holds_what_was_asked_for(kind: str, amounts: Any, sizes: Any, stop: Any, epoch: Any) -> None:
    mixture = Mixture(sizes, shares_of(kind, *amounts), stop=stop)
    if epoch is None:
        assert mixture.epoch_size is None and mixture.counts(5000) == [3000, 1000, 1000]
        return
    counts = mixture.counts(mixture.epoch_size)
    assert counts == pytest.approx(epoch, abs=1)
    owners, rows = mixture(np.arange(mixture.epoch_size))
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        # Each row as often as any other, to within one: own epochs follow each other.
        seen = np.bincount(rows[owners == source], minlength=size)
        assert seen.sum() == count and seen.max() - seen.min() <= 1
        if stop == "first_exhausted":
            assert seen.max() <= 1
        if stop == "all_exhausted":
            assert seen.min() >= 1
    assert mixture.epochs(mixture.epoch_size) == [count / size for count, size in zip(counts, sizes, strict=True)]


def test_a_fraction_is_no_first_half_and_takes_the_other_half_next() -> None:
    mixture = Mixture([1000, 10], shares_of("weight", 0.5, 1))
    halves = []
    for epoch in range(2):
        owners, rows = mixture(np.arange(epoch * 510, (epoch + 1) * 510))
        halves.append(set(rows[owners == 0].tolist()))
        assert len(halves[-1]) == 500 and sorted(rows[owners == 1].tolist()) == list(range(10))
    assert halves[0] | halves[1] == set(range(1000)) and not halves[0] & halves[1]
    assert 200 < len([row for row in halves[0] if row < 500]) < 300


def test_order_is_a_function_of_seed_and_position() -> None:
    sizes = [500, 60, 3]
    ids = Mixture(sizes, seed=1).ids(np.arange(3 * 563))
    epochs = [ids[start : start + 563].tolist() for start in (0, 563, 1126)]
    assert all(sorted(epoch) == list(range(563)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Mixture(sizes, seed=1).ids([1600, 7]).tolist() == [ids[1600], ids[7]]
    assert Mixture(sizes, seed=2).ids(np.arange(563)).tolist() != epochs[0]


def test_sources_without_a_probability_share_the_rest_by_size() -> None:
    mixture = Mixture([100, 300, 5], [Share(), Share(), Share(probability=0.2)])
    assert mixture.requested == [Fraction(1, 5), Fraction(3, 5), Fraction(1, 5)]


def test_shares_by_tokens_count_tokens() -> None:
    rows = MixedRows([Numbers(900, 100, "long"), Numbers(900, 10, "short")])
    sources = [WeightedPath(".", "long", tokens=1), WeightedPath(".", "short", tokens=1)]
    mixture = mix(sources, rows, "first_exhausted", seed=0)
    owners, numbers = mixture(np.arange(mixture.epoch_size))
    tokens = np.array([rows.sources[k].num_tokens(n) for k, n in zip(owners, numbers, strict=True)])
    for prefix in (200, 500, mixture.epoch_size):
        of_long = tokens[:prefix][owners[:prefix] == 0].sum()
        assert abs(of_long - tokens[:prefix].sum() / 2) <= 102  # a sample of the long ones
    assert [float(share) for share in mixture.requested] == pytest.approx([1 / 11, 10 / 11])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [(97,), (40, 13), (1000, 100, 7), (6, 7)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_epoch_is_each_row_once_on_any_ranks(num_ranks: int, sizes: tuple[int, ...], batch_size: int) -> None:
    mixture = Mixture(sizes, seed=3)
    for epoch in range(2):
        ranks = []
        for rank in range(num_ranks):
            batches = ShardedBatches(mixture, batch_size, num_replicas=num_ranks, rank=rank)
            batches.set_epoch(epoch)
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches) == len(ranks[0])
            assert all(batch for batch in ranks[-1])
        ids = [i for step in zip(*ranks, strict=True) for batch in step for i in batch]
        assert sorted(ids) == list(range(sum(sizes)))
        assert ids == mixture.ids(np.arange(epoch * sum(sizes), (epoch + 1) * sum(sizes))).tolist()


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_workers_play_no_part(num_workers: int) -> None:
    rows = MixedRows([Numbers(40), Numbers(13)])
    batches = ShardedBatches(Mixture([40, 13]), 4)
    loader = DataLoader(rows, batch_sampler=batches, num_workers=num_workers)
    seen = [batch["id"].tolist() for batch in loader]
    starts = [0, 40]
    expected = [[i - starts[i >= 40] for i in batch] for batch in batches]
    assert seen == expected and len(seen) == 14 and len(seen[-1]) == 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 3)])
def test_batches_continue_where_others_stopped(before: int, after: int, drop_last: bool) -> None:
    mixture = Mixture([83, 20])

    def read(num_ranks: int, place: Place, num_steps: int) -> list[int]:
        ranks = []
        for rank in range(num_ranks):
            batches = ShardedBatches(mixture, 3, num_replicas=num_ranks, rank=rank, drop_last=drop_last)
            batches.start_at(place, num_steps)
            ranks.append(list(batches))
        return [i for step in zip(*ranks, strict=True) for batch in step for i in batch]

    first = ShardedBatches(mixture, 3, num_replicas=before, drop_last=drop_last)
    place = first.advance(Place(), 5)
    assert place == Place(0, 15 * before)
    # The last of five steps is in the next epoch; what an epoch leaves out is no part of this test.
    seen = read(before, Place(), 5) + read(after, place, 3 if drop_last else 5)
    assert seen == mixture.ids(np.arange(len(seen))).tolist()
    assert first.advance(Place(2), 2 * len(first)) == Place(4)


def test_what_is_left_for_fewer_than_all_ranks_is_passed_over() -> None:
    batches = ShardedBatches(Mixture([103]), 2, num_replicas=3)
    batches.start_at(Place(0, 101), 2)
    assert list(batches) == [batches.mixture.ids(range(start, start + 2)).tolist() for start in (103, 109)]


def test_batches_without_an_end_have_no_length() -> None:
    batches = ShardedBatches(Mixture([5, 3], shares_of("probability", 1, 1), stop="never"), 2, num_replicas=2, rank=1)
    with pytest.raises(TypeError, match="a mixture that never stops has no length"):
        len(batches)
    batches.start_at(Place(0, 10**12), 3)
    expected = batches.mixture.ids(np.arange(10**12, 10**12 + 12)).reshape(3, 2, 2)[:, 1].tolist()
    assert list(batches) == expected
    assert batches.advance(Place(0, 8), 2) == Place(0, 16)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_batches_of_one_source(num_ranks: int) -> None:
    sizes, shares = [97, 50, 9], shares_of("probability", 0.6, 0.3, 0.1)
    mixture = Mixture(sizes, shares, stop="all_exhausted", block_size=4)
    ranks = [list(ShardedBatches(mixture, 4, num_replicas=num_ranks, rank=rank)) for rank in range(num_ranks)]
    starts = np.cumsum([0, *sizes])
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(len(set(np.searchsorted(starts, batch, side="right"))) == 1 for batch in batches)
    assert [i for batch in batches for i in batch] == mixture.ids(np.arange(mixture.epoch_size)).tolist()
    owners, _ = mixture(np.arange(mixture.epoch_size))
    wanted = np.arange(len(owners) + 1)[:, None] * np.array([0.6, 0.3, 0.1])
    assert np.abs(counts_at_every_prefix(owners, 3) - wanted).max() <= mixture.max_deviation < 4


@pytest.mark.parametrize("size", [10**6, 10**9, 10**12])
def test_a_source_of_any_size_costs_no_list(size: int) -> None:
    mixture = Mixture([size, size // 10], shares_of("weight", 1, 2))
    start = mixture.epoch_size * 3 // 2
    owners, rows = mixture(np.arange(start, start + 1000))
    assert len({(k, n) for k, n in zip(owners.tolist(), rows.tolist(), strict=True)}) == 1000
    assert ShardedBatches(mixture, 8).num_steps() == math.ceil(mixture.epoch_size / 8)


def test_rows_of_many_sources_come_in_the_order_asked_for() -> None:
    rows = MixedRows([Numbers(10), PlainRows(), Numbers(5)])
    assert [int(sample["id"]) for sample in rows.__getitems__([17, 3, 10, 12, 0])] == [4, 3, 100, 102, 0]
    assert len(rows) == 18 and int(rows[13]["id"]) == 0
    padding = rows[-1]
    assert int(padding["id"]) == 0 and padding["target_ids"].tolist() == [-100, -100]
    ordered = OrderedRows(rows, mixture := Mixture([10, 3, 5]), length=0)
    assert len(ordered) == 18 and int(ordered[4]["id"]) == int(rows[int(mixture.ids([4])[0])]["id"])


class PlainRows:
    """What a user's own source may be at least."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"id": 100 + index}


def test_what_cannot_be_padded_is_refused() -> None:
    with pytest.raises(DataError, match=r"a dict without target_ids cannot be padded, and the rows do not"):
        MixedRows([PlainRows()])[-1]


def test_a_list_of_paths_is_one_source_and_a_weighted_one_a_mixture() -> None:
    assert list_sources(["a.txt", "b.txt"]) == [WeightedPath(["a.txt", "b.txt"], "a")]
    assert list_sources("stdlib://") == [WeightedPath("stdlib://", "stdlib")]
    entries = [{"path": "x/a.txt", "weight": 0.5}, "y/a.txt", WeightedPath(["b.bin", "c.bin"], "mine", probability=0.1)]
    assert [(source.name, source.path) for source in list_sources(entries)] == [
        ("a", "x/a.txt"),
        ("a-2", "y/a.txt"),
        ("mine", ["b.bin", "c.bin"]),
    ]
    with pytest.raises(DataError, match=r"a source of path has no field 'wieght', only .* Did you mean 'weight'\?"):
        list_sources([{"path": "a.txt", "wieght": 1}])
    with pytest.raises(DataError, match=r"data: weight of a source of path is 'much'\. Give a number above 0\."):
        list_sources([{"path": "a.txt", "weight": "much"}])
    with pytest.raises(
        DataError, match=r"a source has no path: WeightedPath\(path='', name=None, weight=1, .* Say where its data is"
    ):
        list_sources([{"weight": 1}])


BAD = [
    ([10, 0], None, "mixture: source 1 is empty: it has 0 samples. Give it data, or remove it."),
    ([10, 5], shares_of("weight", 1, 0), "mixture: the weight of source 1 is 0. Give a number above 0, or remove"),
    ([10, 5], shares_of("weight", math.nan, 1), "mixture: the weight of source 0 is nan. Give a number above 0"),
    ([10, 5], shares_of("probability", 1, math.inf), "mixture: the probability of source 1 is inf. Give a number"),
    ([10, 5], shares_of("tokens", -1, 1), "mixture: the tokens of source 0 is -1. Give a number above 0"),
    ([10, 5], shares_of("weight", 1), "mixture: 1 shares and 2 names for 2 sources. Give each source one."),
    ([10, 5], [Share(tokens=1), Share()], "mixture: some sources have tokens and some have not."),
    ([10, 5], [Share(probability=1), Share()], "mixture: the probabilities given sum to 1.0, which leaves nothing"),
    ([10, 5], [Share(probability=0.5, weight=1), Share()], "mixture: a source has both weight and probability."),
    ([10, 5], shares_of("tokens", 1, 1), "mixture: shares by tokens need the mean tokens per sample"),
    ([], None, "mixture: there is no source. Give at least one."),
]


@pytest.mark.parametrize(("sizes", "shares", "message"), BAD)
def test_bad_mixture_is_refused(sizes: list[int], shares: Any, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        Mixture(sizes, shares)
    assert message in str(refusal.value)


def test_source_that_does_not_tell_its_tokens_is_refused() -> None:
    sources = [WeightedPath(".", name, tokens=1) for name in "ab"]
    with pytest.raises(DataError, match=r"data: PlainRows does not tell how many tokens a row has, which shares by"):
        mix(sources, MixedRows([PlainRows(), PlainRows()]), None, seed=0)
