"""(IA)^3: a trained factor for each feature of keys, values and the inner MLP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.mixins.linear_adapter import Adapter, Kept, learned, rows_of
from sat_lightning.mixins.places import Place, Slot
from sat_lightning.mixins.weight_tuning import WeightTuningMixin

TARGET = (r"attention\.(query_key_value|key_value)\.(key|value)$", r"mlp\.dense_4h_to_h(_\d+)?$")


class Factors(Adapter):
    """One factor a feature of a linear: `factors.<j>` `[out_j]`, or `[in]` where `scales_input`.

    Args:
        place: the linear.
        slots: its adapted parts.
        scales_input: whether the features are those that the linear reads.
    """

    def __init__(self, place: Place, slots: Sequence[Slot], scales_input: bool) -> None:
        super().__init__(place, slots)
        self.scales_input, self.factors = scales_input, nn.Module()
        for slot in slots:
            size = self.in_features if scales_input else slot.size
            self.factors.register_parameter(str(slot.index), learned(place, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with 1, which changes nothing."""
        for factors in self.factors.parameters():
            nn.init.ones_(factors)

    def forward(self, x: Tensor, scale: float, rows: Tensor | None) -> Tensor:
        """Multiply `[..., features]`, in the precision of the factors: half of it has few numbers around 1."""
        factors = self.whole(scale)
        return (x * (factors if rows is None else torch.where(rows, factors, torch.ones_like(factors)))).to(x.dtype)

    def whole(self, scale: float) -> Tensor:
        """Return the factors of all features, 1 for those without: `[features]`."""
        pieces, end = [], 0
        for slot in self.slots:
            factors = getattr(self.factors, str(slot.index))
            if scale != 1.0:
                factors = 1 + (factors - 1) * scale
            if self.scales_input:
                return factors
            pieces += [factors.new_ones(slot.start - end), factors]
            end = slot.start + slot.size
        return torch.cat([*pieces, pieces[-1].new_ones(self.out_features - end)])

    def merged(self, weight: Tensor, bias: Tensor | None, scale: float) -> Kept:
        """Multiply rows and bias, or columns."""
        factors = self.whole(scale).detach().float()
        if self.scales_input:
            return weight * factors, bias
        return weight * factors[:, None], None if bias is None else bias * factors


class IA3Mixin(WeightTuningMixin):
    """Multiply what chosen linears give, or read, by a trained vector (Liu et al. 2022, arXiv:2205.05638).

    Args:
        config: the model's.
        target: regular expressions over the names of linears; see `mixins.places`. Default: keys, values, and the
            linear behind the MLP's activation.
        feedforward: of these, the linears whose input is multiplied, and not the output.

    Raises:
        ConfigError: when added to a model, for a pattern that matches nothing.
    """

    is_additive = False

    def __init__(
        self,
        config: TransformerConfig,
        *,
        target: str | Sequence[str] = TARGET,
        feedforward: str | Sequence[str] = r"mlp\.dense_4h_to_h",
    ) -> None:
        super().__init__(config, target)
        self.feedforward = [feedforward] if isinstance(feedforward, str) else list(feedforward)

    def make_adapter(self, place: Place, slots: list[Slot]) -> Factors:
        """Build the factors of one linear."""
        if isinstance(place.module, nn.Embedding):
            raise ConfigError("IA3 is for linears. Leave word_embeddings out of target.")
        reads = any(re.search(pattern, place.name) for pattern in self.feedforward)
        if reads and len(slots) > 1:
            raise ConfigError(f"feedforward: the parts of {place.name} read one input. Name it whole: '{place.name}$'.")
        return Factors(place, slots, reads)

    def adapt(self, adapter: Any, x: Tensor, *, linear: nn.Module, old_impl: Any, **kw: Any) -> Tensor:
        """Run the linear, and multiply before or behind it."""
        rows = rows_of(kw, self.adapter_id, adapter.place_name, x)
        if adapter.scales_input:
            return old_impl(adapter(x, self.scale, rows), linear=linear, **kw)
        return adapter(old_impl(x, linear=linear, **kw), self.scale, rows)
