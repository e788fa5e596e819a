"""Keys and values of earlier tokens, written in place into tensors of a fixed size.

Legend: b batch, k key/value heads, s query length, t key length, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.errors import InputError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin
from sat_lightning.nn.masks import leave_out, lower_right_causal, reach_back

Heads = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, ...]
#: Slots of a layer with a window beside those that are needed: its keys are moved once in so many tokens.
_SLACK = 64


class KeyValueCache:
    """What one call of a generator remembers: `[b, k, capacity, d]` keys and values for each layer.

    A forward with `cache=` writes its s new tokens behind the `length` that are there, and attends to all of them; then
    the caller says `cache.advance(s)`. Memory is taken when a layer first writes.

    Where a layer sees only a window, what is out of its sight is forgotten: its memory is bounded by the window, and a
    token's keys are moved to the front once in every `_SLACK` tokens. Positions and masks are those of the whole text.

    Args:
        capacity: tokens it can hold.
        dtype: in which keys and values are kept: a floating dtype, which attention then computes in, or `torch.int8`
            with one scale for each token and head. Default: their own.
        padding: `[b]`, how many of the first tokens of each row are padding, hidden from every query. Default: none.
        windows: by layer, how many keys its queries see, their own among them; a `LocalAttentionMixin` must see to it.
            Layers that are not named see all.
        num_spare: how many of the newest tokens `crop` and `align` may forget again, where there are windows.
    """

    def __init__(
        self,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        padding: Tensor | None = None,
        windows: Mapping[int, int] | None = None,
        num_spare: int = 0,
    ) -> None:
        self.capacity, self.dtype, self.length = capacity, dtype, 0
        self.is_token: Tensor | None = None
        """`[b, 1, 1, capacity]`, False where a slot holds padding; None where no slot does."""
        if padding is not None:
            slots = torch.arange(capacity, device=padding.device)
            self.is_token = (slots >= padding[:, None])[:, None, None]
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        """Keys and values by layer; under `torch.int8` followed by their scales `[b, k, capacity, 1]`."""
        self.cross: dict[int, Heads] = {}
        """Keys and values of the encoder's outputs by layer: the `encoder_outputs` of every later call."""
        self.dropped = 0
        """How many of the oldest tokens layers with a window have forgotten."""
        self._num_seen = max((windows or {}).values(), default=1) - 1  # tokens that a new one sees, in such layers
        self._num_kept = self._num_seen + num_spare
        self._room = self._num_kept + num_spare + _SLACK
        self._num_next = num_spare + 1  # tokens for which there is always room
        self._rolling = frozenset(windows or ()) if self._room < capacity else frozenset()

    def write(self, layer_id: int, key: Tensor, value: Tensor) -> Heads:
        """Store s new tokens `[b, k, s, d]` of a layer, and return all that they may see.

        Returns:
            Keys and values `[b, k, length + s, d]`; of a layer with a window only the last of them.

        Raises:
            InputError: if they do not fit.
        """
        start, stop = self.length, self.length + key.shape[2]
        if stop > self.capacity:
            raise InputError(
                f"The cache holds {start} tokens of at most {self.capacity}, {key.shape[2]} more do not fit. Make it "
                f"with capacity={stop} or above."
            )
        if layer_id not in self.layers:
            self.layers[layer_id] = self._allocate(key, value, self._room if layer_id in self._rolling else None)
        buffers, first = self.layers[layer_id], 0
        new = (*_quantise(key), *_quantise(value)) if self.dtype is torch.int8 else (key, value)
        if layer_id in self._rolling:
            start, stop, first = (
                start - self.dropped,
                stop - self.dropped,
                max(start - self.dropped - self._num_seen, 0),
            )
        if stop <= buffers[0].shape[2]:
            _put(buffers, new, start)
            held = [buffer.narrow(2, first, stop - first) for buffer in buffers]
        else:
            held = self._replace(buffers, new, first, start)
        if self.dtype is torch.int8:
            return held[0] * held[1].to(key.dtype), held[2] * held[3].to(value.dtype)
        return held[0], held[1]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that the last forward wrote as held."""
        self.length += num_tokens
        held = self.length - self.dropped
        if not self._rolling or held + self._num_next <= self._room:
            return
        if held <= self._room:  # otherwise `write` has done it
            for layer_id in self._rolling & self.layers.keys():
                for buffer in self.layers[layer_id]:
                    buffer[:, :, : self._num_kept] = buffer[:, :, held - self._num_kept : held].clone()
        self.dropped = self.length - self._num_kept

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            InputError: if the next token would see some that were forgotten before.
        """
        length = min(self.length, length)
        if self.dropped > max(length - self._num_seen, 0):
            raise InputError(
                f"A cache with windows cannot go back from {self.length} tokens to {length}: it holds those from "
                f"{self.dropped} on, and the next sees {self._num_seen} before it. Make it with a larger num_spare."
            )
        self.length = length

    def align(self, ends: Tensor, counts: Tensor, length: int) -> None:
        """Let each row keep tokens up to a slot of its own, and put them one beneath the other again.

        Args:
            ends: `[b]`, the slot behind the newest token that row i keeps.
            counts: `[b]`, how many tokens it then has; the slots before them are hidden.
            length: slots held afterwards, the newest token of each row in the last.
        """
        places = torch.arange(self.capacity, device=ends.device)
        dropped = max(length - self._num_kept, 0) if self._rolling else 0
        source = ends[:, None] - length + places[:length]
        for layer_id, buffers in self.layers.items():
            is_rolling = layer_id in self._rolling
            slots = source[:, dropped:] - self.dropped if is_rolling else source
            for buffer in buffers:
                index = slots.clamp(min=0)[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
                buffer[:, :, : index.shape[2]] = buffer.gather(2, index)
        self.is_token = (places >= (length - counts)[:, None])[:, None, None]
        self.length, self.dropped = length, dropped

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row `rows[i]` holds, `[b]`; the number of rows may change."""
        for layer_id, buffers in self.layers.items():
            if buffers[0].shape[0] != rows.shape[0]:
                grown = [x.new_empty(rows.shape[0], *x.shape[1:]) for x in buffers]
                self.layers[layer_id] = tuple(grown)
            held = self.length - self.dropped if layer_id in self._rolling else self.length
            for new, buffer in zip(self.layers[layer_id], buffers, strict=True):
                new[:, :, :held].copy_(buffer[:, :, :held].index_select(0, rows))
        self.cross = {i: (k.index_select(0, rows), v.index_select(0, rows)) for i, (k, v) in self.cross.items()}
        if self.is_token is not None:
            self.is_token = self.is_token.index_select(0, rows)

    def _allocate(self, key: Tensor, value: Tensor, num_slots: int | None) -> tuple[Tensor, ...]:
        def room(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
            return like.new_empty(*like.shape[:2], num_slots or self.capacity, size, dtype=dtype)

        if self.dtype is torch.int8:
            pairs = [(room(x, x.shape[3], torch.int8), room(x, 1, torch.float32)) for x in (key, value)]
            return (*pairs[0], *pairs[1])
        return tuple(room(x, x.shape[3], self.dtype or x.dtype) for x in (key, value))

    def _replace(self, buffers: Tensors, new: Tensors, first: int, start: int) -> list[Tensor]:
        """Return tokens from slot `first` to `start` and new ones that are too many to be kept; keep the newest."""
        pairs = zip(buffers, new, strict=True)
        joined = [torch.cat([old[:, :, first:start], x.to(old.dtype)], dim=2) for old, x in pairs]
        _put(buffers, [x[:, :, x.shape[2] - self._num_kept :] for x in joined], 0)
        return joined


class StaticCacheMixin(BaseMixin):
    """Attend to what a `KeyValueCache` holds, when the call has one: `model(input_ids, ..., cache=cache)`.

    Without `cache` it does nothing. Keys that another mixin appends behind the sequence (`appended_keys` says how many)
    are not stored. A mask tensor over the new tokens alone lets them see all that is held. What the mixin wraps hears
    `is_cached`: somebody remembers these keys already.
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
        cache: KeyValueCache | None = None,
        mask_of_cache: tuple[Tensor, Tensor, bool] | None = None,
        **kw: Any,
    ) -> Tensor:
        """Store the new keys and values, and attend to all."""
        if cache is None:
            return old_impl(query, key, value, mask, dropout_fn, **kw)
        if kw.get("cross_attention"):
            if kw["layer_id"] not in cache.cross:
                cache.cross[kw["layer_id"]] = kw["mem_cross"]
            return old_impl(query, key, value, mask, dropout_fn, **kw)
        num_new = key.shape[2]
        key, value = _exchange(cache, key, value, kw)
        if cache.is_token is None:
            mask, kw = reach_back(mask, cache.length, num_new, kw)
        else:
            if mask_of_cache is None or mask_of_cache[0] is not mask:  # most layers have the same
                mask_of_cache = (mask, *_widen(mask, cache.is_token, query, cache.length + num_new, kw))
            kw["output_cross_layer"]["mask_of_cache"] = mask_of_cache
            _, mask, is_binary = mask_of_cache
            kw["binary_masks"] = (*kw.get("binary_masks", ()), mask) if is_binary else kw.get("binary_masks", ())
        if num_gone := cache.length + num_new - key.shape[2]:
            mask, kw = leave_out(mask, num_gone, key.shape[2], kw)
        context = old_impl(query.to(key.dtype), key, value, mask, dropout_fn, **kw, is_cached=True)
        return context.to(query.dtype)


