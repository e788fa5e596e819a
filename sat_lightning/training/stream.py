"""`StreamDataModule`: shards that can only be read from their beginning, trained on without end and resumed exactly."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sat_lightning.data import PadCollate, ShardStream, StreamOptions
from sat_lightning.errors import DataError

_DEFAULT_OPTIONS = StreamOptions()


class StreamDataModule(L.LightningDataModule):
    """Remote or compressed shards, dealt to ranks and workers; local ones that can be read by number need none of this.

    Training never runs out of batches: give the trainer `max_steps`, or `limit_train_batches` for the length of its
    epochs. A checkpoint holds the number of batches trained on, and a run that is resumed from it, with the same
    ranks, workers and batch size, goes on with the very next one.

    Args:
        shards: as in `ShardStream`: paths, URLs, globs, folders or braces.
        process_fn: what makes a sample of a row, or its import path; for instance a `Tokenize`.
        collate_fn: what makes a batch of samples; default `PadCollate()`.
        batch_size: samples per rank and step.
        num_workers: processes per loader.
        validation: shards to validate on, each sample once and in the order they lie.
        options: how shards are read and shuffled.

    Raises:
        DataError: the batch size is not positive, or training would end (`num_epochs`).
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        process_fn: Callable[[Any], Any] | str | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        validation: str | Sequence[str] | None = None,
        options: StreamOptions = _DEFAULT_OPTIONS,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"data: batch_size is {batch_size}. Set it to at least 1.")
        if options.num_epochs is not None:
            raise DataError(
                f"data: num_epochs is {options.num_epochs}, but a stream is trained on without end, which keeps the "
                "ranks in step. Leave it out, and set the trainer's max_steps."
            )
        self.shards = shards
        self.process_fn = process_fn
        self.collate_fn = PadCollate() if collate_fn is None else collate_fn
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.validation = validation
        self.options = options

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches without end.

        Returns:
            The loader of this rank; each iteration of it begins with the first batch not trained on.
        """
        return _ResumedLoader(self._stream(self.shards, self.options), self._num_trained, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Every validation sample once.

        Returns:
            The loader of this rank; none without `validation`.
        """
        if self.validation is None:
            return []
        options = {**self.options.__dict__, "shuffle": False, "num_epochs": 1}
        return DataLoader(self._stream(self.validation, StreamOptions(**options)), **self._loader_options())

    def state_dict(self) -> dict[str, int]:
        """Say how much has been trained on.

        Returns:
            A few integers, the same on every rank.
        """
        return {"num_batches": self._num_trained(), **self._layout()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Check that a run can go on where a checkpoint was taken; the trainer itself knows how far it has come.

        Args:
            state_dict: what `state_dict` gave.

        Raises:
            DataError: the number of ranks or workers or the batch size is another one.
        """
        now = self._layout()
        if changed := [
            f"{name} was {state_dict[name]} and is {now[name]}" for name in now if state_dict[name] != now[name]
        ]:
            raise DataError(
                f"data: the place in a stream belongs to its ranks, workers and batch size, and {', '.join(changed)}. "
                "Resume with the same, or read local, uncompressed shards by number (open_records)."
            )

    def _layout(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "num_ranks": 1 if self.trainer is None else self.trainer.world_size,
        }

    def _num_trained(self) -> int:
        if self.trainer is None:
            return 0
        # Counted from what was trained on: loaders and the trainer fetch ahead.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return int(progress.total.processed)

    def _stream(self, shards: str | Sequence[str], options: StreamOptions) -> ShardStream:
        rank, num_ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return ShardStream(shards, options, self.process_fn, rank, num_ranks)

    def _loader_options(self) -> dict[str, Any]:
        is_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": self.collate_fn,
            "pin_memory": is_cuda,
        }


class _ResumedLoader(DataLoader[Any]):
    """A loader whose every iteration begins after the batches that have been trained on."""

    def __init__(self, stream: ShardStream, num_trained: Callable[[], int], **options: Any) -> None:  # noqa: ANN401
        super().__init__(stream, **options)
        self.stream = stream
        self.num_trained = num_trained

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Workers are started anew by every iteration, and take the place along.
        self.stream.load_state_dict(self.stream.state_after(self.num_trained(), self.batch_size or 1, self.num_workers))
        return super().__iter__()
