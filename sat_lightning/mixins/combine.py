"""One LoRA out of several: their weighted sum, exactly or in as few ranks as one can afford."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, HookError
from sat_lightning.mixins.dora import DoraMixin
from sat_lightning.mixins.lora import LoraMixin
from sat_lightning.mixins.places import Slot
from sat_lightning.model import BaseModel


@torch.no_grad()
def combine_loras(model: BaseModel, weights: Mapping[str, float], name: str, rank: int | None = None) -> LoraMixin:
    """Add a LoRA that does what several do together, each by its weight; they themselves are disabled.

    Args:
        model: holds them.
        weights: name of a `LoraMixin` -> its factor, beside its own `scale`; 1 for all is what the model does now.
        name: of the new mixin.
        rank: of the new products. Default: the sum of the ranks, which is exact; a smaller one keeps the largest
            singular values, the best that can be done in that rank.

    Returns:
        The new mixin; its alpha is its rank, so that B A itself is added.

    Raises:
        HookError: if a name is no LoRA that could be added up, or is merged.
    """
    sources = {one: model.get_mixin(one) for one in weights}
    for one, mixin in sources.items():
        if not isinstance(mixin, LoraMixin) or isinstance(mixin, DoraMixin) or mixin.is_merged:
            state = "is merged" if getattr(mixin, "is_merged", False) else f"is a {type(mixin).__name__}"
            raise HookError(f"combine_loras: '{one}' {state}; products of LoraMixins can be added up, unmerged.")
    if not sources or (rank is not None and rank < 1):
        raise ConfigError(
            f"combine_loras: weights are {dict(weights)} and rank {rank}; give names, and a rank above 0."
        )
    products = _products(sources, weights)
    found = {slot.name: _shrink(pairs, rank) for slot, pairs in products.items()}
    chosen = {one: down.shape[0] for one, (down, _) in found.items()}
    patterns = {f"^{re.escape(one)}$": own for one, own in chosen.items()}
    mixin = LoraMixin(
        model.config,
        rank=max(chosen.values()),
        alpha=1.0,
        target=list(patterns),
        rank_pattern=patterns,
        alpha_pattern={pattern: float(own) for pattern, own in patterns.items()},
    )
    model.add_mixin(name, mixin)
    for adapter in mixin._adapters.values():
        for slot in adapter.slots:
            for own, value in zip(adapter.pair(str(slot.index)), found[slot.name], strict=True):
                own.copy_(value)
    for source in sources.values():
        source.disable()
    return mixin


def _products(sources: Mapping[str, Any], weights: Mapping[str, float]) -> dict[Slot, list[tuple[Tensor, Tensor]]]:
    """Return A and weighted B of all sources for every adapted part."""
    found: dict[Slot, list[tuple[Tensor, Tensor]]] = {}
    for one, mixin in sources.items():
        for adapter in mixin._adapters.values():
            for slot, down, up, factor in adapter.terms():
                found.setdefault(slot, []).append((down, up * (factor * mixin.scale * weights[one])))
    names = [slot.name for slot in found]
    for name in names:
        if split := [other for other in names if other.startswith(f"{name}.")]:
            raise HookError(f"combine_loras: one adapts {name} as one, another in parts ({', '.join(split)}).")
    return found


def _shrink(pairs: list[tuple[Tensor, Tensor]], rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the sum of products as one of that rank, or a lower one where it has no more."""
    down, up = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], dim=1)
    if rank is None or down.shape[0] <= rank:
        return down, up
    # The singular vectors of the product, by those of its thin factors: no matrix of full size is made.
    (left, left_root), (right, right_root) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().t())
    inner_left, values, inner_right = torch.linalg.svd(left_root @ right_root.t(), full_matrices=False)
    root = values[:rank].sqrt()
    new_down = root[:, None] * (inner_right[:rank] @ right.t())
    return new_down.to(down.dtype), (left @ inner_left[:, :rank] * root).to(up.dtype)
