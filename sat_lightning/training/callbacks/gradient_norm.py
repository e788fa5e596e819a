"""`GradientNorm`: how large the gradients of a step were, the same number under every strategy."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from sat_lightning.training.runs import is_logging_step


class GradientNorm(L.Callback):
    """Log `grad_norm`, the norm of all gradients of a step, summed over its window and meant over the ranks, unclipped.

    It is computed when the trainer's loggers want a step, and nobody waits for it. Under ZeRO 1 to 3, where no rank has
    all gradients, it is the one that DeepSpeed clips by. In fp16 it is that of the unscaled gradients.

    Our tasks bring this callback themselves when the trainer clips; a trainer that does not clip can be given it.
    """

    def __init__(self) -> None:
        self._norm: Tensor | None = None
        self._is_due = False

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Compute the norm, if it is wanted and this rank has all gradients."""
        self._is_due = is_logging_step(trainer)
        if self._is_due and not _is_sharded(trainer):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if not gradients:  # stage 0 in half precision, whose optimizer knows only its fp32 copies
                gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self._norm = get_total_norm([gradient.float() for gradient in gradients])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Log it."""
        if not self._is_due:
            return
        self._is_due = False
        strategy: Any = trainer.strategy
        norm = strategy.gradient_norm if _is_sharded(trainer) else self._norm
        if norm is not None:
            pl_module.log("grad_norm", torch.as_tensor(norm, dtype=torch.float32), batch_size=1)


def _is_sharded(trainer: L.Trainer) -> bool:
    return getattr(trainer.strategy, "stage", 0) > 0
