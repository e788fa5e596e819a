"""Where a run stands in its data: told from what was trained, saved in every checkpoint, found again on any ranks."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from sat_lightning.data.batches import Place, ShardedBatches
from sat_lightning.data.buckets import BudgetBatches
from sat_lightning.data.mixed import MixedRows
from sat_lightning.data.mixture import Mixture


class DataProgress:
    """The place of a run in its training data.

    It is counted from the batches that the trainer has trained on, not from those that loaders have fetched, and it
    stops at the last optimizer step: a checkpoint holds no gradients, so a window of accumulated batches that was
    begun is begun anew.
    """

    def __init__(self) -> None:
        self.place = Place()
        self._trainer: L.Trainer | None = None
        self._batches: ShardedBatches | None = None
        self._first_batch = 0
        self._is_restored = False
        self._num_ranks_saved = 0

    def attach(self, trainer: L.Trainer) -> None:
        """Begin a run; a second run of the same trainer goes on where the first one stopped.

        Args:
            trainer: the trainer.
        """
        if trainer is not self._trainer:
            self._trainer, self._batches, self._is_restored = trainer, None, False
            self.place = Place()
            trainer.callbacks.append(_Alignment(self))  # type: ignore[attr-defined]

    def begin(self, batches: ShardedBatches) -> None:
        """Tell the batches where the iteration that begins now has to start, and how long it is.

        Args:
            batches: of the loader that is being iterated.
        """
        trainer = self._fitting_trainer()
        if trainer is None:
            return
        if self._batches is not None and (num_steps := self._num_trained()):
            self.place = self._next_epoch(self._batches, self._batches.advance(self.place, num_steps))
        done = _count_of(trainer)
        self._batches, self._first_batch = batches, done.total.processed
        num_batches = trainer.num_training_batches
        batches.start_at(self.place, None if math.isinf(num_batches) else int(num_batches) - done.current.ready)

    def now(self) -> Place:
        """Find where the run stands, as of its last optimizer step.

        Returns:
            The place, the same on every rank.
        """
        trainer = self._trainer
        if trainer is None or self._batches is None:
            return self.place
        num_steps = self._num_trained()
        if _is_epoch_complete(trainer):
            return self._next_epoch(self._batches, self._batches.advance(self.place, num_steps))
        return self._batches.advance(self.place, max(0, num_steps - count_accumulated(trainer)))

    def before(self, num_batches: int) -> tuple[Place, ShardedBatches] | None:
        """Find the place some batches ago, for callbacks that look at a batch that was just trained.

        Args:
            num_batches: how many.

        Returns:
            The place and the batches that are being trained on; None before the first.
        """
        if self._batches is None:
            return None
        num_trained = self._num_trained()
        return self._batches.advance(self.place, max(0, num_trained - num_batches)), self._batches

    def state_dict(self, mixture: Mixture) -> dict[str, int]:
        """Say where the run stands.

        Args:
            mixture: what it trains on.

        Returns:
            A few integers, the same on every rank.
        """
        about = {"epoch_size": mixture.epoch_size or 0, "seed": mixture.seed, "num_ranks": self._num_ranks()}
        return {**self.now()._asdict(), **about}

    def load_state_dict(self, state_dict: dict[str, int], mixture: Mixture) -> None:
        """Continue where a checkpoint was taken.

        Args:
            state_dict: what `state_dict` gave.
            mixture: what is trained on now.
        """
        self.place = Place(state_dict["epoch"], state_dict["position"])
        self._batches, self._is_restored, self._num_ranks_saved = None, True, state_dict.get("num_ranks", 0)
        now = {"epoch_size": mixture.epoch_size or 0, "seed": mixture.seed}
        if changed := [
            f"{name} was {state_dict[name]} and is {now[name]}" for name in now if state_dict[name] != now[name]
        ]:
            rank_zero_warn(
                f"data: since the checkpoint {', '.join(changed)}. The run continues at sample {self.place.position} "
                f"of epoch {self.place.epoch}, but not in the data, or not in the order, that it was trained on."
            )

    def restart(self) -> None:
        """Begin the data anew, whatever a checkpoint said."""
        self.place, self._batches, self._is_restored = Place(), None, False

    def align(self) -> None:
        """Make the trainer's count of batches agree with the restored place.

        The number of batches before the place is another one on another number of ranks, and a window of accumulated
        batches that was begun is begun anew.
        """
        trainer = self._fitting_trainer()
        if trainer is None or not self._is_restored:
            return
        self._is_restored = False
        done, loader = _count_of(trainer), trainer.train_dataloader
        batches = getattr(loader, "batch_sampler", None)
        if not isinstance(batches, ShardedBatches):
            return
        # Steps by token budget need not end with the data's epoch: on as many ranks, the trainer's own count is right.
        is_own_count = isinstance(batches, BudgetBatches) and self._num_ranks() == self._num_ranks_saved
        left = None if is_own_count else batches.num_steps(self.place.position, self.place.epoch)
        before = done.current.processed
        if _is_epoch_complete(trainer):
            target = int(min(trainer.num_training_batches, len(batches))) if left is not None else before
        elif left is None:
            target = before - count_accumulated(trainer)
        else:
            target = len(batches) - left
        shift_counts(trainer, max(0, target) - before)
        self._first_batch = done.total.processed

    def _num_ranks(self) -> int:
        return 1 if self._trainer is None else self._trainer.world_size

    def _num_trained(self) -> int:
        """Count the batches trained on since the iteration began."""
        trainer = self._trainer
        return 0 if trainer is None else _count_of(trainer).total.processed - self._first_batch

    def _next_epoch(self, batches: ShardedBatches, place: Place) -> Place:
        """After an epoch cut short by `limit_train_batches` comes a new epoch; otherwise nothing is skipped."""
        trainer, num_steps = self._trainer, batches.num_steps()
        is_cut = trainer is not None and num_steps is not None and trainer.num_training_batches < num_steps
        return Place(place.epoch + 1) if is_cut and place.position else place

    def _fitting_trainer(self) -> L.Trainer | None:
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.state.stage != RunningStage.TRAINING:
            return None
        return trainer


def _count_of(trainer: L.Trainer) -> Any:  # noqa: ANN401 - Lightning declares a base class without most of its fields
    """Lightning's count of batches, of this epoch and in total."""
    return trainer.fit_loop.epoch_loop.batch_progress


