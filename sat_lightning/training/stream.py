"""`StreamDataModule`: shards that can only be read from their beginning, trained on without end and resumed exactly."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from sat_lightning.data import PadCollate, ShardStream, StreamOptions
from sat_lightning.errors import DataError
from sat_lightning.training.progress import count_unfinished, shift_counts

_DEFAULT_OPTIONS = StreamOptions()


class StreamDataModule(L.LightningDataModule):
    """Remote or compressed shards, dealt to ranks and workers; local ones that can be read by number need none of this.

    Training never runs out of batches: give the trainer `max_steps`, or `limit_train_batches` for the length of its
    epochs. On one rank `num_epochs` may end it, when every worker has given all of its samples. A checkpoint holds the
    number of batches up to the last optimizer step, and a run that is resumed from it, with the same ranks, workers and
    batch size, goes on with the very next one.

    Args:
        shards: as in `ShardStream`: paths, URLs, globs, folders or braces.
        process_fn: what makes a sample of a row, or its import path; for instance a `Tokenize`.
        collate_fn: what makes a batch of samples; default `PadCollate()`.
        batch_size: samples per rank and step.
        num_workers: processes per loader.
        validation: shards to validate on, each sample once and in the order they lie.
        options: how shards are read and shuffled.

    Raises:
        DataError: the batch size is not positive.
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
        self.shards = shards
        self.process_fn = process_fn
        self.collate_fn = PadCollate() if collate_fn is None else collate_fn
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.validation = validation
        self.options = options
        self._restored: int | None = None

    def setup(self, stage: str | None = None) -> None:
        """Begin a run.

        Args:
            stage: with `fit` the trainer's counts are put right when a run is resumed.
        """
        callbacks: list[Any] = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(callback, _Alignment) for callback in callbacks):
            callbacks.append(_Alignment(self))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches without end.

        Returns:
            The loader of this rank; each iteration of it begins with the first batch not trained on.

        Raises:
            DataError: the stream ends (`num_epochs`), and there are several ranks, which would not end together.
        """
        num_ranks = self._layout()["num_ranks"]
        if self.options.num_epochs is not None and num_ranks > 1:
            raise DataError(
                f"data: num_epochs is {self.options.num_epochs}, and {num_ranks} ranks would not run out of samples at "
                "the same step. Leave it out, and set the trainer's max_steps."
            )
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
        unfinished = 0 if self.trainer is None or self._restored is not None else count_unfinished(self.trainer)
        return {"num_batches": self._num_trained() - unfinished, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a checkpoint was taken.

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
        self._restored = state_dict["num_batches"]

    def align(self) -> None:
        """Make the trainer's count of batches agree with the restored place: a begun window is begun anew."""
        if self._restored is not None and self.trainer is not None:
            restored, self._restored = self._restored, None
            shift_counts(self.trainer, restored - self._num_trained())

    def _layout(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "num_ranks": 1 if self.trainer is None else self.trainer.world_size,
        }

    def _num_trained(self) -> int:
        if self._restored is not None:  # the trainer makes its first iterator before it has restored its counts
            return self._restored
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


class _Alignment(L.Callback):
    """Calls `align` when the trainer has restored its counts and has not yet begun."""

    def __init__(self, data: StreamDataModule) -> None:
        self._data = data

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data.align()
