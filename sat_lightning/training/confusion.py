"""How often which class was taken for which."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sat_lightning.data import IGNORED_TARGET


class ConfusionCounts(Metric):
    """Count predictions by true and by predicted class; accuracy and macro-F1 follow exactly, over all ranks.

    Updating waits for nothing on the device; ranks add up their counts once, when `compute` is called.

    Args:
        num_classes: classes there are.
        **kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        # One more for targets that do not count: choosing the others would have to wait for their number.
        zeros = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target_ids: Tensor) -> None:
        """Count a batch.

        Args:
            predicted: classes, int64 of any shape.
            target_ids: true classes, of the same shape; -100 does not count.
        """
        places = target_ids * self.num_classes + predicted
        places = torch.where(target_ids == IGNORED_TARGET, self.num_classes**2, places).flatten()
        self.counts = self.counts.index_add(0, places, torch.ones_like(places))

    def compute(self) -> Tensor:
        """Return the counts `[true, predicted]`, int64."""
        return self.counts[:-1].view(self.num_classes, self.num_classes)


def rate(confusion: Tensor) -> dict[str, Tensor]:
    """Rate a classifier by its confusion matrix.

    Args:
        confusion: counts `[true, predicted]`.

    Returns:
        `accuracy`, the share of right predictions, and `macro_f1`, the mean over the classes of the harmonic mean of
        precision and recall, classes left out that neither are nor were predicted; NaN where nothing was counted.
    """
    counts = confusion.to(torch.float32 if confusion.device.type == "mps" else torch.float64)  # Apple's have none
    right, predicted, true = counts.diagonal(), counts.sum(0), counts.sum(1)
    is_there = predicted + true > 0
    f1 = torch.where(is_there, 2 * right / (predicted + true).clamp(min=1), 0.0)
    return {"accuracy": (right.sum() / counts.sum()).float(), "macro_f1": (f1.sum() / is_there.sum()).float()}