def count_accumulated(trainer: L.Trainer) -> int:
    """Batches trained on since the last optimizer step; a callback that leaves batches out of windows counts them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (number := getattr(callback, "num_accumulated", None)) is not None:
            return int(number)
    return int(_count_of(trainer).current.processed % trainer.accumulate_grad_batches)


def _is_epoch_complete(trainer: L.Trainer) -> bool:
    """Whether the trainer has trained on the last batch of its epoch."""
    done = _count_of(trainer)
    return bool(done.is_last_batch and done.current.processed == done.current.ready)


def count_unfinished(trainer: L.Trainer) -> int:
    """Count the batches trained on since the last optimizer step; a checkpoint holds nothing of them.

    Args:
        trainer: the trainer.
    """
    return 0 if _is_epoch_complete(trainer) else count_accumulated(trainer)


def shift_counts(trainer: L.Trainer, num_batches: int) -> None:
    """Let the trainer have trained on more or fewer batches than it has counted.

    Args:
        trainer: the trainer.
        num_batches: how many more.
    """
    for count in (_count_of(trainer).current, _count_of(trainer).total):
        # All alike: a batch that was not yet completed when the checkpoint was saved, Lightning completes later on.
        for name in ("ready", "started", "processed", "completed"):
            setattr(count, name, getattr(count, name) + num_batches)


class TrainingLoader(DataLoader[Any]):
    """A loader that starts where the run stands, each time it is iterated.

    Args:
        rows: the samples.
        batches: who takes which.
        progress: of the run.
        **settings: of `DataLoader`.
    """

    def __init__(
        self,
        rows: MixedRows,
        batches: ShardedBatches,
        progress: DataProgress,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        # A generator of its own: making an iterator must not draw from the one that dropout draws from, for a resumed
        # run makes iterators at other moments.
        super().__init__(rows, batch_sampler=batches, generator=torch.Generator(), **settings)
        # DataLoader forbids to set it; trainers look here to see whether the loader shards by itself.
        self.__dict__["sampler"] = batches
        self.progress = progress

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: Lightning makes its iterator before it has restored its counters, but takes no batch from it.
        self.progress.begin(self.batch_sampler)  # type: ignore[arg-type]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves the place. That the method is there tells Lightning that we resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""


class _Alignment(L.Callback):
    """Calls `align` when the trainer has restored its counters and has not yet begun."""

    def __init__(self, progress: DataProgress) -> None:
        self._progress = progress

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.align()
