"""Attention that looks back a bounded way.

Legend: s query length, t key length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin
from sat_lightning.nn.masks import lower_right_causal, reach_back, waiting_keys


class LocalAttentionMixin(BaseMixin):
    """Let layer l's queries see only keys less than `windows[l]` behind them (Beltagy et al. 2020, arXiv:2004.05150).

    It narrows whatever mask there is. With fewer queries than keys (a cache) the last query is the last key's place;
    keys that another mixin appends behind them (`appended_keys` says how many) stay visible.

    Args:
        windows: for each layer how many keys are seen, the query's own among them; None is all.
        is_causal: hide later keys too, whatever the mask.
    """

    def __init__(self, windows: Sequence[int | None], is_causal: bool = False) -> None:
        super().__init__()
        self.windows, self.is_causal = tuple(windows), is_causal

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
        """Narrow the mask of self-attention."""
        appended = kw.get("appended_keys", 0)
        waiting = waiting_keys(kw)
        length = waiting + key.shape[2] - appended
        window = self.windows[kw["layer_id"]]
        hides_later = self.is_causal and query.shape[2] > 1  # behind the last query there is nothing
        is_narrowed = hides_later or (window is not None and window < length)
        if is_narrowed and not kw.get("cross_attention"):
            mask, kw = reach_back(mask, waiting, key.shape[2], kw)
            mask, kw = self._narrow(mask, kw, query, length, appended, window)
        return old_impl(query, key, value, mask, dropout_fn, **kw)

    def _narrow(
        self, mask: Tensor, kw: dict[str, Any], query: Tensor, length: int, appended: int, window: int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        num_queries = query.shape[2]
        causal = lower_right_causal(num_queries, length, query.device)
        is_full, is_causal = mask is kw.get("full_mask"), mask is kw.get("causal_mask")
        band = causal if self.is_causal or is_causal else torch.ones_like(causal)
        if window is not None:
            band = band & ~causal.tril(length - num_queries - window)
        band = torch.cat([band, band.new_ones(num_queries, appended)], dim=1).to(query.dtype)
        if is_full or is_causal:
            narrowed, is_binary = band, True
        else:
            narrowed, is_binary = mask * band, any(mask is known for known in kw.get("binary_masks", ()))
        if is_binary:
            kw = kw | {"binary_masks": (*kw.get("binary_masks", ()), narrowed)}
        if self.is_causal and window is None and not appended and (is_full or is_causal):
            kw = kw | {"causal_mask": narrowed}
        return narrowed, kw
