"""The second head of DeiT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Linear, normal_init


class DistilledClassifierMixin(BaseMixin):
    """Classify by the second token too, which learns from a teacher, and take the mean (arXiv:2012.12877).

    Args:
        config: gives the width.
        num_classes: outputs of the head.
    """

    def __init__(self, config: TransformerConfig, num_classes: int) -> None:
        super().__init__()
        self.classifier = Linear(config.hidden_size, num_classes, True, normal_init(config.init_method_std))

    @non_conflict
    def final_forward(self, logits: Tensor, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        """Return the mean of both heads, `[b, num_classes]`."""
        return (old_impl(logits, **kw) + self.classifier(logits[:, 1])) / 2
