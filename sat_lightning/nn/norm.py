"""Norms over the features of a token.

Legend: b batch, s length, c hidden size.
"""

from __future__ import annotations

from torch import nn

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over c (Ba et al. 2016, arXiv:1607.06450)."""


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over c, statistics in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
