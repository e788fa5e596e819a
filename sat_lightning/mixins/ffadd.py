"""More inner features for the MLPs of some layers.

Legend: b batch, s length, c hidden size, r added features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins.linear_adapter import of_own_rows
from sat_lightning.mixins.sat_form import Arguments, accepts_sat_form, sizes
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.nn.linear import Linear, normal_init


def _sat_form(hidden_size: int, layer_num: int = 24, r: int = 0, layer_range: Sequence[int] | None = None) -> Arguments:
    return (sizes(layer_num, hidden_size), r, layer_range), {}


class FFADDMixin(TuningMixin):
    """Add ``linear1(act(linear0(x)))`` to the MLP of x, with the MLP's own activation: the MLP widened by r features.

    linear1 starts at 0, so that it changes nothing at first.

    Args:
        config: gives the sizes.
        r: added features.
        layer_range: layers that are widened. Default: all.

    Raises:
        ConfigError: for r below 1, or a layer that is not there.
    """

    tells_rows_apart = True

    @accepts_sat_form(_sat_form)
    def __init__(self, config: TransformerConfig, r: int = 32, layer_range: Sequence[int] | None = None) -> None:
        super().__init__()
        layers = range(config.num_layers) if layer_range is None else layer_range
        if r < 1:
            raise ConfigError(f"r is {r}, it must be at least 1.")
        if any(not 0 <= layer_id < config.num_layers for layer_id in layers) or not layers:
            raise ConfigError(f"layer_range is {list(layers)}; layers are 0 to {config.num_layers - 1}.")
        init, outer = normal_init(config.init_method_std), config.hidden_size
        self.ffadd_linear = nn.ModuleDict({
            str(layer_id): nn.ModuleList([Linear(outer, r, True, init), Linear(r, outer, True, nn.init.zeros_)])
            for layer_id in layers
        })  # fmt: skip

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        """Widen the MLP of a layer: `[b, s, c]` to `[b, s, c]`."""
        output, key = old_impl(hidden_states, **kw), str(kw["layer_id"])
        if key not in self.ffadd_linear:
            return output
        pair: Any = self.ffadd_linear[key]
        inner = self.transformer.layers[kw["layer_id"]].mlp.activation_func(pair[0](hidden_states))
        change = of_own_rows(pair[1](inner), kw, self.adapter_id, f"layer {key}")
        return output + (change if self.scale == 1.0 else change * self.scale)
