"""Norms on queries and keys, so that scores cannot grow without bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict
from sat_lightning.model import BaseMixin
from sat_lightning.nn.norm import RMSNorm

Heads = tuple[Tensor, Tensor]


class QKNormMixin(BaseMixin):
    """Normalise every query and key head before it is rotated (Dehghani et al. 2023, arXiv:2302.05442; Qwen3).

    Args:
        config: gives layers, head size and epsilon.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

        def norms() -> nn.ModuleList:
            return nn.ModuleList(
                RMSNorm(config.head_size, eps=config.layernorm_epsilon) for _ in range(config.num_layers)
            )

        self.query_norm, self.key_norm = norms(), norms()

    @non_conflict
    def query_key_forward(
        self, query: Tensor, key: Tensor, *, layer_id: int, old_impl: Callable[..., Heads], **kw: Any
    ) -> Heads:
        """Normalise `[b, h, s, d]` over d, then do what was done before."""
        query, key = _normalise(self.query_norm[layer_id], query), _normalise(self.key_norm[layer_id], key)
        return old_impl(query, key, layer_id=layer_id, **kw)


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """Norm in the dtype of its weight: under autocast the heads have another."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
