"""Which experts a token goes to.

Legend: b batch, s length, n tokens (b * s), e experts, k experts a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Linear, normal_init, run_linear


class TopKRoutingMixin(BaseMixin):
    """Send each token to the k experts a learned gate likes best (Shazeer et al. 2017, arXiv:1701.06538; Mixtral).

    Args:
        config: gives layers, width and experts.
        num_experts_per_tok: k.
    """

    runs_linears = True

    def __init__(self, config: TransformerConfig, num_experts_per_tok: int) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        gates = [Linear(config.hidden_size, config.num_experts, False, init) for _ in range(config.num_layers)]
        self.gates, self.num_experts_per_tok = nn.ModuleList(gates), num_experts_per_tok

    def routing_forward(self, hidden_states: Tensor, *, layer_id: int, **kw: Any) -> tuple[Tensor, Tensor]:
        """Return weights `[n, k]`, which sum to 1 over k, and expert indices `[n, k]`."""
        tokens = hidden_states.flatten(0, -2)
        scores = run_linear(self.gates[layer_id], "gates", tokens, layer_id=layer_id, **kw)  # [n, e]
        with torch.autocast(device_type=scores.device.type, enabled=False):
            weights, chosen = scores.float().softmax(-1).topk(self.num_experts_per_tok, dim=-1)
            return weights / weights.sum(-1, keepdim=True), chosen
