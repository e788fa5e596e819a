"""Weight-decomposed low-rank adaptation: LoRA turns each row of a weight, and its length is trained apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, HookConflictError
from sat_lightning.mixins.linear_adapter import Adapter, Kept, learned, rows_of, whole
from sat_lightning.mixins.lora import LoraMixin, LoraWeights
from sat_lightning.mixins.places import Place, Slot
from sat_lightning.mixins.quantized import dense_weight
from sat_lightning.mixins.weight_tuning import WeightTuningMixin
from sat_lightning.model import BaseMixin


class DoraWeights(LoraWeights):
    """A and B of one linear, and `magnitude.<j>` `[out_j]`; see `LoraWeights` for the arguments."""

    def __init__(self, place: Place, slots: Sequence[Slot], ranks: Sequence[int], factors: Sequence[float]) -> None:
        super().__init__(place, slots, ranks, factors, is_pissa=False)
        self.magnitude = nn.Module()
        for slot in slots:
            self.magnitude.register_parameter(str(slot.index), learned(place, slot.size))
        if not hasattr(place.module.weight, "ds_tensor"):
            self.reset(place.module)  # under ZeRO-3 `reinit` does it, when all is in its place

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """Begin with the lengths of the rows, so that nothing changes."""
        with whole(module.weight, *self.magnitude.parameters()):
            weight = dense_weight(module)
            for slot in self.slots:
                magnitude = getattr(self.magnitude, str(slot.index))
                magnitude.copy_(_lengths(weight[slot.start : slot.start + slot.size].to(magnitude.dtype)))

    def ratio(self, weight: Tensor, scale: float) -> Tensor:
        """Return trained over present length of every row, 1 for rows that are not adapted: `[out]`."""
        down, up = self.stacked()
        with torch.no_grad():  # the length is a constant to the gradient (section 4.3 of the paper)
            lengths = _lengths(weight.to(down.dtype) + (up @ down) * scale)
        pieces, end = [], 0
        for slot in self.slots:
            rows = lengths[slot.start : slot.start + slot.size]
            pieces += [torch.ones_like(lengths[end : slot.start]), getattr(self.magnitude, str(slot.index)) / rows]
            end = slot.start + slot.size
        return torch.cat([*pieces, torch.ones_like(lengths[end:])])

    def merged(self, weight: Tensor, bias: Tensor | None, scale: float) -> Kept:
        """Turn the rows, and give each its length."""
        ratio = self.ratio(weight, scale).detach().float()[:, None]
        return ratio * (weight + self.delta() * scale), bias


def _lengths(weight: Tensor) -> Tensor:
    return torch.linalg.norm(weight, dim=1)


class DoraMixin(LoraMixin):
    """``m * (W + s B A) / |W + s B A|`` by rows on chosen linears (Liu et al. 2024, arXiv:2402.09353).

    Takes the arguments of `LoraMixin`, except for `init`, which is the default; tables cannot be adapted. `reinit`
    begins anew at the lengths of the rows, after other weights were loaded.
    """

    is_additive = False

    def __init__(self, config: TransformerConfig, **settings: Any) -> None:
        super().__init__(config, **settings)
        if self.init != "default":
            raise ConfigError(f"DoRA begins at the weights themselves; init='{self.init}' is LoraMixin's.")

    def refuse_beside(self, name: str, other: BaseMixin, shared: Sequence[Adapter]) -> None:
        """Refuse to stand on what another makes of the same linears: lengths are those of the weights alone."""
        if shared:
            raise HookConflictError(
                f"DoRA rescales the weight of {shared[0].place_name}, which '{name}' adapts too. Add DoRA before "
                f"'{name}', or merge and remove '{name}' first, or give them different linears by target."
            )
        if not isinstance(other, WeightTuningMixin) and hasattr(other, "linear_forward"):
            raise HookConflictError(
                f"DoRA needs linears to give what their weights say, and '{name}' wraps linear_forward. Use LoraMixin."
            )

    def make_weights(
        self, place: Place, slots: list[Slot], ranks: Sequence[int], factors: Sequence[float]
    ) -> LoraWeights:
        """Build A, B and magnitudes of one linear."""
        if isinstance(place.module, nn.Embedding):
            raise ConfigError("DoRA is for linears. Leave word_embeddings out of target.")
        return DoraWeights(place, slots, ranks, factors)

    def adapt(self, adapter: Any, x: Tensor, *, linear: nn.Module, old_impl: Any, **kw: Any) -> Tensor:
        """Run the linear; add what the product and the new lengths change."""
        output = old_impl(x, linear=linear, **kw)
        weight, bias = dense_weight(linear), linear.bias
        read = self.drop(x)
        if read is not x:
            plain = F.linear(read, weight.to(read.dtype))
        else:
            plain = output if bias is None else output - bias
        ratio = adapter.ratio(weight, self.scale)
        product = adapter(read, torch.zeros_like(output), self.scale, None)
        # What lies between 1 and a ratio near it is nothing in half precision: it is taken before that.
        change = (ratio - 1).to(output.dtype) * plain + ratio.to(output.dtype) * product
        rows = rows_of(kw, self.adapter_id, adapter.place_name, x)
        return output + (change if rows is None else change * rows)
