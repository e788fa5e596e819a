"""A gate beside the MLP, with weights of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Linear, normal_init, run_linear


class GatedMLPMixin(BaseMixin):
    """Multiply the inner features by those of a second linear (Shazeer 2020, arXiv:2002.05202).

    ``dense_4h_to_h(act(gate(x)) * dense_h_to_4h(x))``, or with the activation on the other factor. New models set
    `is_gated_mlp` instead; this is how older checkpoints hold the gate.

    Args:
        config: gives the sizes.
        name: of the list of gates, which is its prefix in the state dict.
        activates_gate: whether the activation is on the gate, or on `dense_h_to_4h`.
        bias: whether a gate has one.
    """

    runs_linears = True

    def __init__(
        self, config: TransformerConfig, *, name: str, activates_gate: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        gates = [Linear(config.hidden_size, config.inner_size, bias, init) for _ in range(config.num_layers)]
        self.add_module(name, nn.ModuleList(gates))
        self.name, self.activates_gate = name, activates_gate

    def mlp_forward(self, hidden_states: Tensor, *, layer_id: int, **kw: Any) -> Tensor:
        """Run the layer's MLP with this gate."""
        mlp, linear = self.transformer.layers[layer_id].mlp, getattr(self, self.name)[layer_id]

        def activate(x: Tensor, inner: Tensor) -> Tensor:
            gate = run_linear(linear, self.name, x, layer_id=layer_id, **kw)
            inner = mlp.activation_func(gate) * inner if self.activates_gate else mlp.activation_func(inner) * gate
            return self.finish(inner, layer_id)

        return mlp.feed(hidden_states, activate=activate, layer_id=layer_id, **kw)

    def finish(self, inner: Tensor, layer_id: int) -> Tensor:
        """Return what `dense_4h_to_h` reads of the gated features; a subclass may change them."""
        return inner
