"""A cache of keys and values that the caller carries from call to call, as SAT's.

Legend: b batch, k key/value heads, s new tokens, t tokens before them, d head size.

    call 1  ids [b, t]                             -> mem_kv of every layer [b, t, 2kd]
    call 2  ids [b, s], mems [layers, b, t, 2kd]   -> mem_kv of every layer [b, s, 2kd]      2kd = [ k heads | v heads ]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.errors import InputError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin
from sat_lightning.nn.masks import reach_back


class CachedAutoregressiveMixin(BaseMixin):
    """Turn a model trained with teacher forcing into a cached generator.

    Every call gives the keys and values of its tokens back as each layer's `mem_kv` `[b, s, 2 * k * d]`, keys already
    rotated; stacked, they are the `mems` `[num_layers, b|1, t, 2 * k * d]` of the next call, whose tokens see them. A
    decoder's cross attention gives (keys, values) `[b, k, s, d]` as `mem_cross`: the list of them, one for each layer,
    takes the place of `encoder_outputs` in later calls. A step of training gives nothing back, and is as without the
    mixin.

    With `mems` the attention mask has columns for all keys, `[.., s, t + s]`; where it has them for the new tokens
    only, as `"causal"` has, the past is visible. Positions count on: omitted, they begin at t.
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
        mems: Tensor | None = None,
        **kw: Any,
    ) -> Tensor:
        """Attend to the past and to the new tokens, and give back the new ones' keys and values."""
        kept = ("mem_cross", kw.get("mem_cross", (key, value)))
        if not kw.get("cross_attention"):
            length = key.shape[2] - kw.get("appended_keys", 0)  # behind them stands what is no token
            kept = ("mem_kv", _pack(key[:, :, :length], value[:, :, :length]))
            if mems is not None:
                past = self._unpack(mems, key, kw["layer_id"])
                mask, kw = reach_back(mask, past[0].shape[2], key.shape[2], kw)
                key, value = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
        context = old_impl(query, key, value, mask, dropout_fn, **kw)
        if not (self.transformer.training and torch.is_grad_enabled()):
            kw["output_this_layer"][kept[0]] = kept[1]  # last, for GLM-130B's own has the same name
        return context

    def _unpack(self, mems: Tensor, key: Tensor, layer_id: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[b, k, t, d]` of a layer's past."""
        (b, k, _, d), num_layers = key.shape, self.transformer.config.num_layers
        shape = list(mems.shape)
        if len(shape) != 4 or shape[0] != num_layers or shape[1] not in (1, b) or shape[3] != 2 * k * d:
            raise InputError(
                f"mems has shape {shape}; for {b} rows it must be [{num_layers} layers, {b}, length, {2 * k * d}], the "
                f"last being 2 * {k} key/value heads * {d} features. Pass the mems of an earlier call of this model."
            )
        past = mems[layer_id].to(key.dtype).unflatten(-1, (2, k, d)).expand(b, -1, -1, -1, -1)  # [b, t, 2, k, d]
        past_key, past_value = past.permute(2, 0, 3, 1, 4)
        return past_key, past_value


def _pack(key: Tensor, value: Tensor) -> Tensor:
    """Lay keys and values `[b, k, s, d]` out as `[b, s, k heads | v heads]`."""
    return torch.stack((key, value), dim=1).permute(0, 3, 1, 2, 4).flatten(2).detach()
