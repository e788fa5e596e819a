"""A language-modelling head of its own weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import computes_loss
from sat_lightning.model import BaseMixin
from sat_lightning.nn.head import project
from sat_lightning.nn.linear import Linear, normal_init


class LMHeadMixin(BaseMixin):
    """Score every word by an untied linear: `[b, s, c]` to logits `[b, s, v]`.

    Args:
        config: gives the sizes.
        bias: whether the linear has one.
    """

    def __init__(self, config: TransformerConfig, bias: bool = False) -> None:
        super().__init__()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias, normal_init(config.init_method_std))

    @computes_loss
    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the logits, or the mean cross entropy when `target_ids` is given."""
        return project(logits, self.lm_head.weight, bias=self.lm_head.bias, **kw)
