"""The stream of a mixture cut into batches, epoch by epoch, and dealt to ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from sat_lightning.data.mixture import Mixture
from sat_lightning.errors import DataError

_CHUNK_SIZE = 4096


class Place(NamedTuple):
    """Where a run stands, on any number of ranks: nothing before it is left over, nothing after it was seen."""

    epoch: int = 0
    """Epochs of the mixture gone through."""
    position: int = 0
    """Samples of this epoch gone through, over all ranks."""


@dataclass
class _Run:
    """What the next iteration is to yield."""

    place: Place = Place()
    num_steps: int | None = None


class ShardedBatches(DistributedSampler):
    """The batches of one rank: consecutive positions make a step, and each rank takes its part of them.

    A step holds the same samples whatever the number of ranks it is shared by. No sample of an epoch is lost and none
    repeated: the last step is shorter, and if it had less than one sample per rank, it is joined to the step before.
    (Only what a resumed run finds left of an epoch that is less than one sample for each of its ranks is left out.)
    It is a `DistributedSampler` so that trainers see that it shards by itself and do not wrap it a second time.

    Args:
        mixture: the stream; one source is a mixture too.
        batch_size: samples per rank and step.
        num_replicas: number of ranks.
        rank: this process, from 0.
        drop_last: leave out the shorter last step of an epoch, for batches that are all of one shape.

    Raises:
        DataError: an epoch has less than one step.
    """

    def __init__(
        self, mixture: Mixture, batch_size: int, *, num_replicas: int = 1, rank: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(range(0), num_replicas, rank, seed=mixture.seed)  # type: ignore[arg-type]
        self.mixture = mixture
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.step_size = batch_size * num_replicas
        self._next = _Run()
        size = mixture.epoch_size
        if size is not None and size < self.step_size:
            raise DataError(
                f"data: an epoch of {', '.join(mixture.names)} has {size} training rows, and one step takes "
                f"{self.step_size} (batch_size={batch_size} on {num_replicas} rank(s)). Give more data, or lower "
                "batch_size; of text, a lower sequence_length makes more rows."
            )

    def num_steps(self, position: int = 0, epoch: int = 0) -> int | None:
        """Count the steps of an epoch from a position on.

        Args:
            position: samples of the epoch gone through.
            epoch: which epoch; all are alike here.

        Returns:
            Their number; None if an epoch never ends.
        """
        if self.mixture.epoch_size is None:
            return None
        full, rest = divmod(max(0, self.mixture.epoch_size - position), self.step_size)
        return full + int(not self.drop_last and rest > 0 and self._can_share(rest))

    def advance(self, place: Place, num_steps: int) -> Place:
        """Find where a run stands some steps further.

        Args:
            place: where it stood.
            num_steps: steps made since.

        Returns:
            The new place; at the end of an epoch that is the beginning of the next.
        """
        while (left := self.num_steps(place.position)) is not None and num_steps >= left:
            place, num_steps = Place(place.epoch + 1), num_steps - left
        return place._replace(position=place.position + num_steps * self.step_size)

    def positions(self, place: Place) -> NDArray[np.int64]:
        """Find the samples of a step, over all ranks.

        Args:
            place: before the step.

        Returns:
            Positions in the mixture.
        """
        start = self._base(place) + place.position
        return self.arrange(np.arange(start, start + self._size_at(place.position)))

    def arrange(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find which samples come at places of the order that is trained on: here, that of the mixture.

        Args:
            slots: places.

        Returns:
            Positions in the mixture.
        """
        return slots

    def start_at(self, place: Place, num_steps: int | None = None) -> None:
        """Say where the next iteration starts.

        Args:
            place: where.
            num_steps: how many steps it has, into later epochs if need be. Default: the rest of the epoch.
        """
        self._next = _Run(place, num_steps)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of an epoch, unless it is the one it was told to start in."""
        if epoch != self._next.place.epoch:
            self.start_at(Place(epoch))

    def __len__(self) -> int:
        num_steps = self.num_steps()
        if num_steps is None:
            raise TypeError("a mixture that never stops has no length")
        return num_steps

    def __iter__(self) -> Iterator[list[int]]:
        place, left = self._next.place, self._next.num_steps
        if left is None:
            left = self.num_steps(place.position)
        steps_at_once = max(1, _CHUNK_SIZE // self.batch_size)
        while left is None or left > 0:
            in_epoch = self.num_steps(place.position)
            wanted = min(n for n in (left, in_epoch, steps_at_once) if n is not None)
            if wanted:
                yield from self._read(place, wanted)
            place = self.advance(place, wanted)
            left = None if left is None else left - wanted

    def _read(self, place: Place, num_steps: int) -> Iterator[list[int]]:
        """Look up this rank's part of steps that follow each other in one epoch."""
        bounds = []
        for start in range(place.position, place.position + num_steps * self.step_size, self.step_size):
            first, last = self._part(self._size_at(start))
            bounds.append((self._base(place) + start + first, last - first))
        positions = np.concatenate([self.arrange(np.arange(start, start + size)) for start, size in bounds])
        ids = self.mixture.ids(positions).tolist()
        start = 0
        for _, size in bounds:
            yield ids[start : start + size]
            start += size

    def _base(self, place: Place) -> int:
        return place.epoch * (self.mixture.epoch_size or 0)

    def _size_at(self, position: int) -> int:
        """How many samples the step at a position of an epoch has."""
        if self.mixture.epoch_size is None:
            return self.step_size
        rest = self.mixture.epoch_size - position
        tail = rest - self.step_size
        if 0 < tail < self.num_replicas and not self.drop_last and self.mixture.block_size == 1:
            return rest
        return min(rest, self.step_size)

    def _can_share(self, num_samples: int) -> bool:
        """Whether every rank gets a sample of a step."""
        if self.mixture.block_size == 1:
            return num_samples >= self.num_replicas
        parts = [self._part(num_samples, rank) for rank in range(self.num_replicas)]
        return all(first < last for first, last in parts)

    def _part(self, num_samples: int, rank: int | None = None) -> tuple[int, int]:
        """The samples of a step that a rank takes, where batches are of one source never from two blocks."""
        rank = self.rank if rank is None else rank
        block, ranks = self.mixture.block_size, self.num_replicas
        if block == 1 or num_samples == self.step_size or num_samples < block:
            return num_samples * rank // ranks, num_samples * (rank + 1) // ranks
        # Fewer blocks than ranks: neighbours share one.
        num_blocks = num_samples // block
        own = rank * num_blocks // ranks
        first = -(-own * ranks // num_blocks)
        sharers = -(-(own + 1) * ranks // num_blocks) - first
        return own * block + block * (rank - first) // sharers, own * block + block * (rank - first + 1) // sharers
