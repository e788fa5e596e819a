"""The keyed permutation, and the order of evaluation: every row once on any number of ranks."""

import math
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from sat_lightning.data.order import PADDING_ROW, ShardedOrder, derive_key, derive_keys, permute

LENGTHS = [1, 2, 3, 10, 1000, 4097, 70000]


@pytest.mark.parametrize("length", LENGTHS)
def test_permutation_is_a_bijection(length: int) -> None:
    for key in (0, 1, 2**63, derive_key(5, 7)):
        assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


def test_permutation_differs_by_key_and_is_the_same_for_the_same_key() -> None:
    orders = [tuple(permute(np.arange(1000), 1000, key)) for key in range(20)]
    assert len(set(orders)) == 20
    assert tuple(permute(np.arange(1000), 1000, 7)) == orders[7]
    fixed_points = [int((np.array(order) == np.arange(1000)).sum()) for order in orders]
    assert sum(fixed_points) < 60  # one is expected per order


def test_permutation_needs_no_list_of_the_whole_range() -> None:
    length = 10**12
    positions = np.arange(length - 1000, length)
    rows = permute(positions, length, key=1)
    assert len(set(rows.tolist())) == 1000 and rows.min() >= 0 and rows.max() < length
    assert int(permute(length - 1, length, key=1)) == rows[-1]
    assert permute(positions.reshape(10, 100), length, key=1).shape == (10, 100)


def test_every_order_of_few_rows_is_as_likely() -> None:
    length, num_keys = 5, 2400
    counts = Counter(tuple(permute(np.arange(length), length, derive_key(key)).tolist()) for key in range(num_keys))
    expected = num_keys / math.factorial(length)
    assert len(counts) == math.factorial(length)
    # The 99.99 % point of chi-squared with 119 degrees of freedom is 184.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 184


def test_position_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positions 0 to 3 are not all in range\(3\)"):
        permute(np.arange(4), 3, key=0)


def test_each_position_may_have_a_key_of_its_own() -> None:
    epochs = np.repeat(np.arange(3), 50)
    mixed = permute(np.tile(np.arange(50), 3), 50, derive_keys(derive_key(7, 1), epochs))
    alone = [permute(np.arange(50), 50, derive_key(7, 1, epoch)) for epoch in range(3)]
    assert np.array_equal(mixed, np.concatenate(alone)) and len({tuple(order) for order in alone}) == 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 10, 4097])
def test_evaluation_is_every_row_once_padded_to_the_same_number(length: int, num_ranks: int) -> None:
    shares = [list(ShardedOrder(length, num_replicas=num_ranks, rank=rank)) for rank in range(num_ranks)]
    assert [len(share) for share in shares] == [len(ShardedOrder(length, num_replicas=num_ranks, rank=0))] * num_ranks
    rows = [row for share in shares for row in share]
    assert sorted(row for row in rows if row != PADDING_ROW) == list(range(length))
    assert len(rows) - length < num_ranks


def test_it_is_what_lightning_leaves_in_place() -> None:
    assert isinstance(ShardedOrder(3), DistributedSampler)
