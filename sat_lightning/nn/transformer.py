"""The one backbone: embeddings, layers, final norm, and the default of every seam.

Legend: b batch, s length, c hidden size, v vocabulary, r rotated features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.hooks import HookTable, computes_loss
from sat_lightning.nn.attention_fn import attention_fn_default
from sat_lightning.nn.front import read_front
from sat_lightning.nn.head import project
from sat_lightning.nn.layer import NormFactory, TransformerLayer
from sat_lightning.nn.linear import Embedding, InitMethod, drop_out, normal_init, scaled_normal_init
from sat_lightning.nn.masks import MaskLike, make_masks
from sat_lightning.nn.mlp import Activation, gelu
from sat_lightning.nn.norm import LayerNorm
from sat_lightning.nn.rotary import RotaryEmbedding
from sat_lightning.nn.unpadding import make_unpadding, put_back, take_out

Carry = dict[str, Any]


class Transformer(nn.Module):
    """A plain transformer, in which hooks may speak at every seam.

    Args:
        config: the architecture.
        activation_func: of the MLPs. Default: tanh-GELU.
        layernorm: called as `layernorm(hidden_size, eps=...)`.
        init_method: fills weights in place. Default: normal with `config.init_method_std`, and linears that write to
            the residual stream with that divided by sqrt(2 * `num_layers`).
        params_dtype: of the parameters. Default: torch's.
        has_position_table: whether positions are learned, where they are not rotary; without it a mixin brings them.
        residual_scale: factor on the residual where a branch is added to it (DeepNorm).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        activation_func: Activation = gelu,
        layernorm: NormFactory = LayerNorm,
        init_method: InitMethod | None = None,
        params_dtype: torch.dtype | None = None,
        has_position_table: bool = True,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        std = config.init_method_std
        self.init_method = init_method or normal_init(std)
        self.output_layer_init_method = init_method or scaled_normal_init(std, config.num_layers)
        self.embedding_dropout = nn.Dropout(config.hidden_dropout)
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, normal_init(std))
        self.position_embeddings = self._make_position_embeddings(has_position_table)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                layer_id,
                activation_func=activation_func,
                layernorm=layernorm,
                init_method=self.init_method,
                output_init_method=self.output_layer_init_method,
                residual_scale=residual_scale,
            )
            for layer_id in range(config.num_layers)
        )
        if config.use_final_layernorm:
            self.final_layernorm = layernorm(config.hidden_size, eps=config.layernorm_epsilon)
        if params_dtype is not None:
            self.to(params_dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: MaskLike,
        *,
        hooks: HookTable,
        output_hidden_states: bool = False,
        token_indices: Tensor | None = None,
        **kw: Any,
    ) -> list[Any]:
        """Run the forward that `sat_lightning.hooks` draws; see `BaseModel.forward` for arguments and result."""
        carry: Carry = {}
        words = hooks.word_embedding_forward(input_ids, output_cross_layer=carry, **kw)
        if front := read_front(carry):
            position_ids = front.number(position_ids, self._num_positions(hooks))
            attention_mask, kw = front.extend(attention_mask), front.extend_others(kw)
        unpadding = make_unpadding(token_indices, input_ids, words, front, hooks)
        hidden_states = self.add_positions(words, position_ids, carry, hooks, **kw)
        kw, mask = self._add_masks(attention_mask, hidden_states, hooks, kw)
        if isinstance(self.position_embeddings, RotaryEmbedding) and position_ids is not None:
            kw["rotary"] = self.position_embeddings(position_ids, hidden_states.dtype)
        kw |= {"hooks": hooks, "position_ids": position_ids}
        more = {} if unpadding is None else {"unpadding": unpadding}
        hidden_states, per_layer = self._run_layers(hidden_states, mask, carry, output_hidden_states, **kw, **more)
        if front is not None:
            hidden_states = front.cut(hidden_states)
        return [hooks.final_forward(hidden_states, parallel_output=self.config.parallel_output, **kw), *per_layer]

    def _run_layers(
        self, hidden_states: Tensor, mask: Tensor, carry: Carry, output_hidden_states: bool, **kw: Any
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Run all layers and the final norm: `[b, s, c]` to `[b, s, c]`, and what each layer leaves behind."""
        if "unpadding" in kw:
            self._refuse_drop_path()
        hidden_states = take_out(hidden_states, kw)
        per_layer: list[dict[str, Any]] = []
        for start, stop, is_kept in self.blocks():
            run: Callable[..., Any] = partial(self._run_block, start, stop, output_hidden_states, **kw)
            if not is_kept and torch.is_grad_enabled():
                run = partial(checkpoint, run, use_reentrant=False)
            hidden_states, outputs, carry = run(hidden_states, mask, carry)
            per_layer += outputs
        if self.config.use_final_layernorm:
            hidden_states = self.final_layernorm(hidden_states)
        return put_back(hidden_states, kw), per_layer

    def _refuse_drop_path(self) -> None:
        if self.config.drop_path and self.training:
            raise InputError(
                f"token_indices were given, and drop_path is {self.config.drop_path}: it drops whole rows, and layers "
                "then do not see rows. Leave token_indices out, or set drop_path to 0."
            )

    def add_positions(
        self, words: Tensor, position_ids: Tensor | None, carry: Carry, hooks: HookTable, **kw: Any
    ) -> Tensor:
        """Add position embeddings to word embeddings `[b, s, c]`; hooks may write to `carry` for layer 0."""
        if hooks.looks_up_positions and self.position_embeddings is not None:
            self._check_positions(position_ids, words)
        positions = hooks.position_embedding_forward(position_ids, output_cross_layer=carry, **kw)
        if positions is not None:
            if positions.shape[-2] != words.shape[1] and position_ids is None:
                # Tokens in front of a whole table have no positions.
                positions = F.pad(positions, (0, 0, words.shape[1] - positions.shape[-2], 0))
            words = words + positions
        return drop_out(self.embedding_dropout, words)

    def blocks(self) -> list[tuple[int, int, bool]]:
        """Return the layers as (start, stop, whether activations are kept)."""
        config, count = self.config, self.config.num_layers
        if not (config.checkpoint_activations and self.training):
            return [(0, count, True)]
        last = count - config.checkpoint_skip_layers
        starts = range(0, last, config.checkpoint_num_layers)
        blocks = [(start, min(start + config.checkpoint_num_layers, last), False) for start in starts]
        return [*blocks, (last, count, True)] if last < count else blocks

    def _run_block(
        self, start: int, stop: int, output_hidden_states: bool, hidden_states: Tensor, mask: Tensor, carry: Carry,
        **kw: Any,
    ) -> tuple[Tensor, list[dict[str, Any]], Carry]:  # fmt: skip
        outputs = []
        for layer_id in range(start, stop):
            layer = self.layers[layer_id]
            # The mask goes by keyword: ZeRO-3 hands a module copies of its positional tensors, and masks are known by
            # which object they are.
            hidden_states, this_layer, carry = layer(hidden_states, mask=mask, carry=carry, layer_id=layer_id, **kw)
            if output_hidden_states:
                this_layer["hidden_states"] = put_back(hidden_states, kw)
            outputs.append(this_layer)
        return hidden_states, outputs, carry

    def _add_masks(
        self, attention_mask: MaskLike, like: Tensor, hooks: HookTable, kw: dict[str, Any]
    ) -> tuple[dict[str, Any], Tensor]:
        sizes: dict[str, Any] = {"batch_size": like.shape[0], "query_length": like.shape[1], "like": like}
        mask, known = make_masks(attention_mask, materialise=hooks.reads_mask, **sizes)
        if kw.get("encoder_outputs") is not None:
            cross_mask, known = make_masks(kw.get("cross_attention_mask"), known=known, **sizes)
            known = known | {"cross_attention_mask": cross_mask}
        return {**kw, **known}, mask

    # ---- the default of every seam: what the backbone does where nobody else speaks

    def word_embedding_forward(self, input_ids: Tensor, **kw: Any) -> Tensor:
        """Look words up: `[b, s]` to `[b, s, c]`."""
        return self.word_embeddings(input_ids)

    def position_embedding_forward(self, position_ids: Tensor, **kw: Any) -> Tensor | None:
        """Look positions up: `[s]` or `[b|1, s]` to `[.., s, c]`; None where there is no table."""
        return self.position_embeddings(position_ids) if isinstance(self.position_embeddings, Embedding) else None

    def layer_forward(self, hidden_states: Tensor, mask: Tensor, *args: Any, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer itself."""
        return self.layers[layer_id].block(hidden_states, mask, layer_id=layer_id, **kw)

    def attention_forward(self, hidden_states: Tensor, mask: Tensor, *args: Any, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer's self-attention itself."""
        return self.layers[layer_id].attention.attend(hidden_states, mask, layer_id=layer_id, **kw)

    def query_key_forward(self, query: Tensor, key: Tensor, *, layer_id: int, **kw: Any) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys where positions are rotary."""
        return self.layers[layer_id].attention.turn(query, key, **kw)

    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        dropout_fn: nn.Module | None = None,
        **kw: Any,
    ) -> Tensor:
        """Attend by the configured backend; see `attention_fn_default`."""
        kw["attention_backend"] = self.config.attention_backend
        return attention_fn_default(query, key, value, mask, dropout_fn, **kw)

    def cross_attention_forward(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Tensor,
        encoder_outputs: Any,
        *,
        layer_id: int,
        **kw: Any,
    ) -> Tensor:
        """Run the layer's cross attention itself."""
        attend = self.layers[layer_id].cross_attention.attend
        return attend(hidden_states, cross_attention_mask, encoder_outputs, layer_id=layer_id, **kw)

    def mlp_forward(self, hidden_states: Tensor, *, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer's MLP itself."""
        return self.layers[layer_id].mlp.feed(hidden_states, layer_id=layer_id, **kw)

    def routing_forward(self, hidden_states: Tensor, *, layer_id: int, **kw: Any) -> tuple[Tensor, Tensor]:
        """Route at random; see `MLP.route`."""
        return self.layers[layer_id].mlp.route(hidden_states, **kw)

    def linear_forward(self, x: Tensor, *, linear: nn.Module, **kw: Any) -> Tensor:
        """Apply the linear."""
        return linear(x)

    @computes_loss
    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Score every word by its embedding: `[b, s, c]` to `[b, s, v]`, or the loss when `target_ids` is given."""
        return project(logits, self.word_embeddings.weight, **kw)

    def _make_position_embeddings(self, has_table: bool) -> nn.Module | None:
        config = self.config
        if not config.is_rotary_emb:
            if not has_table:
                return None
            return Embedding(config.max_sequence_length, config.hidden_size, normal_init(config.init_method_std))
        dim = config.rotary_dim or config.hidden_size // config.num_attention_heads
        return RotaryEmbedding(dim, config.rotary_base, config.rotary_interleaved, config.rope_scaling)

    def _num_positions(self, hooks: HookTable) -> int | None:
        table = self.position_embeddings
        return table.num_embeddings if isinstance(table, Embedding) and hooks.looks_up_positions else None

    def _check_positions(self, position_ids: Tensor | None, hidden_states: Tensor) -> None:
        length = hidden_states.shape[1]
        if position_ids is None:
            raise InputError("position_ids is None, and no hook makes positions. Pass [length] or [batch, length].")
        if position_ids.dim() > 2 or position_ids.shape[-1] != length:
            raise InputError(
                f"position_ids has shape {list(position_ids.shape)}; for sequences of {length} tokens it must be "
                f"[{length}] or [batch, {length}]. Other shapes need a position_embedding_forward hook."
            )
        if position_ids.dim() == 2 and position_ids.shape[0] not in (1, hidden_states.shape[0]):
            raise InputError(
                f"position_ids has {position_ids.shape[0]} rows, input_ids {hidden_states.shape[0]}. Give 1 or as many."
            )
