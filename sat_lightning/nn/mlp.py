"""The MLP of a layer, plain, gated, or one of several experts.

Legend: b batch, s length, c hidden size, n tokens (b * s), e experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import HookTable
from sat_lightning.nn.linear import InitMethod, Linear, apply_linear, drop_out

Activation = Callable[[Tensor], Tensor]
Activate = Callable[[Tensor, Tensor], Tensor]
"""`activate(x, inner)`: from the input `[..., c]` and `dense_h_to_4h(x)`, what `dense_4h_to_h` reads."""


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, fused: ``0.5 x (1 + tanh(0.79788456 (x + 0.044715 x^3)))`` (arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linears around an activation.

    plain: ``dense_4h_to_h(act(dense_h_to_4h(x)))``; gated: ``dense_4h_to_h(act(dense_h_to_4h_gate(x)) *
    dense_h_to_4h(x))`` (Shazeer 2020, arXiv:2002.05202). Expert 0 has these names, expert j > 0 the suffix `_j`.

    Args:
        config: sizes, biases, gate, experts and dropout.
        activation_func: act.
        init_method: of the linears that read the residual stream.
        output_init_method: of the linears that write to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        activation_func: Activation,
        init_method: InitMethod,
        output_init_method: InitMethod,
    ) -> None:
        super().__init__()
        self.hidden_size, self.inner_hidden_size = config.hidden_size, config.inner_size
        self.is_gated_mlp, self.num_experts = config.is_gated_mlp, config.num_experts
        self.activation_func = activation_func
        outer, inner = config.hidden_size, config.inner_size
        for expert_id in range(config.num_experts):
            suffix = _suffix(expert_id)
            self.add_module(f"dense_h_to_4h{suffix}", Linear(outer, inner, config.use_bias, init_method))
            self.add_module(f"dense_4h_to_h{suffix}", Linear(inner, outer, config.use_bias, output_init_method))
            if config.is_gated_mlp:
                self.add_module(f"dense_h_to_4h_gate{suffix}", Linear(outer, inner, False, init_method))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor, *, hooks: HookTable, **kw: Any) -> Tensor:
        """Ask the `mlp_forward` hook, or answer: `[b, s, c]` to `[b, s, c]`."""
        feed = self.feed if hooks.mlp_forward is None else hooks.mlp_forward
        return drop_out(self.dropout, feed(hidden_states, hooks=hooks, **kw))

    def feed(self, hidden_states: Tensor, *, hooks: HookTable, activate: Activate | None = None, **kw: Any) -> Tensor:
        """Run the MLP, or route every token to its experts; a mixin with a gate of its own gives `activate`."""
        if self.num_experts == 1:
            return self.expert(hidden_states, 0, activate=activate, hooks=hooks, **kw)
        weights, chosen = (self.route if hooks.routing_forward is None else hooks.routing_forward)(
            hidden_states, hooks=hooks, **kw
        )  # [n, k] both
        tokens = hidden_states.flatten(0, -2)  # [n, c]
        # Where shapes may not depend on data every expert sees every token, and the others' weights are 0.
        combine = self._combine_dense if torch.compiler.is_compiling() else self._combine_chosen
        return combine(tokens, weights.to(tokens.dtype), chosen, hooks=hooks, **kw).view_as(hidden_states)

    def expert(self, x: Tensor, expert_id: int, *, activate: Activate | None = None, **kw: Any) -> Tensor:
        """Run one expert on tokens `[..., c]`."""
        suffix = _suffix(expert_id)
        inner = apply_linear(self, f"dense_h_to_4h{suffix}", x, **kw)
        if activate is not None:
            inner = activate(x, inner)
        elif self.is_gated_mlp:
            inner = self.activation_func(apply_linear(self, f"dense_h_to_4h_gate{suffix}", x, **kw)) * inner
        else:
            inner = self.activation_func(inner)
        return apply_linear(self, f"dense_4h_to_h{suffix}", inner, **kw)

    def route(self, hidden_states: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        """Choose two experts a token at random, as SAT does: an example; a real model adds a `routing_forward`.

        Returns:
            Weights `[n, k]` and expert indices `[n, k]`.
        """
        num_tokens = hidden_states.shape[:-1].numel()
        logits = torch.randn(num_tokens, self.num_experts, device=hidden_states.device, dtype=torch.float32)
        weights, chosen = logits.softmax(-1).topk(min(2, self.num_experts), dim=-1)
        return (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype), chosen

    def _combine_chosen(self, tokens: Tensor, weights: Tensor, chosen: Tensor, **kw: Any) -> Tensor:
        """Gather each expert's tokens, run it, add the results up; an expert without tokens still gets gradients."""
        output = torch.zeros_like(tokens)
        for expert_id in range(self.num_experts):
            rows, ranks = torch.where(chosen == expert_id)
            result = self.expert(tokens[rows], expert_id, **kw) * weights[rows, ranks, None]
            output = output.index_add(0, rows, result.to(output.dtype))
        return output

    def _combine_dense(self, tokens: Tensor, weights: Tensor, chosen: Tensor, **kw: Any) -> Tensor:
        shares = tokens.new_zeros(tokens.shape[0], self.num_experts).scatter_add(1, chosen, weights)  # [n, e]
        results = [self.expert(tokens, i, **kw) * shares[:, i, None] for i in range(self.num_experts)]
        return torch.stack(results).sum(0)


def _suffix(expert_id: int) -> str:
    return f"_{expert_id}" if expert_id else ""
