"""A run that is told to stop saves a whole checkpoint first, on all ranks together."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sat_lightning.training.finite import DelayedHighest, has_ranks
from sat_lightning.training.runs import is_trial, run_folder

FILE_NAME = "interrupted.ckpt"


class Interrupted(SIGTERMException):
    """Ends a run that was told to by a signal and saved; the exit code is 128 + the signal's number, as in a shell."""


class SaveOnSignal(L.Callback):
    """At SIGTERM, SIGUSR1 or SIGUSR2 save `checkpoints/interrupted.ckpt` and exit, with code 128 + the signal's number.

    SIGTERM gives 143, SIGUSR1 138, SIGUSR2 140: not 0, for the run is not done. It is enough that one rank receives
    the signal; all save at the end of the same batch, of training (also inside a window of accumulated batches) or of
    validation, if all ranks validate on equally many batches: that in which the signal came, or of several ranks the
    next one. A handler of the user's own for SIGUSR1 or SIGUSR2 is left alone. Under SLURM's automatic requeueing, the
    requeue signal saves as Lightning does and requeues the job.

    Ranks tell each other in the place of Lightning, which asks them before each batch whether rank 0 has received
    SIGTERM, and waits for the answer: beside it this costs nothing. They tell in one all-reduce a batch, whose result
    is read a batch later; with `SkipNonFinite`, in the all-reduce that it makes anyway.

    `SATLightningModule` brings this callback along; any other pipeline can list it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._received = 0
        self._agreed = 0
        self._votes: DelayedHighest | None = None
        self._previous: dict[int, Any] = {}
        self._is_even = True
        self.is_carried = False
        """Whether somebody else tells the ranks of `received` in each batch of training, and calls `agree`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen from now on; processes that load data are forked with handlers that do not kill them."""
        if stage == "fit":
            # Last among the callbacks, so that nothing of a batch is left undone; Lightning iterates over the old list.
            trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]  # type: ignore[attr-defined]
            self._received = self._agreed = 0
            self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from Lightning's handlers, which save or communicate wherever the signal finds them."""
        connector = trainer._signal_connector
        if connector.received_sigterm:
            self._received, connector.received_sigterm = signal.SIGTERM, False
        self._listen()
        if has_ranks():
            self._votes = DelayedHighest(trainer.strategy.root_device)
            trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = lambda: None

    @property
    def received(self) -> int:
        """Number of the signal that this rank has received, or 0."""
        return self._received

    def agree(self, number: int) -> None:
        """Stop all ranks at the end of this batch, if any was told to.

        Args:
            number: the highest `received` of all ranks.
        """
        self._agreed = number

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Stop if any rank was told to."""
        if not self.is_carried:
            self._ask_ranks()
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave no question open."""
        if self._votes is not None:
            self._votes.read()
        self._give_back(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out whether ranks can agree after each batch."""
        if trainer.world_size > 1 and trainer.state.fn == "fit":
            counts = torch.tensor([float(sum(trainer.num_val_batches))], device=trainer.strategy.root_device)
            extremes = torch.cat([counts, -counts])
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
            self._is_even = bool(extremes[0] == -extremes[1])

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if any rank was told to."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_even:
            self._ask_ranks()
            self._stop_if_told(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        # Lightning is about to put back what it found, which was ours.
        trainer._signal_connector._original_handlers.update(self._previous)
        self._restore_handlers()
        self._give_back(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._restore_handlers()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            handler = signal.getsignal(number)
            is_free = handler in (signal.SIG_DFL, None) or type(handler).__module__.startswith("lightning.")
            if handler != self._receive and (is_free or number == signal.SIGTERM):
                self._previous.setdefault(number, signal.SIG_DFL if handler is None else handler)
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:  # noqa: ANN401
        """Only remember: whatever was interrupted has to end first."""
        self._received = number

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._previous = {}

    def _give_back(self, trainer: L.Trainer) -> None:
        self._votes = None
        trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)

    def _ask_ranks(self) -> None:
        self._agreed = self._received if self._votes is None else self._votes.exchange(self._received)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        if self._agreed:
            self._received = self._agreed
            # Here rather than in on_exception, which processes that were forked do not come to.
            if not is_trial(trainer):
                self._save(trainer)
            raise Interrupted(_exit_code(trainer, self._received))

    def _save(self, trainer: L.Trainer) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            if self._received == environment.requeue_signal:
                handler: Any = trainer._signal_connector._slurm_sigusr_handler_fn
                handler(self._received, None)
                return
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        folder = Path(str(savers[0].dirpath)) if savers else run_folder(trainer) / "checkpoints"
        trainer.save_checkpoint(folder / FILE_NAME)
        rank_zero_info(
            f"Received {signal.Signals(self._received).name}. Saved {folder / FILE_NAME}; resume with it, or with the "
            "folder of the run."
        )


def _exit_code(trainer: L.Trainer, number: int) -> int:
    # Lightning's launcher kills the first process if one that it started ends with a code other than 0.
    was_launched = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and trainer.global_rank > 0
    is_external = trainer._accelerator_connector.cluster_environment.creates_processes_externally
    return 0 if was_launched and not is_external else 128 + number
