"""Prefix-tuning: keys and values of tokens that were never there.

Legend: b batch, h heads, k key/value heads, s query length, t key length, n prefix length, d head size, m inner size of
the projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, HookError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.mixins.linear_adapter import rows_of
from sat_lightning.mixins.sat_form import Arguments, accepts_sat_form, sizes
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.nn.linear import Embedding, InitMethod, Linear, normal_init
from sat_lightning.nn.masks import waiting_keys


def _sat_form(
    num_layers: int, hidden_size_per_attention_head: int, num_attention_heads: int, prefix_len: int
) -> Arguments:
    width = hidden_size_per_attention_head * num_attention_heads
    return (sizes(num_layers, width, num_attention_heads), prefix_len), {}


class PrefixTuningMixin(TuningMixin):
    """Let every token of every layer attend to `prefix_len` learned keys and values too.

    Prefix-tuning (Li and Liang 2021, arXiv:2101.00190) in all layers, as P-tuning v2 (Liu et al. 2021,
    arXiv:2110.07602) has it. They stand behind the sequence, carry no position, and are seen by every query; cross
    attention is left as it is. `scale` multiplies the weight of the prefix before weights are made to sum to 1.

    Args:
        config: gives the sizes.
        prefix_len: n.
        projection_size: m. Keys and values then come out of an MLP over one embedding, which trains more evenly;
            `folded()` is the same prefix without it. Default: they are the parameters themselves.
        first_position: where the positions of the sequence begin: n, where the prefix has those before, as in PEFT's
            files. Relative positions then count the distance to it too.

    Raises:
        ConfigError: for a length below 1.
    """

    @accepts_sat_form(_sat_form)
    def __init__(
        self,
        config: TransformerConfig,
        prefix_len: int = 16,
        projection_size: int | None = None,
        first_position: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        if prefix_len < 1:
            raise ConfigError(f"prefix_len is {prefix_len}, it must be at least 1.")
        self.shape = (2, config.num_key_value_heads, prefix_len, config.head_size)
        self.prefix_len, self.first_position = prefix_len, first_position
        self.tells_rows_apart = not first_position  # a batch has one beginning of positions
        if not first_position:  # the seam stays free
            self.word_embedding_forward = None  # type: ignore[assignment,method-assign]
        init = normal_init(config.init_method_std)
        if projection_size is None:
            self.prefix = nn.ParameterList(self._new_prefix(init) for _ in range(config.num_layers))
        else:
            self.projection = _Projection(config, prefix_len, projection_size)

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, output_cross_layer: dict[str, Any], *, old_impl: Callable[..., Tensor], **kw: Any
    ) -> Tensor:
        """Say where positions begin."""
        output_cross_layer["first_position"] = output_cross_layer.get("first_position", 0) + self.first_position
        return old_impl(input_ids, output_cross_layer=output_cross_layer, **kw)

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
        """Append the layer's prefix `[k, n, d]` to keys and values `[b, k, t, d]` of self-attention."""
        if kw.get("cross_attention") or self.scale == 0.0:
            return old_impl(query, key, value, mask, dropout_fn, **kw)
        more_keys, more_values = self.keys_and_values(kw["layer_id"]).to(key.dtype)
        if self.first_position:
            place = (kw.get("appended_keys", 0), self.prefix_len)
            kw = kw | {"front_keys": (*kw.get("front_keys", ()), place)}
        mask, kw = extend_mask(mask, self._weigh(kw, query, key), key.shape[2], self.prefix_len)
        key, value = (
            torch.cat([x, more.expand(x.shape[0], -1, -1, -1)], dim=2)
            for x, more in ((key, more_keys), (value, more_values))
        )
        return old_impl(query, key, value, mask, dropout_fn, **kw)

    @property
    def scale(self) -> float:
        """Factor to the weight of the prefix, 0 or above."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not value >= 0:
            raise HookError(f"PrefixTuningMixin: scale is {value}; the weight of a prefix cannot be below 0.")
        self._scale = value

    def keys_and_values(self, layer_id: int) -> Tensor:
        """Return a layer's prefix, `[2, k, n, d]`."""
        return self.projection(layer_id, self.shape) if hasattr(self, "projection") else self.prefix[layer_id]

    def folded(self) -> PrefixTuningMixin:
        """Return a new mixin with the same keys and values as plain parameters; put it in the place of this one."""
        with torch.no_grad():
            result = PrefixTuningMixin(self.config, self.prefix_len, first_position=self.first_position)
            for layer_id, prefix in enumerate(result.prefix):
                prefix.copy_(self.keys_and_values(layer_id))
        result.scale = self.scale
        return result

    def _new_prefix(self, init: InitMethod) -> nn.Parameter:
        prefix = nn.Parameter(torch.empty(self.shape))
        init(prefix)  # here, for ZeRO-3 splits what a list holds at once
        return prefix

    def _weigh(self, kw: dict[str, Any], query: Tensor, key: Tensor) -> dict[str, Any]:
        """Extend log attention weights `[1|b, 1|h, 1|s, t]` by the prefix: `scale`, and 0 in rows of other methods."""
        given = kw.get("log_attention_weights")
        # Attention has whole rows, whether layers leave padding out or not.
        rows = rows_of(kw | {"unpadding": None}, self.adapter_id, f"layer {kw['layer_id']}", query)
        if given is None and rows is None and self.scale == 1.0:
            return kw
        given = key.new_zeros(1, 1, 1, 1) if given is None else given
        whole = given.expand(*given.shape[:-1], waiting_keys(kw) + key.shape[2]) if given.shape[-1] == 1 else given
        weights = nn.functional.pad(whole, (0, self.prefix_len), value=math.log(self.scale))
        if rows is not None:  # finite, so that a score is never NaN, and far below that of a key that a mask hides
            hidden = torch.where(rows, whole.new_zeros(()), torch.finfo(whole.dtype).min / 2)
            weights = weights + nn.functional.pad(hidden.expand(-1, -1, -1, self.prefix_len), (whole.shape[-1], 0))
        return {**kw, "log_attention_weights": weights}


