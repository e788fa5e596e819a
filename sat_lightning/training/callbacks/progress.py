"""A progress bar over the whole run."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from sat_lightning.training.runs import total_steps
from sat_lightning.training.throughput import count_tokens


class _RunBar(Tqdm):
    """A bar that is told how long the run still takes: it knows its own steps only."""

    seconds_left: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar's format may name, and `left`."""
        left = "?" if self.seconds_left is None else self.format_interval(self.seconds_left)
        return {**super().format_dict, "left": left}


class TrainingProgressBar(TQDMProgressBar):
    """Lightning's bar, over all steps of the run instead of one epoch's, with tokens per second over all ranks.

    Beside the steps, the time gone and the time to come (validation included, and `max_time` minded) it shows every
    metric logged with `prog_bar=True`. Where the length of the run is unknown it runs over the batches of each epoch.

    Args:
        refresh_rate: batches between two updates.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._num_steps: int | None = None
        self._num_tokens, self._seconds, self._since = 0, 0.0, 0.0
        self._tokens_per_second: float | None = None
        self._pace_since, self._is_warm = (0, 0.0), False

    def init_train_tqdm(self) -> Tqdm:
        """Make the bar of the run."""
        return _RunBar(
            desc=self.train_description,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT.replace("{remaining}", "{left}"),
        )

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Begin the bar of the run; a resumed run begins where it stopped."""
        super().on_train_start(trainer, *args)
        self._begin_run(trainer, total_steps(trainer))
        self._num_tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()
        self._pace_since, self._is_warm = (trainer.fit_loop.total_batch_idx + 1, self._since), False

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Begin the bar of an epoch, if the run has no known length."""
        if self._num_steps is not None:
            return
        if trainer.max_epochs not in (None, -1) and trainer.current_epoch and trainer.global_step:
            # Data that does not tell its length has shown it.
            steps = math.ceil(trainer.global_step / trainer.current_epoch) * (trainer.max_epochs or 0)
            self._begin_run(trainer, steps)
        else:
            super().on_train_epoch_start(trainer, *args)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Count, and show it when it is time."""
        if not self.is_enabled:
            return
        self._num_tokens += count_tokens(batch) * trainer.world_size
        is_last = trainer.is_last_batch or trainer.global_step == self._num_steps
        if (batch_idx + 1) % self.refresh_rate == 0 or is_last:
            self._measure()
            self.train_progress_bar.seconds_left = self._seconds_left(trainer, batch_idx + 1)
            if self._num_steps is not None and not self.train_progress_bar.disable:
                self.train_progress_bar.n = trainer.global_step
                self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
        if self._num_steps is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: validation is no training time."""
        self._seconds += time.perf_counter() - self._since
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        super().on_validation_end(trainer, pl_module)
        self._since = time.perf_counter()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what stands behind the bar: the logged metrics, and tokens per second.

        Args:
            trainer: holds the metrics.
            pl_module: unused.
        """
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if self._tokens_per_second is not None:
            metrics["tokens/s"] = f"{self._tokens_per_second:,.0f}"
        return metrics

    def _begin_run(self, trainer: L.Trainer, num_steps: int | None) -> None:
        self._num_steps = num_steps
        if num_steps is not None:
            bar = self.train_progress_bar
            bar.total, bar.initial, bar.n = num_steps, trainer.global_step, trainer.global_step
            bar.set_description("Training")

    def _measure(self) -> None:
        """Take the speed since the last measurement, training time only."""
        now = time.perf_counter()
        seconds = self._seconds + now - self._since
        self._tokens_per_second = self._num_tokens / max(seconds, 1e-9)
        self._num_tokens, self._seconds, self._since = 0, 0.0, now

    def _seconds_left(self, trainer: L.Trainer, num_batches: int) -> float | None:
        """Tell how long the run, or without any limit the epoch, still takes at the pace it has held."""
        now, num_trained = time.perf_counter(), trainer.fit_loop.total_batch_idx + 1
        before, then = self._pace_since
        pace = (now - then) / max(1, num_trained - before)
        if not self._is_warm:
            # The first steps compile, allocate and wait for workers: from now on they do not count.
            self._pace_since, self._is_warm = (num_trained, now), True
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        limits = [left for timer in timers if (left := timer.time_remaining()) is not None]
        if self._num_steps is not None:
            limits.append(pace * (self._num_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        elif not limits and not math.isinf(trainer.num_training_batches):
            limits.append(pace * (trainer.num_training_batches - num_batches))
        return max(0.0, min(limits)) if limits else None
