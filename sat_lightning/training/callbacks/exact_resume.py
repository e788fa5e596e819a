"""A resumed run continues to the last bit as if it had never stopped."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sat_lightning.training.checkpoints import AtomicCheckpointIO
from sat_lightning.training.metrics_file import kept_rows, num_rows
from sat_lightning.training.position import (
    BATCH_END,
    EPOCH_END,
    Position,
    find_position,
    rewinds_windows,
    rewrite_counters,
    settle_loops,
    skip_known_validation,
    validates_next,
)
from sat_lightning.training.reset import check_reset, reset_parts, restart_schedules
from sat_lightning.training.rng import capture_rng, derive_rng, restore_rng
from sat_lightning.training.together import save_together

KEY = "exact_resume"
Snapshot = dict[str, Any]


class ExactResume(L.Callback):
    """Save in every checkpoint what Lightning leaves out, and restore it.

    That is, of every rank: the states of the random number generators (Python, numpy, torch, CUDA), and what a module,
    a data module or a callback with `rank_state_dict()` and `load_rank_state_dict(states)` keeps for itself; and of the
    run: where in the loops it was, the metrics that were not logged yet, and those that callbacks look at. Checkpoints
    are written whole or not at all (`AtomicCheckpointIO`), unless the trainer has a plugin of its own for that; where
    that fails on one rank, all ranks are told.

    A validation leaves no trace in the random numbers of training. A window of accumulated batches that had begun is
    begun anew, random numbers and all, where the data module does the same (ours does). On another number of ranks the
    generators are seeded from the saved states, the rank and the number of ranks (`derive_rng`), with a warning.

    `SATLightningModule` brings this callback along; any other pipeline can list it. The place in the data is saved by
    the data module.

    Args:
        reset: what not to restore: `optimizer`, `scheduler`, `data`, `step`.

    Raises:
        ConfigError: an unknown word in `reset`.
    """

    def __init__(self, reset: Iterable[str] = ()) -> None:
        super().__init__()
        self.reset = check_reset(reset)
        self._window_start: Snapshot | None = None
        self._before_validation: Snapshot | None = None
        self._restored: dict[str, Any] | None = None
        self._position: Position | None = None
        self._is_between_epochs = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the last place among the callbacks, and see to it that checkpoints are written whole."""
        # A new list: Lightning is iterating over the old one.
        trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]  # type: ignore[attr-defined]
        if type(trainer.strategy._checkpoint_io) in (type(None), TorchCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        save_together(trainer.strategy)
        self._window_start = self._before_validation = self._restored = self._position = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out; every rank has to call this."""
        position = find_position(trainer)
        snapshot = None
        if position.rewinds:
            snapshot = self._window_start
        elif trainer.validating:
            snapshot = self._before_validation
        unlogged = _find_unlogged(trainer, position)
        _flush(trainer)
        metrics: dict[str, Any] = trainer._logger_connector.callback_metrics
        checkpoint[KEY] = {
            "saved_at": time.time(),
            "position": position.to_dict(),
            "ranks": _gather(trainer, _to_cpu(snapshot or self._take(trainer))),
            "unlogged": unlogged,
            "callback_metrics": {name: float(value) for name, value in metrics.items()},
            "num_rows": num_rows(trainer),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's counters right before it reads them."""
        if not trainer.state.fn == "fit":
            return
        saved = self._restored = checkpoint.get(KEY)
        self._position = None
        if saved is None:
            rank_zero_warn(
                "The checkpoint was saved without ExactResume: it holds no random states, so the run continues with "
                "other random numbers than it would have had."
            )
        elif checkpoint.get("loops") is not None:
            self._position = Position(**saved["position"])
            self._is_between_epochs = rewrite_counters(checkpoint["loops"]["fit_loop"], self._position)
            kept_rows(trainer, saved["num_rows"])
        if self.reset:
            rank_zero_info(f"Not restored: {', '.join(self.reset)}.")
            reset_parts(self.reset, checkpoint, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore, as the last thing before the first batch."""
        saved, self._restored = self._restored, None
        if self.reset:
            restart_schedules(self.reset, trainer)
        if saved is not None:
            if self._position is not None and "step" not in self.reset:
                settle_loops(trainer, self._position, self._is_between_epochs or "data" in self.reset)
                _log_again(trainer, saved)
            self._put_back(trainer, saved["ranks"])
        self._window_start = self._take(trainer)
        self._before_validation = self._window_start

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Forget what was kept for a validation that did not come."""
        self._before_validation = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Keep the random states of the start of a window, and those before a validation."""
        if trainer.accumulate_grad_batches > 1 and not trainer.fit_loop._should_accumulate():
            self._window_start = self._take(trainer) if rewinds_windows(trainer) else None
        if self._position is not None and self._position.validated_until:
            skip_known_validation(trainer, self._position)
        if validates_next(trainer):
            self._before_validation = self._take(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the next epoch as a new one, also if of this one nothing but its end was left."""
        loop: Any = trainer.fit_loop.epoch_loop
        loop.restarting = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the random states before a validation that was not foreseen."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._before_validation is None:
            self._before_validation = self._take(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the random states of training back."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._before_validation is not None:
            restore_rng(self._before_validation["rng"], trainer.strategy.root_device)

    def _take(self, trainer: L.Trainer) -> Snapshot:
        parts = {key: part.rank_state_dict() for key, part in _stateful_parts(trainer)}
        return {"rng": capture_rng(trainer.strategy.root_device), "parts": parts}

    def _put_back(self, trainer: L.Trainer, ranks: list[Snapshot]) -> None:
        rank, num_ranks = trainer.global_rank, trainer.world_size
        own = ranks[rank::num_ranks]
        for key, part in _stateful_parts(trainer):
            part.load_rank_state_dict([state["parts"][key] for state in own if key in state["parts"]])
        if len(ranks) == num_ranks:
            restore_rng(own[0]["rng"], trainer.strategy.root_device)
            return
        rank_zero_warn(
            f"The checkpoint was saved by {len(ranks)} ranks and {num_ranks} resume it. The data goes on where it was, "
            "and random numbers are drawn anew from seeds that are derived from the saved states: the run is "
            "reproducible, but not the one that the old ranks would have made."
        )
        derive_rng([state["rng"] for state in ranks], rank, num_ranks)


def _stateful_parts(trainer: L.Trainer) -> Iterator[tuple[str, Any]]:
    """Yield what has a state of its own on every rank, by name."""
    datamodule = getattr(trainer, "datamodule", None)
    callbacks = [(c.state_key, c) for c in trainer.callbacks]  # type: ignore[attr-defined]
    for key, part in [("module", trainer.lightning_module), ("data", datamodule), *callbacks]:
        if hasattr(part, "rank_state_dict"):
            yield key, part


def _gather(trainer: L.Trainer, snapshot: Snapshot) -> list[Snapshot]:
    if trainer.world_size == 1:
        return [snapshot]
    ranks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(ranks, snapshot)
    return ranks


def _flush(trainer: L.Trainer) -> None:
    """Have what was logged written; on a full disk the checkpoint is what tells, on all ranks together."""
    for logger in trainer.loggers:
        try:
            logger.save()
        except OSError as error:
            rank_zero_warn(f"What was logged could not be written: {error}.")


def _to_cpu(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(each) for key, each in value.items()}
    return [_to_cpu(each) for each in value] if isinstance(value, (list, tuple)) else value


def _find_unlogged(trainer: L.Trainer, position: Position) -> dict[str, Any] | None:
    """Find what Lightning is about to log, for it logs after it has saved."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    step = loop._batches_that_stepped
    if position.spot == BATCH_END:
        is_due = connector.should_update_logs and not trainer.fit_loop._should_accumulate()
    else:
        progress: Any = trainer.fit_loop.epoch_progress.current
        is_due, step = position.spot == EPOCH_END and progress.processed > progress.completed, step - 1
    if not is_due or not trainer.loggers:
        return None
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    step = metrics.pop("step", step)
    metrics.setdefault("epoch", trainer.current_epoch)
    return {"metrics": metrics, "step": step} if len(metrics) > 1 else None


def _log_again(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    if saved["unlogged"] is not None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics=saved["unlogged"]["metrics"], step=int(saved["unlogged"]["step"]))
            logger.save()
    metrics = {name: torch.tensor(value) for name, value in saved["callback_metrics"].items()}
    trainer._logger_connector._callback_metrics.update(metrics)
