"""The head that guesses masked words."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import computes_loss
from sat_lightning.model import BaseMixin
from sat_lightning.nn.head import project
from sat_lightning.nn.linear import Linear, normal_init
from sat_lightning.nn.norm import LayerNorm


class _Head(nn.Module):
    """dense, GELU, norm, decoder."""

    def __init__(self, config: TransformerConfig, epsilon: float) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        self.dense = Linear(config.hidden_size, config.hidden_size, True, init)
        self.layer_norm = LayerNorm(config.hidden_size, eps=epsilon)
        self.decoder = Linear(config.hidden_size, config.vocab_size, True, init)


class MaskedLMHeadMixin(BaseMixin):
    """Score every word by ``decoder(norm(gelu(dense(x))))`` with weights of its own: `[b, s, c]` to `[b, s, v]`.

    Args:
        config: gives the sizes.
        epsilon: of the norm; SAT's is 1e-5 whatever `layernorm_epsilon` is.
    """

    def __init__(self, config: TransformerConfig, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.lm_head = _Head(config, epsilon)

    @computes_loss
    def final_forward(self, logits: Tensor, **kw: Any) -> Tensor:
        """Return the logits, or the mean cross entropy when `target_ids` is given."""
        head = self.lm_head
        features = head.layer_norm(F.gelu(head.dense(logits)))
        return project(features, head.decoder.weight, bias=head.decoder.bias, **kw)
