"""Whose turn is it: sources interleaved in exact proportions, at any position, without a history."""

import heapq
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Shares that the tree would deal less exactly are dealt by a table, if they repeat after so many turns.
_MAX_PERIOD = 10_000

# Sums of integer shares stay below 2**_SHARE_BITS, so that products can be taken piece by piece in 64 bits.
_SHARE_BITS = 50
_MAX_SEARCHED = 16


class _Split(NamedTuple):
    """An inner node: of its turns `left_share / share` go left."""

    left: "_Node"
    right: "_Node"
    left_share: int
    share: int


_Node = int | _Split


class Schedule:
    """Deal turns to sources so that after every number of turns each has its share of them, to within one turn.

    The turns are split down a fixed binary tree: of the first `p` turns of a node, `floor(p a / b + 1/2)` go to its
    left child, which holds `a / b` of the node's share; whose turn it is, and how many turns that source had before,
    follow from `p` alone. The arithmetic is exact, so it holds at turn 10**12 as at turn 10. A leaf's error is at most
    one half for each split above it, scaled by its share in the child that was split; the tree is the best one found.
    For up to four sources that is always below one turn, and for more it nearly always is. Where it is not (five or
    more sources of very different shares), and the shares repeat after up to 10000 turns, they are dealt by their
    deadlines, which keeps every source within one turn. Source: Steiner and Yeomans, "Level Schedules for Mixed-Model,
    Just-in-Time Processes" (Management Science, 1993).

    Args:
        shares: relative, positive, one for each source.
    """

    def __init__(self, shares: Sequence[Fraction | int]) -> None:
        self.shares = _to_integers([Fraction(share) for share in shares])
        self.total = sum(self.shares)
        self._root = _best_tree(self.shares)
        self._table: _Table | None = None
        if _deviation(_errors(self._root, self.shares, is_root=True)) >= 1 and self.total <= _MAX_PERIOD:
            self._table = _Table(self.shares)

    @property
    def max_deviation(self) -> float:
        """No source is ever further than this from its share of the turns.

        It is below 1 unless five sources or more, of very different shares, repeat only after more than 10000 turns;
        the largest found by search is 1.16.
        """
        if self._table is not None:
            return self._table.max_deviation
        return _deviation(_errors(self._root, self.shares, is_root=True))

    def __call__(self, turns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find whose turn it is.

        Args:
            turns: numbers of turns from 0, one dimension.

        Returns:
            The source of each turn, and how many turns that source had before.
        """
        if self._table is not None:
            return self._table(turns)
        owners = np.zeros(turns.shape, dtype=np.int64)
        indices = np.empty(turns.shape, dtype=np.int64)
        stack: list[tuple[_Node, NDArray[np.int64], NDArray[np.intp] | slice]] = [(self._root, turns, slice(None))]
        while stack:
            node, own_turns, places = stack.pop()
            if isinstance(node, int):
                owners[places], indices[places] = node, own_turns
                continue
            before = _share_of(own_turns, node.left_share, node.share)
            is_left = _share_of(own_turns + 1, node.left_share, node.share) > before
            left, right = np.flatnonzero(is_left), np.flatnonzero(~is_left)
            for child, chosen, counts in ((node.left, left, before), (node.right, right, own_turns - before)):
                if chosen.size:
                    stack.append((child, counts[chosen], chosen if isinstance(places, slice) else places[chosen]))
        return owners, indices

    def counts(self, num_turns: int) -> list[int]:
        """Count the turns of each source among the first ones.

        Args:
            num_turns: how many turns.

        Returns:
            One count for each source; together `num_turns`.
        """
        if self._table is not None:
            return self._table.counts(num_turns)
        counts = [0] * len(self.shares)
        stack: list[tuple[_Node, int]] = [(self._root, num_turns)]
        while stack:
            node, turns = stack.pop()
            if isinstance(node, int):
                counts[node] = turns
            else:
                left = (2 * turns * node.left_share + node.share) // (2 * node.share)
                stack += [(node.left, left), (node.right, turns - left)]
        return counts


class _Table:
    """The turns of one period, each dealt to the source whose deadline comes first of those whose turn has come.

    With share `a / b`, turn number `j` of a source, from 0, may come after `floor(j b / a)` turns of all, so that it is
    not a whole turn too early, and has to be among the first `ceil((j + 1) b / a)`, so that it is not too late. As the
    shares add up to one, no stretch of turns has to hold more than its length, and so all deadlines are met.
    """

    def __init__(self, shares: list[int]) -> None:
        self.shares = shares
        self.period = sum(shares)
        self._owners = np.fromiter(_deal(shares, self.period), dtype=np.int64, count=self.period)
        self._before = np.empty(self.period, dtype=np.int64)
        for source, share in enumerate(shares):
            self._before[self._owners == source] = np.arange(share)

    @property
    def max_deviation(self) -> float:
        ends, worst = np.arange(1, self.period + 1), 0
        for source, share in enumerate(self.shares):
            counts = np.cumsum(self._owners == source)
            worst = max(worst, int(np.abs(counts * self.period - ends * share).max()))
        return worst / self.period

    def __call__(self, turns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        periods, places = np.divmod(turns, self.period)
        owners = self._owners[places]
        return owners, periods * np.array(self.shares)[owners] + self._before[places]

    def counts(self, num_turns: int) -> list[int]:
        periods, rest = divmod(num_turns, self.period)
        begun = np.bincount(self._owners[:rest], minlength=len(self.shares)).tolist()
        return [periods * share + more for share, more in zip(self.shares, begun, strict=True)]


def _deal(shares: list[int], period: int) -> Iterator[int]:
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    waiting[0] = [(source, 0) for source in range(len(shares))]
    due: list[tuple[int, int, int]] = []
    for turn in range(period):
        for source, number in waiting[turn]:
            heapq.heappush(due, (-(-(number + 1) * period // shares[source]), source, number))
        _, source, number = heapq.heappop(due)
        if number + 1 < shares[source]:
            waiting[max(turn + 1, (number + 1) * period // shares[source])].append((source, number + 1))
        yield source


def _share_of(turns: NDArray[np.int64], part: int, whole: int) -> NDArray[np.int64]:
    """`floor(turns * part / whole + 1/2)`, exactly."""
    cycles, rest = np.divmod(turns, whole)
    bits = whole.bit_length()
    if 2 * bits <= 61:
        return cycles * part + (2 * rest * part + whole) // (2 * whole)
    # Long multiplication and division at once, as many bits of `part` at a time as 63 bits have room for.
    width = 61 - bits
    quotient, remainder = np.zeros_like(rest), np.zeros_like(rest)
    for shift in reversed(range(0, bits, width)):
        digit = (part >> shift) & ((1 << width) - 1)
        carried, remainder = np.divmod((remainder << width) + rest * digit, whole)
        quotient = (quotient << width) + carried
    return cycles * part + quotient + (2 * remainder >= whole)


def _to_integers(shares: list[Fraction]) -> list[int]:
    common = lcm(*(share.denominator for share in shares))
    integers = [int(share * common) for share in shares]
    divisor = gcd(*integers)
    integers = [integer // divisor for integer in integers]
    total = sum(integers)
    if total.bit_length() > _SHARE_BITS:
        # Then the proportions are off by 2**-50, one turn in 10**15.
        integers = [max(1, (integer << (_SHARE_BITS - 1)) // total) for integer in integers]
    return integers


def _errors(node: _Node, shares: list[int], is_root: bool = False) -> Iterator[tuple[int, Fraction]]:
    """Each leaf's share, and how much of the rounding errors above it reaches it, the last split's own left out."""
    if isinstance(node, int):
        yield shares[node], Fraction(0)
        return
    for child in (node.left, node.right):
        for share, error in _errors(child, shares):
            yield share, error if is_root else error + Fraction(share, node.share)


def _deviation(errors: Iterator[tuple[int, Fraction]]) -> float:
    return float((1 + max(error for _, error in errors)) / 2)


def _join(left: _Node, right: _Node, shares: list[int]) -> _Split:
    left_share, right_share = (child.share if isinstance(child, _Split) else shares[child] for child in (left, right))
    return _Split(left, right, left_share, left_share + right_share)


def _best_tree(shares: list[int]) -> _Node:
    order = sorted(range(len(shares)), key=lambda source: (-shares[source], source))
    if len(order) == 1:
        return order[0]
    trees = [_merge_smallest(order, shares), _halve(order, shares)]
    if len(order) <= _MAX_SEARCHED:
        trees.append(_search(order, shares))
    return min(trees, key=lambda tree: _deviation(_errors(tree, shares, is_root=True)))


def _merge_smallest(order: list[int], shares: list[int]) -> _Node:
    """Huffman's tree."""
    heap: list[tuple[int, int, _Node]] = [(shares[source], number, source) for number, source in enumerate(order)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        right, left = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (left[0] + right[0], number, _join(left[2], right[2], shares)))
        number += 1
    return heap[0][2]


def _halve(order: list[int], shares: list[int]) -> _Node:
    """From the top: split into two groups as equal as can be had greedily."""
    if len(order) == 1:
        return order[0]
    groups: tuple[list[int], list[int]] = ([], [])
    sums = [0, 0]
    for source in order:
        lighter = int(sums[1] < sums[0])
        groups[lighter].append(source)
        sums[lighter] += shares[source]
    return _join(_halve(groups[0], shares), _halve(groups[1], shares), shares)


def _search(order: list[int], shares: list[int]) -> _Node:
    """The best way to join neighbours in the order of size, decided from small groups to large ones."""
    best: dict[tuple[int, int], _Node] = {(start, start + 1): source for start, source in enumerate(order)}
    for length in range(2, len(order) + 1):
        for start in range(len(order) - length + 1):
            stop = start + length
            trees = [_join(best[start, middle], best[middle, stop], shares) for middle in range(start + 1, stop)]
            is_root = length == len(order)
            best[start, stop] = min(trees, key=lambda tree: _deviation(_errors(tree, shares, is_root)))  # noqa: B023
    return best[0, len(order)]