def _put(buffers: Sequence[Tensor], tensors: Sequence[Tensor], start: int) -> None:
    for buffer, new in zip(buffers, tensors, strict=True):
        buffer.narrow(2, start, new.shape[2]).copy_(new)


def _quantise(x: Tensor) -> Heads:
    """Return whole numbers from -127 to 127, and the scale of each token and head, `[b, k, s, 1]`."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return (x / scale).round().to(torch.int8), scale


def _exchange(cache: KeyValueCache, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Heads:
    """Give the cache the new tokens for all it holds; appended keys stay behind."""
    appended = kw.get("appended_keys", 0)
    if not appended:
        return cache.write(kw["layer_id"], key, value)
    length = key.shape[2] - appended
    held = cache.write(kw["layer_id"], key[:, :, :length], value[:, :, :length])
    rest = (x[:, :, length:].to(held[0].dtype) for x in (key, value))
    joined = [torch.cat(pair, dim=2) for pair in zip(held, rest, strict=True)]
    return joined[0], joined[1]


def _widen(mask: Tensor, is_token: Tensor, query: Tensor, t: int, kw: dict[str, Any]) -> tuple[Tensor, bool]:
    """Return the mask over all t keys, without padding, and whether it is known to hold only 0 and 1."""
    s, appended = query.shape[2], kw.get("appended_keys", 0)
    length = t - appended
    if mask is kw.get("causal_mask") or mask is kw.get("full_mask"):
        is_causal, is_binary = mask is kw.get("causal_mask") and s > 1, True
        rows = s if is_causal else 1
        mask = lower_right_causal(s, length, query.device) if is_causal else query.new_ones(rows, length)
        mask = nn.functional.pad(mask.to(query.dtype), (0, appended), value=1.0)
    else:
        is_binary = any(mask is known for known in kw.get("binary_masks", ()))
        if mask.shape[-1] not in (1, t):
            mask = nn.functional.pad(mask, (t - mask.shape[-1], 0), value=1.0)
    shown = nn.functional.pad(is_token[..., :length], (0, appended), value=True)
    return mask * shown.to(query.dtype), is_binary
