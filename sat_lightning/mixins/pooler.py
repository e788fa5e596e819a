"""One vector for a whole text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Linear, normal_init


class PoolerMixin(BaseMixin):
    """BERT's pooler; the model returns hidden states, `model.get_mixin("pooler")(hidden_states)` the pooled vector.

    Args:
        config: gives the width.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, True, normal_init(config.init_method_std))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return tanh of a linear of the first token: `[b, s, c]` to `[b, c]`."""
        return self.dense(hidden_states[:, 0]).tanh()

    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the hidden states `[b, s, c]` as they are."""
        return logits
