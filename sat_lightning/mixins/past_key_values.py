"""Keys and values of earlier tokens, handed in and out by the caller.

Legend: b batch, k key/value heads, s query length, t key length, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin


class PastKeyValuesMixin(BaseMixin):
    """Prepend `past_key_values` to keys and values, and give the whole back as each layer's `past_key_values`.

    While training nothing is given back: it would keep every layer's keys and values alive.

    Args:
        is_length_first: tensors are `[t, b, k, d]` instead of `[b, k, t, d]`.
    """

    def __init__(self, is_length_first: bool = False) -> None:
        super().__init__()
        self.is_length_first = is_length_first

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
        past_key_values: Sequence[tuple[Tensor, Tensor] | None] | None = None,
        **kw: Any,
    ) -> Tensor:
        """Attend to past and present keys; `past_key_values` has a pair (keys, values) for each layer."""
        past = None if past_key_values is None else past_key_values[kw["layer_id"]]
        if past is not None:
            key, value = (torch.cat([self._read(old), new], dim=2) for old, new in zip(past, (key, value), strict=True))
        if not self.training:
            length = key.shape[2] - kw.get("appended_keys", 0)  # a prefix is there again the next time
            kw["output_this_layer"]["past_key_values"] = (
                self._write(key[:, :, :length]),
                self._write(value[:, :, :length]),
            )
        return old_impl(query, key, value, mask, dropout_fn, **kw)

    def length_of(self, past_key_values: Sequence[tuple[Tensor, Tensor] | None] | None) -> int:
        """Return how many tokens the past holds."""
        first = past_key_values[0] if past_key_values else None
        return 0 if first is None else first[0].shape[0 if self.is_length_first else 2]

    def _read(self, x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3) if self.is_length_first else x

    def _write(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3) if self.is_length_first else x
