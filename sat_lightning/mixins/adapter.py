"""Bottleneck adapters: a narrow MLP behind, or beside, attention and MLP of every layer.

Legend: b batch, s length, c hidden size, m adapter size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, nearest
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.mixins.linear_adapter import of_own_rows
from sat_lightning.mixins.sat_form import Arguments, accepts_sat_form, sizes
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.nn.linear import InitMethod, Linear, normal_init

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel

_PLACES = ("attention", "mlp")


def _sat_form(num_layers: int, hidden_size: int, adapter_hidden: int) -> Arguments:
    return (sizes(num_layers, hidden_size), adapter_hidden), {"runs_post": True}


class AdapterMixin(TuningMixin):
    """Add ``ff2(gelu(ff1(x)))`` to what attention gives, and ``ff4(gelu(ff3(x)))`` to what the MLP gives.

    x is that output itself (Houlsby et al. 2019, arXiv:1902.00751), or with `is_parallel` what attention or MLP read
    (He et al. 2021, arXiv:2110.04366). Either way it is added before the residual, and in sandwich order before the
    norm that closes the branch: whatever `layernorm_order` is, the layer stays as it is around it. ff2 and ff4 start at
    0, so that a new adapter changes nothing.

    Args:
        config: gives the sizes.
        adapter_hidden: m.
        is_parallel: whether it reads the input of the branch instead of its output.
        places: `attention`, `mlp` or both; only the MLP's is Pfeiffer's form (arXiv:2005.00247).
        runs_post: run the layers in post order, whatever `layernorm_order` is, as SAT did under its adapters. SAT's
            arguments set it, and so does loading a checkpoint of SAT's, whose report says so.

    Raises:
        ConfigError: for a size below 1 or an unknown place.
    """

    @accepts_sat_form(_sat_form)
    def __init__(
        self,
        config: TransformerConfig,
        adapter_hidden: int = 64,
        *,
        is_parallel: bool = False,
        places: Sequence[str] = _PLACES,
        runs_post: bool = False,
    ) -> None:
        super().__init__()
        if adapter_hidden < 1:
            raise ConfigError(f"adapter_hidden is {adapter_hidden}, it must be at least 1.")
        for place in places:
            if place not in _PLACES:
                raise ConfigError(f"places: '{place}' is none, there are {list(_PLACES)}.{nearest(place, _PLACES)}")
        self.is_parallel, self.places = is_parallel, tuple(places)
        sizes = config.hidden_size, adapter_hidden
        init, count = normal_init(config.init_method_std), config.num_layers
        if "attention" in places:
            self.ff1, self.ff2 = bottlenecks(count, *sizes, init)
        if "mlp" in places:
            self.ff3, self.ff4 = bottlenecks(count, *sizes, init)
        self.runs_post = runs_post

    def run_post(self) -> None:
        """Run the layers in post order from now on, and record it as a setting."""
        args, settings = self.init_arguments
        object.__setattr__(self, "init_arguments", (args, {**settings, "runs_post": True}))
        self.runs_post = True
        if self._owner is not None:
            self._take_layers(self._owner)
            self._owner._resolve()

    def added_to(self, model: BaseModel) -> None:
        """Take the seam of layers where it is needed only: a hook there costs every layer; see `BaseMixin.added_to`."""
        self._take_layers(model)
        super().added_to(model)

    def _take_layers(self, model: BaseModel) -> None:
        reorders = self.runs_post and model.config.layernorm_order != "post"
        self.tells_rows_apart = not reorders  # all rows run in that order
        if reorders:
            self.layer_forward = self._layer_forward

    @passes_mask
    def _layer_forward(self, hidden_states: Tensor, mask: Tensor, *, layer_id: int, **kw: Any) -> Tensor:
        return self.transformer.layers[layer_id].run_post(hidden_states, mask, layer_id=layer_id, **kw)

    @non_conflict
    @passes_mask
    def attention_forward(
        self, hidden_states: Tensor, mask: Tensor, *args: Any, old_impl: Callable[..., Tensor], **kw: Any
    ) -> Tensor:
        """Adapt what self-attention gives: `[b, s, c]` to `[b, s, c]`."""
        output = old_impl(hidden_states, mask, *args, **kw)
        if "attention" not in self.places:
            return output
        return self._adapt(hidden_states, output, self.ff1[kw["layer_id"]], self.ff2[kw["layer_id"]], kw)

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        """Adapt what the MLP gives: `[b, s, c]` to `[b, s, c]`."""
        output = old_impl(hidden_states, **kw)
        if "mlp" not in self.places:
            return output
        return self._adapt(hidden_states, output, self.ff3[kw["layer_id"]], self.ff4[kw["layer_id"]], kw)

    def _adapt(self, x: Tensor, output: Tensor, down: nn.Module, up: nn.Module, kw: dict[str, Any]) -> Tensor:
        change = up(F.gelu(down(x if self.is_parallel else output)))
        change = of_own_rows(change, kw, self.adapter_id, f"layer {kw['layer_id']}")
        return output + (change if self.scale == 1.0 else change * self.scale)


def bottlenecks(count: int, outer: int, inner: int, init: InitMethod) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return for each layer a linear to the inner size, and one back that starts at 0."""
    down = nn.ModuleList(Linear(outer, inner, True, init) for _ in range(count))
    up = nn.ModuleList(Linear(inner, outer, True, nn.init.zeros_) for _ in range(count))
    return down, up
