"""Samples as a stream, for shards that cannot be read by number (remote, compressed), in an order that resumes exactly.

The order of one consumer (a loader worker of a rank) is a pure function of the seed and of how many samples it has
given, so its whole state is that number, and after `k` batches it follows from `k`::

    shards of epoch e    permuted by (seed, e); consumer c of n takes the shards c, c + n, ...
                         or, if there are fewer shards than consumers, every n-th sample of all of them
    samples              in blocks of `shuffle_size`, each permuted by (seed, e, c, block)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from sat_lightning.data.order import derive_key, permute
from sat_lightning.data.samples import BadSampleError, BadSamples, OnBadSample, process_sample, resolve_process
from sat_lightning.data.shards import count_samples, decode_raw, describe_raw, expand_shards, read_shard
from sat_lightning.errors import DataError


@dataclass(frozen=True)
class StreamOptions:
    """How shards are read, and in which order."""

    seed: int = 0
    """Chooses the order; every epoch has its own."""
    shuffle: bool = True
    """Permute the shards and, within blocks, the samples; False reads them as they lie."""
    shuffle_size: int = 1000
    """Samples of a block, held undecoded in memory and given in random order."""
    num_epochs: int | None = None
    """How often all is read, each sample once by one of the ranks and workers; None goes on for ever, which keeps the
    ranks of a training run in step."""
    on_bad_sample: OnBadSample = "raise"
    """What happens at a sample that cannot be decoded or processed: `raise`, or `skip`, which gives None instead."""
    max_bad_fraction: float = 0.01
    """The share of the samples that may be skipped."""
    cache_dir: str | None = None
    """Where the number of samples in each shard is kept, so that a resumed run need not read them again."""


_DEFAULT_OPTIONS = StreamOptions()


class ShardStream(IterableDataset[Any]):
    """Samples of `.tar` or `.jsonl` shards, each given once an epoch over all ranks and workers, resumed exactly.

    Args:
        shards: shards by path, URL, glob, folder or braces (`s3://bucket/{000..031}.tar`), or a list of those.
        options: how they are read.
        process: a function, or its import path, that every decoded sample goes through.
        rank: this process.
        num_ranks: how many share the stream.

    Raises:
        DataError: there are no shards, or one is of an unknown format.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        options: StreamOptions = _DEFAULT_OPTIONS,
        process: Callable[[Any], Any] | str | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if options.shuffle_size < 1:
            raise DataError(f"stream: shuffle_size is {options.shuffle_size}. Set it to at least 1.")
        self.shards = expand_shards(shards)
        self.name = self.shards[0] + (f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else "")
        self.options = options
        self.process = resolve_process(process)
        self.rank = rank
        self.num_ranks = num_ranks
        self.bad_samples = BadSamples(self.name, options.on_bad_sample, options.max_bad_fraction)
        self._state: dict[str, int] = {}
        self._position = 0

    def __iter__(self) -> Iterator[Any]:
        worker, num_workers, self._position = self._start()
        for sample in self._consumer(worker, num_workers).read(self._position):
            self._position += 1
            yield self._finish(sample)

    def state_after(self, num_batches: int, batch_size: int, num_workers: int = 0) -> dict[str, int]:
        """The state of a loader over this stream: the same on every rank, and whatever its workers have read ahead.

        Args:
            num_batches: batches the loader has given since its first, on each rank.
            batch_size: samples of each.
            num_workers: of the loader.

        Returns:
            A few integers for `load_state_dict`.
        """
        state = {"num_batches": num_batches, "batch_size": batch_size, "num_workers": max(num_workers, 1)}
        return {**state, "num_ranks": self.num_ranks}

    def state_dict(self) -> dict[str, int]:
        """Where an iteration in this process stands; of a loader with workers see `state_after`."""
        return self.state_after(self._position, 1)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let every later iteration begin where a state says.

        Args:
            state_dict: of `state_after` or `state_dict`. The loader must have the batch size and number of workers it
                names.

        Raises:
            DataError: it was saved with another number of ranks.
        """
        if state_dict["num_ranks"] != self.num_ranks:
            raise DataError(
                f"{self.name}: the position was saved with {state_dict['num_ranks']} rank(s), and this run has "
                f"{self.num_ranks}. A stream resumes on the same number; local, uncompressed shards opened with "
                "open_records resume on any."
            )
        self._state = dict(state_dict)
        self._position = state_dict["num_batches"] * state_dict["batch_size"]

    def _start(self) -> tuple[int, int, int]:
        """Which worker's part this process plays, of how many, and how many samples that part has given."""
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        if not self._state:
            return worker, num_workers, 0
        if self._state["num_workers"] != num_workers:
            raise DataError(
                f"{self.name}: the position was saved with num_workers={self._state['num_workers']}, and this loader "
                f"has {num_workers} (0 counts as 1). A stream resumes with the same number."
            )
        num_batches, batch_size = self._state["num_batches"], self._state["batch_size"]
        if self.options.num_epochs is None or num_batches == 0:
            # Batch k comes from worker k mod w, and a new loader begins with worker 0.
            worker = (worker + num_batches) % num_workers
            return worker, num_workers, (num_batches - worker + num_workers - 1) // num_workers * batch_size
        consumers = [self._consumer(one, num_workers) for one in range(num_workers)]
        given, first = _deal_batches([-(-consumer.length // batch_size) for consumer in consumers], num_batches)
        worker = (worker + first) % num_workers
        return worker, num_workers, given[worker] * batch_size

    def _consumer(self, worker: int, num_workers: int) -> "_Consumer":
        return _Consumer(self, self.rank * num_workers + worker, self.num_ranks * num_workers)

    def _finish(self, sample: Any) -> Any:  # noqa: ANN401 - what `process` makes of it
        self.bad_samples.count()
        try:
            return process_sample(self.process, decode_raw(sample), lambda: describe_raw(sample))
        except BadSampleError as error:
            self.bad_samples.handle(error)
            return None


def _deal_batches(lengths: list[int], num_batches: int) -> tuple[list[int], int]:
    """How many batches each worker has given, and whose turn is next: in turn, those that have run out left out."""
    num_rounds, left = 0, num_batches
    while left and (running := [length for length in lengths if length > num_rounds]):
        whole = min(min(running) - num_rounds, left // len(running))
        if whole == 0:
            break
        num_rounds, left = num_rounds + whole, left - whole * len(running)
    given, first = [min(length, num_rounds) for length in lengths], 0
    for worker, length in enumerate(lengths):
        if left and length > num_rounds:
            given[worker], left, first = num_rounds + 1, left - 1, (worker + 1) % len(lengths)
    return given, first


class _Consumer:
    """One of the parts that a stream is dealt into."""

    def __init__(self, stream: ShardStream, number: int, num_consumers: int) -> None:
        self.stream = stream
        self.options = stream.options
        self.number = number
        self.num_consumers = num_consumers
        has_own_shards = len(stream.shards) >= num_consumers
        self.first_shard, self.shard_step = (number, num_consumers) if has_own_shards else (0, 1)
        self.first_sample, self.sample_step = (0, 1) if has_own_shards else (number, num_consumers)

    def read(self, position: int) -> Iterator[Any]:
        """Raw samples from the one at a position of all epochs together."""
        for epoch in count():
            if self.options.num_epochs is not None and epoch >= self.options.num_epochs:
                return
            shards = self._shards(epoch)
            length = self._length_up_to(shards, position) if position else None
            if length is not None and length <= position:
                position -= length
                if length == 0:
                    self._refuse_nothing(epoch)
                continue
            num_given = 0
            for sample in self._read_epoch(epoch, shards, position):
                num_given += 1
                yield sample
            if num_given == 0 and position == 0:
                self._refuse_nothing(epoch)
            position = 0

    @property
    def length(self) -> int:
        """Samples of all epochs of a stream that ends."""
        lengths = (sum(map(self.count_samples, self._shards(epoch))) for epoch in range(self.options.num_epochs or 0))
        return sum(self._own(length) for length in lengths)

    def _refuse_nothing(self, epoch: int) -> None:
        if self.options.num_epochs is None:
            raise DataError(
                f"{self.stream.name}: consumer {self.number} of {self.num_consumers} has no sample in epoch {epoch}. "
                "Give more samples than ranks times workers, or use fewer workers."
            )

    def _shards(self, epoch: int) -> list[str]:
        shards = self.stream.shards
        mine = range(self.first_shard, len(shards), self.shard_step)
        if self.options.shuffle:
            mine = permute(list(mine), len(shards), derive_key(self.options.seed, epoch)).tolist()
        return [shards[number] for number in mine]

    def _length_up_to(self, shards: list[str], position: int) -> int | None:
        """How many samples an epoch gives this consumer; None once it is clear that they are more than `position`."""
        total = 0
        for shard in shards:
            total += self.count_samples(shard)
            if self._own(total) > position:
                return None
        return self._own(total)

    def _own(self, total: int) -> int:
        """How many of the first `total` samples of its shards are this consumer's."""
        return max(0, -(-(total - self.first_sample) // self.sample_step))

    def _read_epoch(self, epoch: int, shards: list[str], position: int) -> Iterator[Any]:
        size = self.options.shuffle_size if self.options.shuffle else 1
        samples = self._read_from(shards, self.first_sample + position // size * size * self.sample_step)
        mine = islice(samples, 0, None, self.sample_step)
        for number in count(position // size):
            block = list(islice(mine, size))
            if not block:
                return
            key = derive_key(self.options.seed, epoch, self.number, number)
            order = permute(range(len(block)), len(block), key).tolist() if self.options.shuffle else [0]
            skipped, position = position % size, 0
            yield from (block[place] for place in order[skipped:])

    def _read_from(self, shards: list[str], first: int) -> Iterator[Any]:
        """Raw samples of shards one after the other, from the one numbered `first`."""
        for shard in shards:
            if first and (length := self.count_samples(shard)) <= first:
                first -= length
                continue
            yield from self.read_shard(shard, first)
            first = 0

    def read_shard(self, shard: str, first: int) -> Iterator[Any]:
        """Raw samples of one shard; if the rest of it is lost, that counts as one bad sample."""
        try:
            yield from read_shard(shard, first, self.options.cache_dir)
        except BadSampleError as error:
            self.stream.bad_samples.handle(error)

    def count_samples(self, shard: str) -> int:
        """Samples in a shard, lost ones left out."""
        try:
            return count_samples(shard, self.options.cache_dir)
        except BadSampleError:
            return sum(1 for _ in self.read_shard(shard, 0))
