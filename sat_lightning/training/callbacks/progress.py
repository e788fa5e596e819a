"""A progress bar over the whole run."""

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from sat_lightning.training.throughput import count_tokens


class TrainingProgressBar(TQDMProgressBar):
    """Lightning's bar, over all steps of the run instead of one epoch's, with tokens per second over all ranks.

    Beside the steps, the time gone and the time to come it shows every metric logged with `prog_bar=True`. Where the
    length of the run is unknown it runs over the batches of each epoch.

    Args:
        refresh_rate: batches between two updates.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._num_steps: int | None = None
        self._num_tokens, self._seconds, self._since = 0, 0.0, 0.0
        self._tokens_per_second: float | None = None

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Begin the bar of the run; a resumed run begins where it stopped."""
        super().on_train_start(trainer, *args)
        total = trainer.estimated_stepping_batches
        self._num_steps = None if math.isinf(total) else int(total)
        if self._num_steps is not None:
            bar = self.train_progress_bar
            bar.total, bar.initial, bar.n = self._num_steps, trainer.global_step, trainer.global_step
            bar.set_description("Training")
        self._num_tokens, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Begin the bar of an epoch, if the run has no known length."""
        if self._num_steps is None:
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
        self._num_tokens += count_tokens(batch) * trainer.world_size
        is_last = trainer.is_last_batch or trainer.global_step == self._num_steps
        if self.is_enabled and ((batch_idx + 1) % self.refresh_rate == 0 or is_last):
            self._measure()
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

    def _measure(self) -> None:
        """Take the speed since the last measurement, training time only."""
        now = time.perf_counter()
        seconds = self._seconds + now - self._since
        self._tokens_per_second = self._num_tokens / max(seconds, 1e-9)
        self._num_tokens, self._seconds, self._since = 0, 0.0, now
