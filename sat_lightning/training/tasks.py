"""Tasks: what a batch is, and what its loss is."""

import math
from typing import Any

import torch
from torch import Tensor

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.generation.perplexity import token_losses
from sat_lightning.training.module import SATLightningModule
from sat_lightning.training.steps import Step
from sat_lightning.training.targets import hard_loss, mean_over_targets

_SPLITS = {"val": "validation", "test": "test"}


class LanguageModelingTask(SATLightningModule):
    """Predict the next token: `{"input_ids": [b, s], "target_ids": [b, s]}`, targets already shifted, -100 for none.

    Other entries of a batch (`position_ids`, `attention_mask`, ...) are keywords of the model. After validation and
    test it logs `<stage>_perplexity` and, where the data module knows how many bytes a token stands for,
    `<stage>_bits_per_byte`, which can be compared across tokenizers.
    """

    def forward_step(self, batch: dict[str, Tensor]) -> Step:
        """Return the mean cross entropy over the targets, 0 without any.

        Args:
            batch: see the class.

        Returns:
            The loss, in nats per token.
        """
        inputs = {name: value for name, value in batch.items() if name != "target_ids"}
        model, target_ids = self._built_model(), batch["target_ids"]
        if model.hooks.computes_loss:
            return model(**inputs, target_ids=target_ids)[0]
        logits = model(**inputs)[0]
        return mean_over_targets(hard_loss(logits, target_ids), target_ids != IGNORED_TARGET)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Score each row.

        Args:
            batch: see the class.
            batch_idx: unused.
            dataloader_idx: unused.

        Returns:
            `loss`, the mean cross entropy of each row in nats per token (NaN without targets), and `num_targets`, both
            `[b]`.
        """
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "target_ids"}
        target_ids = batch["target_ids"]
        losses = token_losses(self._built_model(), target_ids=target_ids, **inputs)
        num_targets = (target_ids != IGNORED_TARGET).sum(1)
        return {"loss": losses.sum(1) / num_targets, "num_targets": num_targets}

    def summarise(self, stage: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add perplexity and bits per byte."""
        metrics = {"perplexity": torch.exp(means["loss"])}
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        which = [_SPLITS[stage]] if self.evaluated_set is None else [_SPLITS[stage], self.evaluated_set]
        if hasattr(datamodule, "bytes_per_token") and (per_token := datamodule.bytes_per_token(*which)):
            metrics["bits_per_byte"] = means["loss"] / (math.log(2) * per_token)
        return metrics
