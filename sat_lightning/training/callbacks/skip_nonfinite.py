"""NaN and infinity kept out of the weights."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS

from sat_lightning.errors import ConfigError, NonFiniteError
from sat_lightning.training.callbacks.save_on_signal import SaveOnSignal
from sat_lightning.training.diagnosis import find_culprit
from sat_lightning.training.finite import gather_objects
from sat_lightning.training.guard import StepGuard
from sat_lightning.training.progress import DataProgress
from sat_lightning.training.runs import is_trial, logged_step, run_folder
from sat_lightning.training.verdict import BadBatch

_FEWEST_BATCHES = 100  # of which `max_fraction` is taken: a fraction of a run's first batches says little
_STEPS_PER_SCALE, _LOWEST_SCALE = 50, 1e-3  # a scale begins at 65536 and is halved by each overflow
_NUM_WARNINGS = 5  # further ones are only in the file


class SkipNonFinite(L.Callback):
    """Leave out batches whose loss, metrics or gradients are not finite, on all ranks together.

    In each batch the ranks agree whether the loss, and what else the training step gives, is finite everywhere. Where
    it is not, no rank steps: weights, optimizer, schedule, loss scale, `global_step`, random numbers, BatchNorm's
    buffers and the window of accumulated batches are as if the batch had not been there, and the window is completed
    with the next good batch. What the batch logged is dropped. A gradient that is not finite spoils its whole window,
    which is then dropped; under a loss scale (fp16) that is left to the scaler. It works with any module under
    automatic optimization. Callbacks see a left-out batch with `outputs` of `{}`.

    The ranks agree before the backward pass, which no rank then begins. Only if a window is a single batch, gradients
    are looked at without DeepSpeed, and nothing could keep what a backward pass of NaN computes (hooks of the module or
    of callbacks, compression of gradients, fp8), they agree on loss and gradients together, right after it.

    Logged is `skipped_batches`, the number so far; written is one line of JSON for each to `skipped_batches.jsonl` in
    the run's folder: where it was, what was found on which rank, and the samples, if a `SATDataModule` knows them. A
    resumed run goes on counting, and lists again what it leaves out again.

    Args:
        max_consecutive: so many left out one after another end the run.
        max_fraction: more than this part of all batches so far, or of 100 if there were fewer, ends the run.
        check_metrics: also look at the metrics of a `SATLightningModule`, or at the scalars beside the loss in a
            dictionary that the training step returns.
        check_gradients: also look at the gradients before each optimizer step. Under ZeRO 1 to 3 that is done with
            the norm that DeepSpeed reads anyway. Elsewhere the host waits for the device once in each batch, for loss
            and gradients together, and where gradients are accumulated a second time in the batches that step.
        diagnose: before the run ends, compute the last batch once more to name the first module and tensor.
        file_name: of the list.

    Raises:
        ConfigError: a limit makes no sense, or the module's optimization is manual.
    """

    def __init__(
        self,
        max_consecutive: int = 10,
        max_fraction: float = 0.05,
        check_metrics: bool = True,
        check_gradients: bool = True,
        diagnose: bool = False,
        file_name: str = "skipped_batches.jsonl",
    ) -> None:
        super().__init__()
        if max_consecutive < 1:
            raise ConfigError(f"SkipNonFinite: max_consecutive is {max_consecutive}. Set it to at least 1.")
        if not 0 <= max_fraction <= 1:
            raise ConfigError(f"SkipNonFinite: max_fraction is {max_fraction}. Set it between 0 and 1.")
        self.max_consecutive, self.max_fraction = max_consecutive, max_fraction
        self.check_metrics, self.check_gradients, self.diagnose = check_metrics, check_gradients, diagnose
        self.file_name = file_name
        self.num_skipped = 0
        """Batches left out so far."""
        self.num_consecutive = 0
        """Those of them that no good batch has followed yet."""
        self._guard: StepGuard | None = None
        self._saved: dict[str, Any] = {}
        self._trainer: Any = None
        self._has_left_out = False
        self._num_in_window, self._consecutive_before_window = 0, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be guarded.

        Raises:
            ConfigError: see the class.
        """
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ConfigError(
                f"SkipNonFinite: {type(pl_module).__name__} has automatic_optimization=False, so its training step "
                "calls backward by itself. Check the loss there, or remove SkipNonFinite from trainer.callbacks."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Step in between the trainer and its strategy.

        Raises:
            ConfigError: the optimizer computes a batch more than once.
        """
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise ConfigError("SkipNonFinite: LBFGS computes a batch several times a step. Use another optimizer.")
        self._trainer = trainer
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        messenger = next((callback for callback in callbacks if isinstance(callback, SaveOnSignal)), None)
        self._guard = StepGuard(trainer, self.check_metrics, self.check_gradients, self._leave_out, messenger)
        self._guard.attach(self._saved)

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Count a batch."""
        if self._guard is not None:
            self._guard.begin_batch()
            if len(self._guard.window) == 1:
                self._consecutive_before_window = self.num_consecutive

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Show the count where it changed."""
        if self._has_left_out:
            pl_module.log("skipped_batches", float(self.num_skipped), logger=False, batch_size=1)
            # With prog_bar=True Lightning would read it from the device, and wait for it, after every later batch too.
            trainer._logger_connector._progress_bar_metrics["skipped_batches"] = float(self.num_skipped)
        else:
            self.num_consecutive = 0
        self._has_left_out = False
        if not self.num_accumulated:
            self._num_in_window = 0
            self._check_loss_scale(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Step out."""
        self._step_out()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Step out."""
        self._step_out()

    @property
    def num_accumulated(self) -> int | None:
        """Batches, good or not, since the last optimizer step, from the first good one on; None before the run."""
        return self._saved.get("num_accumulated") if self._guard is None else self._guard.num_accumulated

    def state_dict(self) -> dict[str, Any]:
        """The counts, as of the beginning of an open window, which a resumed run begins anew."""
        guard = self._guard
        if guard is None:
            return {"num_skipped": self.num_skipped, "num_consecutive": self.num_consecutive, **self._saved}
        is_open = bool(guard.num_accumulated)
        return {
            "num_skipped": self.num_skipped - self._num_in_window,
            "num_consecutive": self._consecutive_before_window if is_open else self.num_consecutive,
            **guard.state_dict(self._num_in_window),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Args:
            state_dict: what `state_dict` gave.
        """
        self._saved, self._guard = dict(state_dict), None
        self.num_skipped = self._saved.pop("num_skipped")
        self.num_consecutive = self._saved.pop("num_consecutive")

    def _check_loss_scale(self, trainer: L.Trainer) -> None:
        """A scaler leaves steps out for ever and says nothing; its scale tells, and is read only now and then."""
        scale: float | None = None if self._guard is None else self._guard.gradients.stuck_scale
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and trainer.global_step % _STEPS_PER_SCALE == 0:
            scale = value if (value := scaler.get_scale()) < _LOWEST_SCALE else None
        if scale is not None:
            raise NonFiniteError(
                f"SkipNonFinite: the loss scale of fp16 has fallen to {scale:.1e} by global step "
                f"{trainer.global_step}: gradients are not finite at any scale, and no step is made. Resume from a "
                "checkpoint before that, with bf16-mixed or a lower learning rate."
            )

    def _step_out(self) -> None:
        if self._guard is not None:
            self._guard.detach()

    def _leave_out(self, bad: BadBatch) -> None:
        trainer, number = self._trainer, len(bad.batches_ago)
        self._has_left_out = True
        self.num_skipped += number
        if bad.is_window:
            self.num_consecutive = self._consecutive_before_window + number
        else:
            self.num_consecutive += number
            self._num_in_window += number
        found = {f"rank {rank}": words for rank, words in enumerate(gather_objects(bad.found)) if words}
        batch_idx: int = trainer.fit_loop.epoch_loop.batch_idx
        record = {
            "epoch": trainer.current_epoch,
            "batches": [batch_idx - ago for ago in bad.batches_ago],
            "global_step": trainer.global_step,
            "found": found or {"gradient": "dropped by the strategy"},
            "samples": find_samples(trainer, bad.batches_ago),
        }
        self._report(record)
        for logger in trainer.loggers:
            logger.log_metrics({"skipped_batches": float(self.num_skipped)}, step=logged_step(trainer))
        if limit := self._limit():
            raise NonFiniteError(self._explain(limit, record, bad))

    def _report(self, record: dict[str, Any]) -> None:
        trainer = self._trainer
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        if not is_trial(trainer):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / self.file_name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.num_skipped <= _NUM_WARNINGS:
            rank_zero_warn(
                f"SkipNonFinite: left out batch {record['batches']} of epoch {record['epoch']}, "
                f"{_describe(record['found'])}; {self.num_skipped} so far. See {folder / self.file_name}."
            )

    def _limit(self) -> str | None:
        if self.num_consecutive >= self.max_consecutive:
            return f"{self.num_consecutive} batches in a row were left out (max_consecutive={self.max_consecutive})"
        num_seen = self._trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if self.num_skipped > self.max_fraction * max(_FEWEST_BATCHES, num_seen):
            return f"{self.num_skipped} of {num_seen} batches were left out (max_fraction={self.max_fraction:g})"
        return None

    def _explain(self, limit: str, record: dict[str, Any], bad: BadBatch) -> str:
        if self.diagnose:
            texts = gather_objects(find_culprit(self._trainer.lightning_module, bad))
            culprit = " ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
        else:
            culprit = "Set diagnose=True to have the first module and tensor named."
        return (
            f"SkipNonFinite: {limit}, the last one at epoch {record['epoch']}, batch {record['batches'][-1]}, "
            f"global step {record['global_step']} with {_describe(record['found'])}. Which they were is in "
            f"{self.file_name}. {culprit} If the data is sound, lower the learning rate or clip the gradients, and "
            "resume from a checkpoint before the first of them."
        )


def find_samples(trainer: L.Trainer, batches_ago: list[int]) -> dict[str, list[int]] | None:
    """Find out what batches were made of, over all ranks.

    Args:
        trainer: in the middle of a batch.
        batches_ago: 0 for that batch.

    Returns:
        Rows by source; None if the data module does not know them.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    progress = getattr(datamodule, "progress", None)
    if not isinstance(progress, DataProgress):
        return None
    samples: dict[str, list[int]] = {}
    for ago in batches_ago:
        before = progress.before(ago)
        if before is None:
            return None
        place, batches = before
        owners, rows = datamodule.mixture(batches.positions(place))
        for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
            samples.setdefault(datamodule.mixture.names[owner], []).append(row)
    return samples


def _describe(found: dict[str, Any]) -> str:
    ranks = []
    for rank, words in found.items():
        inner = ", ".join(f"{name}={word}" for name, word in words.items()) if isinstance(words, dict) else words
        ranks.append(f"{rank}: {inner}")
    return "; ".join(ranks)
