"""Self-attention and cross attention: projections around an `attention_fn`.

Legend: b batch, h heads, k key/value heads, s query length, t key length, d head size, c hidden size.

Multi-head attention has k = h; grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) lets h / k query heads
share a key/value head; multi-query attention (Shazeer 2019, arXiv:1911.02150) has k = 1. Rows of the fused projection:

    query_key_value.weight   [ q head 0 | ... | q head h-1 | k head 0 | ... | k head k-1 | v head 0 | ... ]
    key_value.weight                                       [ k head 0 | ... | k head k-1 | v head 0 | ... ]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.hooks import HookTable
from sat_lightning.nn.linear import InitMethod, Linear, apply_linear, drop_out
from sat_lightning.nn.rotary import rotate
from sat_lightning.nn.unpadding import put_back, take_out

Heads = tuple[Tensor, Tensor]


def split_heads(x: Tensor, head_size: int) -> Tensor:
    """View `[b, s, h * d]` as `[b, h, s, d]`."""
    return x.unflatten(-1, (-1, head_size)).transpose(1, 2)


def split_into_heads(mixed: Tensor, sizes: list[int], head_size: int) -> list[Tensor]:
    """View parts of the last axis of `[b, s, sum(sizes)]` as heads, `[b, size / d, s, d]` each."""
    heads = mixed.reshape(*mixed.shape[:2], -1, head_size).split_with_sizes([size // head_size for size in sizes], 2)
    return [part.transpose(1, 2) for part in heads]


def merge_heads(x: Tensor) -> Tensor:
    """Lay `[b, h, s, d]` out as `[b, s, h * d]`."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Queries, keys and values of the same tokens.

    Args:
        config: sizes, biases and dropout.
        init_method: of `query_key_value`.
        output_init_method: of `dense`.
    """

    def __init__(self, config: TransformerConfig, init_method: InitMethod, output_init_method: InitMethod) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.num_multi_query_heads = config.num_multi_query_heads
        self.hidden_size_per_attention_head = config.head_size
        self.inner_hidden_size = config.num_attention_heads * config.head_size
        key_value_size = config.num_key_value_heads * config.head_size
        self.sizes = [self.inner_hidden_size, key_value_size, key_value_size]
        self.rotary_interleaved = config.rotary_interleaved
        has_bias = config.use_bias or config.use_qkv_bias
        self.query_key_value = Linear(config.hidden_size, sum(self.sizes), has_bias, init_method)
        self.dense = Linear(self.inner_hidden_size, config.hidden_size, config.use_bias, output_init_method)
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, mask: Tensor, *args: Any, hooks: HookTable, **kw: Any) -> Tensor:
        """Ask the `attention_forward` hook, or answer: `[b, s, c]` to `[b, s, c]`."""
        return (self.attend if hooks.attention_forward is None else hooks.attention_forward)(
            hidden_states, mask, *args, hooks=hooks, **kw
        )

    def attend(self, hidden_states: Tensor, mask: Tensor, *, hooks: HookTable, **kw: Any) -> Tensor:
        """Project, turn, attend, project."""
        mixed = put_back(apply_linear(self, "query_key_value", hidden_states, hooks=hooks, **kw), kw)
        query, key, value = split_into_heads(mixed, self.sizes, self.hidden_size_per_attention_head)
        query, key = (self.turn if hooks.query_key_forward is None else hooks.query_key_forward)(
            query, key, hooks=hooks, **kw
        )
        context = hooks.attention_fn(query, key, value, mask, dropout_of(self), hooks=hooks, **kw)  # [b, h, s, d]
        output = apply_linear(self, "dense", take_out(merge_heads(context), kw), hooks=hooks, **kw)
        return drop_out(self.output_dropout, output)

    def turn(self, query: Tensor, key: Tensor, *, rotary: Heads | None = None, **kw: Any) -> Heads:
        """Rotate queries and keys by their positions, in models with rotary embedding."""
        if rotary is None:
            return query, key
        return rotate(query, *rotary, self.rotary_interleaved), rotate(key, *rotary, self.rotary_interleaved)


class CrossAttention(nn.Module):
    """Queries of these tokens, keys and values of an encoder's outputs.

    Args:
        config: sizes, biases and dropout.
        init_method: of `query` and `key_value`.
        output_init_method: of `dense`.
    """

    def __init__(self, config: TransformerConfig, init_method: InitMethod, output_init_method: InitMethod) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.cross_num_multi_query_heads = config.cross_num_multi_query_heads
        self.hidden_size_per_attention_head = config.cross_head_size
        self.inner_hidden_size = config.num_attention_heads * config.cross_head_size
        num_heads = config.cross_num_multi_query_heads or config.num_attention_heads
        self.sizes = [num_heads * config.cross_head_size] * 2
        encoder_size = config.cross_attn_hidden_size or config.hidden_size
        self.query = Linear(config.hidden_size, self.inner_hidden_size, config.use_bias, init_method)
        self.key_value = Linear(encoder_size, sum(self.sizes), config.use_bias, init_method)
        self.dense = Linear(self.inner_hidden_size, config.hidden_size, config.use_bias, output_init_method)
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Tensor,
        encoder_outputs: Any,
        *,
        hooks: HookTable,
        **kw: Any,
    ) -> Tensor:
        """Ask the `cross_attention_forward` hook, or answer: `[b, s, c]` to `[b, s, c]`."""
        hook = self.attend if hooks.cross_attention_forward is None else hooks.cross_attention_forward
        return hook(hidden_states, cross_attention_mask, encoder_outputs, hooks=hooks, **kw)

    def attend(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Tensor,
        encoder_outputs: Any,
        *,
        hooks: HookTable,
        **kw: Any,
    ) -> Tensor:
        """Project, attend to the encoder, project.

        `encoder_outputs` is `[b, t, e]`, or for each layer the (key, value) that an earlier call gave as `mem_cross`.
        """
        query = put_back(apply_linear(self, "query", hidden_states, hooks=hooks, **kw), kw)
        query = split_heads(query, self.hidden_size_per_attention_head)
        if isinstance(encoder_outputs, Tensor):
            mixed = apply_linear(self, "key_value", encoder_outputs, hooks=hooks, **kw)
            key, value = split_into_heads(mixed, self.sizes, self.hidden_size_per_attention_head)
        else:
            key, value = encoder_outputs[kw["layer_id"]]
        given = (key, value)
        if key.shape[0] != query.shape[0]:  # one text read, several written
            if key.shape[0] != 1:
                raise InputError(
                    f"encoder_outputs have {key.shape[0]} rows, the tokens {query.shape[0]}: give 1 or as many."
                )
            key, value = (x.expand(query.shape[0], -1, -1, -1) for x in given)
        context = hooks.attention_fn(
            query, key, value, cross_attention_mask, dropout_of(self),
            hooks=hooks, **{**kw, "cross_attention": True, "mem_cross": given},
        )  # fmt: skip
        output = apply_linear(self, "dense", take_out(merge_heads(context), kw), hooks=hooks, **kw)
        return drop_out(self.output_dropout, output)


def dropout_of(attention: SelfAttention | CrossAttention) -> nn.Dropout | None:
    """Return the dropout of attention weights while it acts: an `attention_fn` gets None otherwise."""
    return attention.attention_dropout if attention.training else None
