"""Relative position bias: how far apart two tokens are, in buckets.

Legend: h heads, s query length, t key length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Embedding, normal_init
from sat_lightning.nn.masks import waiting_keys


def relative_buckets(
    query_length: int, key_length: int, *, num_buckets: int, is_bidirectional: bool, max_distance: int, device: Any
) -> Tensor:
    """Number the distance of every query and key: near ones singly, far ones in ever wider buckets.

    Args:
        query_length: s; the last query stands at the last key.
        key_length: t.
        num_buckets: how many numbers there are.
        is_bidirectional: whether keys behind a query have buckets of their own; otherwise they count as distance 0.
        max_distance: from here on all distances share the last bucket.
        device: of the result.

    Returns:
        `[s, t]` integers.
    """
    queries = torch.arange(key_length - query_length, key_length, device=device)[:, None]
    distance = queries - torch.arange(key_length, device=device)[None]
    offset = torch.zeros_like(distance)
    if is_bidirectional:
        num_buckets //= 2
        offset = (distance < 0) * num_buckets
        distance = distance.abs()
    else:
        distance = distance.clamp(min=0)
    exact = num_buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    wide = (exact + far.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, wide)


class RelativeBiasMixin(BaseMixin):
    """Add a learned bias for each head and bucket of distance to scores that are not scaled (T5, arXiv:1910.10683).

    One table serves all layers of a stack; layer 0 makes the bias, later layers receive it. Cross attention has none.

    Args:
        config: gives heads.
        num_buckets: rows of the table.
        is_bidirectional: whether keys behind a query count, as in an encoder.
        max_distance: distances from here on share a bucket.
    """

    def __init__(
        self, config: TransformerConfig, num_buckets: int, *, is_bidirectional: bool, max_distance: int = 128
    ) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        self.relative_attention_bias = Embedding(num_buckets, config.num_attention_heads, init)
        self.buckets = {"num_buckets": num_buckets, "is_bidirectional": is_bidirectional, "max_distance": max_distance}

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
        position_bias: Tensor | None = None,
        **kw: Any,
    ) -> Tensor:
        """Attend with unscaled scores, in self-attention with the bias `[1, h, s, t]`."""
        kw["scaling_attention_score"] = False
        if kw.get("cross_attention"):
            return old_impl(query, key, value, mask, dropout_fn, **kw)
        if position_bias is None:
            length = key.shape[2] + waiting_keys(kw)
            position_bias = self._bias(query, length, kw.get("appended_keys", 0), kw.get("front_keys", ()))
        kw["output_cross_layer"]["position_bias"] = position_bias
        given = kw.pop("log_attention_weights", None)
        bias = position_bias if given is None else position_bias + given
        return old_impl(query, key, value, mask, dropout_fn, log_attention_weights=bias, **kw)

    def _bias(self, query: Tensor, length: int, appended_keys: int, front_keys: Sequence[tuple[int, int]]) -> Tensor:
        """Return the bias of all keys; of those appended, `front_keys` (first, number) stand before the sequence."""
        num_front = sum(number for _, number in front_keys)
        num_keys = num_front + length - appended_keys
        buckets = relative_buckets(query.shape[2], num_keys, device=query.device, **self.buckets)  # type: ignore[arg-type]
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]  # [1, h, s, t]
        if not appended_keys:
            return bias
        in_front, bias = bias[..., :num_front], bias[..., num_front:]
        for first, number in front_keys:
            missing = length - appended_keys + first - bias.shape[-1]
            bias = torch.cat([nn.functional.pad(bias, (0, missing)), in_front[..., :number]], dim=-1)
            in_front = in_front[..., number:]
        return nn.functional.pad(bias, (0, length - bias.shape[-1]))
