"""Samples of similar length side by side, and batches by a budget of tokens: both functions of seed and position."""

from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.batches import Place, ShardedBatches
from sat_lightning.data.mixture import Mixture
from sat_lightning.data.order import derive_key
from sat_lightning.errors import DataError

LengthsOf = Callable[[NDArray[np.int64]], NDArray[np.int64]]

_NUM_CACHED_BLOCKS = 16
_NUM_CACHED_STEPS = 4096
_BLOCK_SIZE = 8192


class Buckets:
    """A mixture's stream with the samples of each window brought into an order in which neighbours are alike in length.

    A window is `window_size` consecutive positions of one epoch. Its samples lie in a circle, down in length and up
    again, entered at a place of its own: so what one step deals to many ranks is of similar length, and lengths go up
    and down in training rather than always down. What lies at a position follows from seed and position alone.

    Args:
        mixture: the stream.
        lengths_of: tokens of the samples with these ids.
        window_size: samples brought into order together; up to 1 leaves the stream as it is.
    """

    def __init__(self, mixture: Mixture, lengths_of: LengthsOf, window_size: int) -> None:
        self.mixture = mixture
        self.window_size = max(window_size, 1)
        self._lengths_of = lengths_of
        # Whole windows, enough of them to be looked up at once.
        self._block_size = -(-_BLOCK_SIZE // self.window_size) * self.window_size
        self._block = lru_cache(_NUM_CACHED_BLOCKS)(self._read_block)

    def positions(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find which samples come at places of the new order.

        Args:
            slots: consecutive places, ascending.

        Returns:
            Their positions in the mixture.
        """
        return self._gather(0, int(slots[0]), int(slots[-1]) + 1) if slots.size else slots

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Find the samples at places of the new order.

        Args:
            start: first place.
            stop: after the last.

        Returns:
            Their ids.
        """
        return self._gather(1, start, stop)

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tell how long the samples at places of the new order are.

        Args:
            start: first place.
            stop: after the last.

        Returns:
            Tokens of each.
        """
        return self._gather(2, start, stop)

    def _gather(self, what: int, start: int, stop: int) -> NDArray[np.int64]:
        parts = []
        while start < stop:
            first, last = self._bounds(start)
            parts.append(self._block(first, last)[what][start - first : stop - first])
            start = last
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _bounds(self, slot: int) -> tuple[int, int]:
        """The block that a place lies in; none reaches into another epoch."""
        size, block = self.mixture.epoch_size, self._block_size
        base = 0 if size is None else slot - slot % size
        first = base + (slot - base) // block * block
        return first, first + block if size is None else min(first + block, base + size)

    def _read_block(self, first: int, last: int) -> tuple[NDArray[np.int64], ...]:
        positions = np.arange(first, last)
        ids = self.mixture.ids(positions)
        lengths = self._lengths_of(ids)
        if self.window_size > 1:
            windows = range(0, last - first, self.window_size)
            order = np.concatenate([w + self._order(lengths[w : w + self.window_size], first + w) for w in windows])
            positions, ids, lengths = positions[order], ids[order], lengths[order]
        return positions, ids, lengths

    def _order(self, lengths: NDArray[np.int64], first: int) -> NDArray[np.intp]:
        falling = np.argsort(-lengths, kind="stable")
        circle = np.concatenate((falling[::2], falling[1::2][::-1]))
        return np.roll(circle, -(derive_key(self.mixture.seed, first) % len(circle)))


class BucketedBatches(ShardedBatches):
    """`ShardedBatches` of a stream in which neighbours are alike in length.

    Args:
        buckets: the stream.
        batch_size: samples per rank and step.
        num_replicas: number of ranks.
        rank: this process, from 0.
        drop_last: leave out the shorter last step of an epoch.
    """

    def __init__(
        self, buckets: Buckets, batch_size: int, *, num_replicas: int = 1, rank: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(buckets.mixture, batch_size, num_replicas=num_replicas, rank=rank, drop_last=drop_last)
        self.buckets = buckets
        if buckets.mixture.block_size > 1:
            raise DataError(
                "data: batch_from_same_source cannot be had with bucket_size or max_tokens, which put samples together "
                "by their length. Keep one of them."
            )

    def arrange(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find which samples come at places of the order that is trained on.

        Args:
            slots: consecutive places.

        Returns:
            Positions in the mixture.
        """
        return self.buckets.positions(slots)


class BudgetBatches(BucketedBatches):
    """Batches of as many samples as fit a number of tokens once they are padded to their longest.

    The stream is cut batch after batch, and a step deals the next ones to the ranks, one each; so the place of a run is
    still one position, on any ranks. What is left at the end of an epoch is divided into smaller batches, so that every
    rank gets one; only samples fewer than the ranks, which cannot be, are joined by the first of the next epoch.

    An epoch of the trainer has as many steps as the first epoch of the data. Those of later epochs may be a few more or
    fewer, as other samples meet: then the trainer's epochs end a little before or after the data's, and nothing else.

    Args:
        buckets: the stream, and the lengths in it.
        max_tokens: rows times padded length of a batch, at most.
        batch_size: what strategies are told that want a number.
        multiple_of: what the padded length is rounded up to.
        num_replicas: number of ranks.
        rank: this process, from 0.
    """

    def __init__(
        self,
        buckets: Buckets,
        max_tokens: int,
        *,
        batch_size: int = 1,
        multiple_of: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(buckets, 1, num_replicas=num_replicas, rank=rank)
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.multiple_of = multiple_of
        self._step = lru_cache(_NUM_CACHED_STEPS)(self._cut_step)
        self._trail: tuple[Place, array[int]] = (Place(), array("q", [0]))
        self._epoch_lengths: dict[int, int] = {}

    def num_steps(self, position: int = 0, epoch: int = 0) -> int | None:
        """Count the steps from a place to the end of its epoch, by making them.

        Args:
            position: samples of the epoch gone through.
            epoch: which epoch.

        Returns:
            Their number; None if an epoch never ends.
        """
        size = self.mixture.epoch_size
        if size is None:
            return None
        start = slot = epoch * size + position
        if start not in self._epoch_lengths:
            count = 0
            while slot < (epoch + 1) * size:
                slot, count = self._step(slot)[-1], count + 1
            self._epoch_lengths[start] = count
        return self._epoch_lengths[start]

    def advance(self, place: Place, num_steps: int) -> Place:
        """Find where a run stands some steps further.

        Args:
            place: where it stood.
            num_steps: steps made since.

        Returns:
            The new place.
        """
        if self._trail[0] != place:
            self._trail = (place, array("q", [self._slot(place)]))
        slots = self._trail[1]
        while len(slots) <= num_steps:
            slots.append(self._step(slots[-1])[-1])
        return self._place(slots[num_steps])

    def positions(self, place: Place) -> NDArray[np.int64]:
        """Find the samples of a step, over all ranks.

        Args:
            place: before the step.

        Returns:
            Positions in the mixture.
        """
        slot = self._slot(place)
        return self.arrange(np.arange(slot, self._step(slot)[-1]))

    def __iter__(self) -> Iterator[list[int]]:
        run = self._next
        slot, left = self._slot(run.place), run.num_steps
        if left is None:
            left = self.num_steps(run.place.position, run.place.epoch)
        while left is None or left > 0:
            ends = self._step(slot)
            first = ends[self.rank - 1] if self.rank else slot
            yield self.buckets.ids(first, ends[self.rank]).tolist()
            slot, left = ends[-1], None if left is None else left - 1

    def _slot(self, place: Place) -> int:
        return place.epoch * (self.mixture.epoch_size or 0) + place.position

    def _place(self, slot: int) -> Place:
        size = self.mixture.epoch_size
        return Place(0, slot) if size is None else Place(*divmod(slot, size))

    def _cut_step(self, slot: int) -> list[int]:
        """Where the batch of each rank ends, of the step at a place."""
        size, ranks = self.mixture.epoch_size, self.num_replicas
        if size is None:
            return self._fill(slot, None)
        stop = (slot // size + 1) * size
        ends = self._fill(slot, stop)
        if 0 < stop - ends[-1] < ranks and stop - slot >= 2 * ranks:
            stop -= ranks  # the last step of the epoch needs a sample for each rank
            ends = self._fill(slot, stop)
        if len(ends) < ranks:
            is_enough = ends[-1] - slot >= ranks
            ends = _split(slot, ends, ranks) if is_enough else list(range(slot + 1, slot + ranks + 1))
        return ends

    def _fill(self, slot: int, stop: int | None) -> list[int]:
        """Full batches, one for each rank, or fewer at the end."""
        ends: list[int] = []
        while len(ends) < self.num_replicas and (stop is None or slot < stop):
            slot = self._fill_one(slot, stop)
            ends.append(slot)
        return ends

    def _fill_one(self, slot: int, stop: int | None) -> int:
        most = max(1, self.max_tokens // int(self._pad(self.buckets.lengths(slot, slot + 1))[0])) + 1
        reach = slot + most if stop is None else min(slot + most, stop)
        padded = self._pad(np.maximum.accumulate(self.buckets.lengths(slot, reach)))
        fits = padded * np.arange(1, reach - slot + 1) <= self.max_tokens
        num_samples = reach - slot if fits.all() else int(fits.argmin())
        if num_samples == 0:
            raise DataError(
                f"data: a sample takes {int(padded[0])} tokens, more than max_tokens={self.max_tokens}. Raise "
                "max_tokens, or cut samples off when they are tokenized."
            )
        return slot + num_samples

    def _pad(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = np.maximum(lengths, 1)
        return -(-lengths // self.multiple_of) * self.multiple_of


def _split(start: int, ends: list[int], num_batches: int) -> list[int]:
    """Halve the largest batches until there are enough; no half holds more than the whole did."""
    bounds = [start, *ends]
    while len(bounds) <= num_batches:
        sizes = np.diff(bounds)
        largest = int(sizes.argmax())
        bounds.insert(largest + 1, bounds[largest] + int(sizes[largest]) // 2)
    return bounds[1:]
