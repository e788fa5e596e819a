"""Norms over the features of a token.

Legend: b batch, s length, c hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over c (Ba et al. 2016, arXiv:1607.06450)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[..., c]`; straight to the operator, for norms of one token are mostly what is around them."""
        return torch.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over c, statistics in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
