"""Perplexity as a metric of torchmetrics: exact over batches and ranks of any size, and without waiting for a device.

Legend: v vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.perplexity import IGNORED_TARGET, losses_of_logits

UNITS = ("perplexity", "nats", "bits", "bits_per_byte")


class PerplexityMetric(Metric):
    """How well a model predicts: a sum of losses and a count of targets, in fp64, which ranks add up.

    A mean of means would give short batches and ranks with few of them too much weight; sums do not. Metrics of one
    `MetricCollection` with different units share their updates. On a device without fp64 call
    `metric.set_dtype(torch.float32)` first.

    Args:
        unit: "perplexity", `exp` of the nats per token; "nats" or "bits" per token; or "bits_per_byte", which compares
            across tokenizers and needs `num_bytes` in every update.
        ignore_index: targets that do not count.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        ConfigError: an unknown unit.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __init__(
        self,
        unit: Literal["perplexity", "nats", "bits", "bits_per_byte"] = "perplexity",
        ignore_index: int = IGNORED_TARGET,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        if unit not in UNITS:
            raise ConfigError(f"unit is '{unit}'. Choose one of {', '.join(UNITS)}.")
        self.unit = unit
        self.ignore_index = ignore_index
        for name in ("loss_sum", "num_tokens", "num_bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        logits: Tensor | None = None,
        target_ids: Tensor | None = None,
        *,
        loss_sum: Tensor | float | None = None,
        num_tokens: Tensor | int | None = None,
        num_bytes: Tensor | int | None = None,
    ) -> None:
        """Add a batch: logits and targets, or what is known of them.

        Args:
            logits: `[..., v]` of any dtype.
            target_ids: `[...]`, already shifted.
            loss_sum: nats over all targets of the batch, in the place of logits and targets.
            num_tokens: how many targets that is.
            num_bytes: of text that the targets stand for.

        Raises:
            InputError: both forms were given, or half of one, or shapes that do not fit.
        """
        if logits is not None and target_ids is not None and loss_sum is None and num_tokens is None:
            target_ids = target_ids.masked_fill(target_ids == self.ignore_index, IGNORED_TARGET)
            loss_sum = losses_of_logits(logits.detach(), target_ids).sum(dtype=self.loss_sum.dtype)
            num_tokens = (target_ids != IGNORED_TARGET).sum()
        elif logits is not None or target_ids is not None or loss_sum is None or num_tokens is None:
            raise InputError("Give either logits and target_ids, or loss_sum and num_tokens, of the batch.")
        if num_bytes is None and self.unit == "bits_per_byte":
            raise InputError("unit is 'bits_per_byte': give num_bytes, of the text that the targets stand for.")
        self.loss_sum = self.loss_sum + loss_sum
        self.num_tokens = self.num_tokens + num_tokens
        self.num_bytes = self.num_bytes + (0 if num_bytes is None else num_bytes)

    def compute(self) -> Tensor:
        """Return the metric over all batches of all ranks, a scalar; NaN if nothing counted."""
        if self.unit == "bits_per_byte":
            return self.loss_sum / (math.log(2) * self.num_bytes)
        mean = self.loss_sum / self.num_tokens
        return {"perplexity": mean.exp(), "nats": mean, "bits": mean / math.log(2)}[self.unit]
