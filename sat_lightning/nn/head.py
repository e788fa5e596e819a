"""From hidden states to logits, or straight to the loss.

Legend: b batch, s length, c hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sat_lightning.nn.loss import linear_cross_entropy


def project(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    target_ids: Tensor | None = None,
    loss_reduction: str = "mean",
    multiply: Callable[..., Tensor] = F.linear,
    **kw: object,
) -> Tensor:
    """Score every word, or, when targets are known, return the cross entropy without building the logits.

    A `final_forward` marked `@computes_loss` ends in this call and passes its keywords on.

    Args:
        hidden_states: `[b, s, c]`.
        weight: `[v, c]`.
        bias: `[v]`.
        target_ids: `[b, s]`, the word to predict at each place (already shifted), -100 where there is none.
        loss_reduction: "mean", "sum", or "none" for the loss at each place; see `linear_cross_entropy`.
        multiply: how to multiply for logits: `multiply(hidden_states, weight, bias)`.
        **kw: ignored.

    Returns:
        Logits `[b, s, v]`, or with `target_ids` a scalar (`[b, s]` with "none").
    """
    if target_ids is None:
        return multiply(hidden_states, weight, bias)
    return linear_cross_entropy(hidden_states, weight, target_ids, bias=bias, reduction=loss_reduction)
