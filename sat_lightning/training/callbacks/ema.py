"""An exponential moving average of the weights, which evaluates better than any one step's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sat_lightning.errors import ConfigError
from sat_lightning.training.deepspeed import SATDeepSpeedStrategy
from sat_lightning.training.shards import (
    OwnWeights,
    Slot,
    check_averages,
    join_parts,
    model_names,
    move_averages,
    own_weights,
    send_wholes,
)
from sat_lightning.training.zero_shards import AVERAGE, EMA_KEY, PARTS_KEY, SHARDS_KEY


@contextmanager
def _training_tensors() -> Iterator[None]:
    """Make tensors that training can change; Lightning evaluates in inference mode, whose tensors it cannot."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class EMA(L.Callback):
    r"""Average the trained weights over the steps, and evaluate the average.

    After each optimizer step `average = decay * average + (1 - decay) * weights`, from the first step's weights on
    (Polyak and Juditsky 1992; Izmailov et al. 2018). The average is kept in fp32, by each rank for the weights that its
    optimizer updates: under ZeRO 1 to 3 a part of them, which costs no communication. Batches without a step (gradient
    accumulation, a batch that was skipped) do not count. Training itself never sees the average; validation, test and
    prediction use it, and then the weights are put back bit for bit. Buffers are not averaged, nor are weights that are
    frozen when training starts.

    A run may go on with another number of ranks: a checkpoint holds the average whole, under `ema`, and a folder of
    ZeRO's holds it in parts, beside those of the weights. It works on one device, under DDP and under ZeRO.

    Args:
        decay: how much of the average is left by one step; the average looks back some `1 / (1 - decay)` steps.
        warmup: start with a smaller decay, `(1 + n) / (10 + n)` at the n-th update, so that the first random weights
            are soon forgotten.
        every_n_steps: update every so many optimizer steps, with `decay ** every_n_steps`.
        evaluate: use the average in validation, test and prediction.

    Raises:
        ConfigError: a value is out of range, or the strategy shards weights in a way of its own.
    """

    def __init__(
        self, decay: float = 0.999, warmup: bool = True, every_n_steps: int = 1, evaluate: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA: decay is {decay}, a number from 0 up to (not including) 1; 0.999 is common.")
        if every_n_steps < 1:
            raise ConfigError(f"EMA: every_n_steps is {every_n_steps}, it must be at least 1.")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.evaluate = evaluate
        self.num_updates = 0
        """Updates so far."""
        self._module: nn.Module | None = None
        self._weights: OwnWeights | None = None
        # The averages, and the layout they are in, which may be that of an earlier strategy.
        self._averages: list[Tensor] = []
        self._slots: list[Slot] = []
        self._is_partitioned = False
        self._step = 0
        self._loaded: Mapping[str, Any] | None = None
        self._shards: Any = None
        self._backup: list[Tensor] | None = None
        self._is_evaluating = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the averages of another module."""
        if self._module is not pl_module:
            self._averages, self.num_updates = [], 0
        self._module, self._weights, self._loaded = pl_module, None, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the weights of the first step, or go on where a checkpoint left off."""
        self._prepare(trainer, pl_module)
        self._step = trainer.global_step
        if not self._averages:
            if self._step:
                rank_zero_warn(f"EMA: the checkpoint holds no average; it begins at the weights of step {self._step}.")
            self._place(None for _ in self._own.slots)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,  # noqa: ANN401
    ) -> None:
        """Update, if the optimizer has stepped."""
        self._follow(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights."""
        self._start_evaluation(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Put the average back in, if a checkpoint was saved in the midst of validation."""
        if self._is_evaluating:
            self._swap_in()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        self._end_evaluation()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back, where that takes no other rank."""
        self._is_evaluating = False
        if not self._is_partitioned:
            self._swap_out()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average beside the weights; what is saved as the weights is never the average."""
        self._swap_out()
        if not self._averages:
            return
        self._follow(trainer)
        state: dict[str, Any] = {"num_updates": self.num_updates}
        if self._is_partitioned and isinstance(trainer.strategy, SATDeepSpeedStrategy):
            pairs = zip(self._slots, self._averages, strict=True)
            checkpoint[PARTS_KEY] = {slot.name: average for slot, average in pairs if slot.length}
        else:
            state["averages"] = {}
            for slot, whole in self._join(trainer):
                if trainer.is_global_zero:
                    state["averages"][slot.name] = whole.cpu() if self._is_partitioned else whole
        checkpoint[EMA_KEY] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average of a checkpoint, once the strategy has placed the weights."""
        self._loaded = checkpoint.get(EMA_KEY)
        self._shards = checkpoint.get(SHARDS_KEY)

    @contextmanager
    def averaged(self, trainer: L.Trainer) -> Iterator[None]:
        """Use the average as the weights inside a `with`; every rank has to enter it.

        Args:
            trainer: the one that this callback belongs to.
        """
        self._prepare(trainer, trainer.lightning_module)
        was_in = self._backup is not None
        self._swap_in()
        try:
            yield
        finally:
            if not was_in:
                self._swap_out()

    def ema_state_dict(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Return the average in the model's own names, shared weights under each of theirs; every rank has to call it.

        Args:
            trainer: the one that this callback belongs to.

        Returns:
            fp32, on the CPU: what is averaged, and nothing else; empty on all ranks but the first.

        Raises:
            ConfigError: there is no average yet.
        """
        module = trainer.lightning_module
        self._prepare(trainer, module)
        if not self.has_average:
            raise ConfigError("EMA: there is no average before training begins or a checkpoint with one is loaded.")
        names = model_names(module)
        wholes: dict[str, Tensor] = {}
        for slot, whole in self._join(trainer):
            if trainer.is_global_zero:
                wholes |= dict.fromkeys(names[slot.name], whole.to("cpu", copy=True))
        return wholes

    @property
    def has_average(self) -> bool:
        """Whether training has begun, or a checkpoint with an average was loaded."""
        return bool(self._averages)

    @property
    def _own(self) -> OwnWeights:
        assert self._weights is not None
        return self._weights

    @torch.no_grad()
    def _follow(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self._step or not self._averages:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps:
            return
        self.num_updates += 1
        decay = self.decay**self.every_n_steps
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        move_averages(self._averages, self._own.tensors(), decay)

    def _start_evaluation(self, trainer: L.Trainer, module: nn.Module) -> None:
        if not self.evaluate:
            return
        self._is_evaluating = True
        self._prepare(trainer, module)
        if not self._averages and trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn("EMA: there is no average, so the weights themselves are evaluated. Give ckpt_path one.")
        self._swap_in()

    def _end_evaluation(self) -> None:
        self._is_evaluating = False
        self._swap_out()

    @_training_tensors()
    def _swap_in(self) -> None:
        if self._backup is not None or not self._averages:
            return
        weights = self._own.tensors()
        self._backup = [weight.clone() for weight in weights]
        for weight, average in zip(weights, self._averages, strict=True):
            weight.copy_(average)
        self._own.publish()

    @_training_tensors()
    def _swap_out(self) -> None:
        if self._backup is None:
            return
        for weight, backup in zip(self._own.tensors(), self._backup, strict=True):
            weight.copy_(backup)
        self._backup = None
        self._own.publish()

    @_training_tensors()
    def _prepare(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Find the weights, and lay the averages out as they are laid out."""
        if self._weights is None:
            self._weights = own_weights(trainer, module)
            if self._averages and not self._fits():
                self._place(slot.cut(whole) for slot, whole in self._join(trainer, self._own.slots))
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self.num_updates = state["num_updates"]
            slots, averages = self._own.slots, state.get("averages")
            if averages is None and self._shards is not None:  # a folder of ZeRO's, of which each rank reads its part
                shards = self._shards
                check_averages(
                    slots, {name: shards.shape(name) for name in shards.names if AVERAGE in shards.kinds(name)}
                )
                self._place(shards.read(slot.name, AVERAGE, slot.start, slot.start + slot.length) for slot in slots)
            else:
                averages = averages or {}
                shapes = {name: tuple(average.shape) for name, average in averages.items()}
                check_averages(slots, trainer.strategy.broadcast(shapes))
                self._place(slot.cut(whole) for slot, whole in send_wholes(trainer, slots, averages))

    @_training_tensors()
    def _place(self, parts: Iterable[Tensor | None]) -> None:
        """Make averages of flat parts in the layout of the weights, or of the weights where there are none."""
        averages = []
        for weight, part in zip(self._own.tensors(), parts, strict=True):
            average = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            averages.append(average if part is None else average.copy_(part.view_as(average)))
        self._averages, self._slots, self._is_partitioned = averages, self._own.slots, self._own.is_partitioned

    def _fits(self) -> bool:
        """Tell whether the averages lie as the weights do."""
        is_alike = (self._slots, self._is_partitioned) == (self._own.slots, self._own.is_partitioned)
        return is_alike and [a.shape for a in self._averages] == [weight.shape for weight in self._own.tensors()]

    def _join(self, trainer: L.Trainer, slots: Sequence[Slot] | None = None) -> Iterator[tuple[Slot, Tensor]]:
        """Yield whole averages with their slots, or with others in the same order."""
        device = trainer.strategy.root_device
        joined = join_parts(self._slots, self._averages, is_partitioned=self._is_partitioned, device=device)
        return ((slot, whole) for slot, (_, whole) in zip(slots or self._slots, joined, strict=True))
