"""What every token attends to.

Legend: b batch, h heads, k key/value heads, s query length, t key length, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin


class AttentionMapsMixin(BaseMixin):
    """Give the weights of attention as each layer's `attention_map` `[b, h, s, t]`, whatever kernel computes them.

    Attention is linear in its values: values that are columns of the identity give columns of the weights, d at a time.
    What a prefix adds of its own is subtracted, so that of its weights only what is missing to a sum of 1 is seen. It
    takes about t / d times the attention of a call: add it for the calls that need it. Cross attention has no map.
    """

    @non_conflict
    @passes_mask
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        dropout_fn: nn.Module | None,
        *,
        old_impl: Callable[..., Tensor],
        **kw: Any,
    ) -> Tensor:
        """Attend, and give back the weights."""
        if not kw.get("cross_attention"):
            aside: dict[str, Any] = {name: {} for name in ("output_this_layer", "output_cross_layer") if name in kw}
            size = value.shape[3]

            def attend(values: Tensor) -> Tensor:
                return old_impl(query, key, values.expand_as(value), mask, None, **(kw | aside))

            nothing = attend(value.new_zeros(1))
            identity = torch.eye(value.shape[2], dtype=value.dtype, device=value.device)
            columns = F.pad(identity, (0, -value.shape[2] % size)).split(size, dim=1)  # each [t, d]
            weights = torch.cat([attend(part) - nothing for part in columns], dim=3)
            kw["output_this_layer"]["attention_map"] = weights[..., : value.shape[2]]
        return old_impl(query, key, value, mask, dropout_fn, **kw)
