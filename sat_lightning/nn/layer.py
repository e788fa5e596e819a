"""One transformer layer, in three orders of its norms.

Legend: b batch, s length, c hidden size. LN1 is `input_layernorm`, LN2 `post_attention_layernorm`, LN3
`third_layernorm`, LN4 `fourth_layernorm`, LNx `post_cross_attention_layernorm`.

pre (GPT-2)                     post (BERT, as SAT lays it out)       sandwich (CogView)

  x ──┬─ LN1 ─ attention ─┐       x ─ LN1 ─┬─ attention ─┐              x ──┬─ LN1 ─ attention ─ LN3 ─┐
      └───────────────── (+)               └─────────── (+)                 └─────────────────────── (+)
  y ──┬─ LNx ─ cross ────┐        m = LN2 ─┬─ cross ─────┐              y ──┬─ LNx ─ cross ──────────┐
      └───────────────── (+)               └─────────── (+)                 └─────────────────────── (+)
  z ──┬─ LN2 ─ mlp ──────┐        m = LNx ─┬─ mlp ───────┐              z ──┬─ LN2 ─ mlp ─ LN4 ──────┐
      └───────────────── (+)               └─────────── (+)                 └─────────────────────── (+)

In post order the normalised value is the residual, and the norm after the last addition is the next layer's LN1 (or the
final norm). Without cross attention that row, with its LNx, is absent. With `residual_scale` a the straight line into
each (+) carries a * x (DeepNorm, Wang et al. 2022, arXiv:2203.00555).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import HookError
from sat_lightning.hooks import RESERVED, HookTable
from sat_lightning.nn.attention import CrossAttention, SelfAttention
from sat_lightning.nn.drop_path import drop_path
from sat_lightning.nn.linear import InitMethod
from sat_lightning.nn.mlp import MLP, Activation
from sat_lightning.nn.norm import LayerNorm

NormFactory = Callable[..., nn.Module]
LayerOutput = tuple[Tensor, dict[str, Any], dict[str, Any]]


class TransformerLayer(nn.Module):
    """Attention, cross attention in decoders, and MLP, each with a residual connection.

    Args:
        config: the architecture.
        layer_id: which layer this is, from 0.
        activation_func: of the MLP.
        layernorm: called as `layernorm(hidden_size, eps=...)`.
        init_method: of linears that read the residual stream.
        output_init_method: of linears that write to it.
        residual_scale: factor on the residual where a branch is added to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_id: int,
        *,
        activation_func: Activation,
        layernorm: NormFactory = LayerNorm,
        init_method: InitMethod,
        output_init_method: InitMethod,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.layer_id, self.layernorm_order, self.drop_path = layer_id, config.layernorm_order, config.drop_path
        self.is_decoder, self.residual_scale = config.layer_is_decoder(layer_id), residual_scale
        inits = (init_method, output_init_method)

        def norm() -> nn.Module:
            return layernorm(config.hidden_size, eps=config.layernorm_epsilon)

        self.input_layernorm = norm()
        self.attention = SelfAttention(config, *inits)
        self.post_attention_layernorm = norm()
        if config.layernorm_order == "sandwich":
            self.third_layernorm, self.fourth_layernorm = norm(), norm()
        if self.is_decoder:
            self.cross_attention = CrossAttention(config, *inits)
            self.post_cross_attention_layernorm = norm()
        self.mlp = MLP(config, activation_func, *inits)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor,
        *,
        hooks: HookTable,
        carry: dict[str, Any],
        **kw: Any,
    ) -> LayerOutput:
        """One pure step: the two dicts a hook may write are born and die here.

        `carry` is what the previous layer wrote to `output_cross_layer`: keywords of this layer's hooks. Returns hidden
        states `[b, s, c]`, what hooks wrote to `output_this_layer`, and to `output_cross_layer`.
        """
        if clash := carry.keys() & (RESERVED | kw.keys()):
            raise HookError(
                f"output_cross_layer holds {sorted(clash)}, already keyword(s) of the next layer. Choose other keys."
            )
        this_layer: dict[str, Any] = {}
        cross_layer: dict[str, Any] = {}
        hidden_states = (self.block if hooks.layer_forward is None else hooks.layer_forward)(
            hidden_states, mask, hooks=hooks, **kw, **carry,
            output_this_layer=this_layer, output_cross_layer=cross_layer,
        )  # fmt: skip
        if isinstance(hidden_states, tuple):  # hooks from SAT's first versions return a tuple
            hidden_states = hidden_states[0]
        return hidden_states, this_layer, cross_layer

    def block(self, hidden_states: Tensor, mask: Tensor, **kw: Any) -> Tensor:
        """Run the layer in its norm order: `[b, s, c]` to `[b, s, c]`."""
        run = self.run_post if self.layernorm_order == "post" else self._pre
        return run(hidden_states, mask, **kw)

    def _pre(self, x: Tensor, mask: Tensor, **kw: Any) -> Tensor:
        is_sandwich = self.layernorm_order == "sandwich"
        attended = self.attention(self.input_layernorm(x), mask=mask, **kw)
        x = self._add(x, self._drop(self.third_layernorm(attended) if is_sandwich else attended))
        if self._crosses(kw):
            x = self._add(x, self.cross_attention(self.post_cross_attention_layernorm(x), **kw))
        fed = self.mlp(self.post_attention_layernorm(x), **kw)
        return self._add(x, self._drop(self.fourth_layernorm(fed) if is_sandwich else fed))

    def run_post(self, x: Tensor, mask: Tensor, **kw: Any) -> Tensor:
        """Run the layer in post order, whatever its own is: `[b, s, c]` to `[b, s, c]`."""
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(self._add(x, self._drop(self.attention(x, mask=mask, **kw))))
        if self._crosses(kw):
            x = self.post_cross_attention_layernorm(self._add(x, self.cross_attention(x, **kw)))
        return self._add(x, self._drop(self.mlp(x, **kw)))

    def _add(self, residual: Tensor, branch: Tensor) -> Tensor:
        return (residual if self.residual_scale == 1.0 else residual * self.residual_scale) + branch

    def _drop(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, self.training) if self.training else branch

    def _crosses(self, kw: dict[str, Any]) -> bool:
        return self.is_decoder and kw.get("encoder_outputs") is not None
