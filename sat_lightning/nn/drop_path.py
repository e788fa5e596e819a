"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Zero whole samples of a residual branch, and scale the others up (Huang et al. 2016, arXiv:1603.09382).

    Args:
        x: the branch, `[b, ...]`.
        drop_prob: probability that a sample is zeroed.
        training: outside training the branch passes unchanged.

    Returns:
        A tensor of the same shape, equal to `x` in expectation.
    """
    if drop_prob == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(1.0 - drop_prob)
    return x * keep.div_(1.0 - drop_prob)