PTuningV2Mixin = PrefixTuningMixin
"""SAT's other name."""


class _Projection(nn.Module):
    """An embedding of the prefix, and an MLP that makes keys and values of all layers of it."""

    def __init__(self, config: TransformerConfig, prefix_len: int, inner_size: int) -> None:
        super().__init__()
        init, size = normal_init(config.init_method_std), config.num_key_value_heads * config.head_size
        self.embedding = Embedding(prefix_len, size, normal_init(1.0))
        self.dense = Linear(size, inner_size, True, init)
        self.out = nn.ModuleList(Linear(inner_size, 2 * size, True, init) for _ in range(config.num_layers))

    def forward(self, layer_id: int, shape: tuple[int, ...]) -> Tensor:
        # Again in every layer, which is n tokens' work: a result that travels would be one more thing to keep.
        inner = torch.tanh(self.dense(self.embedding.weight))  # [n, m]
        two, num_heads, length, head_size = shape
        return self.out[layer_id](inner).view(length, two, num_heads, head_size).permute(1, 2, 0, 3)


def extend_mask(mask: Tensor, kw: dict[str, Any], key_length: int, appended: int) -> tuple[Tensor, dict[str, Any]]:
    """Make keys visible that are appended behind the sequence: the mask and the keywords for them.

    What is known of a mask stays known: a full one is full, a causal one lower triangular over the keys before the
    appended ones, of which `appended_keys` holds the number.

    Args:
        mask: of an `attention_fn`.
        kw: its keywords.
        key_length: t, without the appended keys.
        appended: how many are added now.

    Returns:
        The mask `[.., t + appended]`, and new keywords.
    """
    kw = {**kw, "appended_keys": kw.get("appended_keys", 0) + appended}
    if mask is kw.get("full_mask") or (mask is kw.get("causal_mask") and not kw["hooks"].reads_mask):
        return mask, kw  # one element, that stands for all
    # A mask that is wider already knows of keys that a cache is to put in front.
    whole = mask.expand(*mask.shape[:-1], key_length) if mask.shape[-1] == 1 else mask
    extended = torch.cat([whole, whole.new_ones(*whole.shape[:-1], appended)], dim=-1)
    if mask is kw.get("causal_mask"):
        kw["causal_mask"] = extended
    elif any(mask is known for known in kw.get("binary_masks", ())):
        kw["binary_masks"] = (*kw["binary_masks"], extended)
    return extended, kw
