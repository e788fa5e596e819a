"""What a mixin has learnt, as PEFT's tensors and configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.peft_layout import Module
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.dora import DoraWeights
from sat_lightning.mixins.ia3 import Factors
from sat_lightning.mixins.lora import LoraWeights
from sat_lightning.mixins.quantized import dense_weight
from sat_lightning.mixins.weight_tuning import WeightTuningMixin

Adapters = Mapping[tuple[str, str], tuple[Any, float]]
"""(Part of the model, place) -> adapter and scale."""
Written = tuple[dict[str, Any], dict[str, Tensor]]


def write_products(modules: Mapping[str, Module], adapters: Adapters, mixin: Any) -> Written:  # noqa: ANN401
    """Write LoRA or DoRA.

    A linear of theirs that holds several parts of ours gets one A of all their ranks and a B in blocks, which is the
    same sum; alpha is what gives their scale.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    covered: Counter[tuple[str, str]] = Counter()
    for name, module in modules.items():
        terms = [term for rows in module.rows for term in _terms(rows, adapters)]
        if not terms:
            continue
        for rows in module.rows:
            covered[rows.owner, rows.place.name] += len(rows.ours)
        # One factor for all is alpha's; where parts have their own, B takes what differs from the first.
        factor = terms[0][3] or 1.0
        ranks[name] = sum(down.shape[0] for _, down, _, _ in terms)
        alphas[name] = factor * ranks[name]
        up = torch.cat([_spread(module, rows, part) * (own / factor) for rows, _, part, own in terms], dim=1)
        down = torch.cat([down for _, down, _, _ in terms])
        if module.rows[0].place.name == "word_embeddings":
            tensors |= {f"{name}.lora_embedding_A": down, f"{name}.lora_embedding_B": up}
            continue
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if any(isinstance(adapters[rows.owner, rows.place.name][0], DoraWeights) for rows in module.rows):
            tensors[f"{name}.lora_magnitude_vector"] = _magnitudes(module, adapters)
    _refuse_uncovered(adapters, covered)
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    is_dora = any(isinstance(adapter, DoraWeights) for adapter, _ in adapters.values())
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": mixin.dropout, "bias": "none",
        "target_modules": sorted(ranks), "use_rslora": False, "use_dora": is_dora, "init_lora_weights": True,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }, tensors  # fmt: skip


def write_factors(modules: Mapping[str, Module], adapters: Adapters, mixin: WeightTuningMixin) -> Written:
    """Write (IA)^3; features of theirs that are not adapted get the factor 1."""
    tensors: dict[str, Tensor] = {}
    feedforward = []
    covered: Counter[tuple[str, str]] = Counter()
    for name, module in modules.items():
        held = {(r.owner, r.place.name): adapters.get((r.owner, r.place.name)) for r in module.rows}
        if not any(held.values()):
            continue
        for rows in module.rows:
            covered[rows.owner, rows.place.name] += len(rows.ours)
        kinds = {found[0].scales_input for found in held.values() if found}
        if kinds == {True} and len(held) == 1:
            adapter, scale = next(iter(held.values()))  # type: ignore[misc]
            tensors[f"{name}.ia3_l"] = adapter.whole(scale).detach()[None]
            feedforward.append(name)
            continue
        if True in kinds:
            raise CheckpointError(f"'{name}' is several linears here, of which some multiply what they read.")
        factors = torch.ones(module.size)
        for rows in module.rows:
            if found := held[rows.owner, rows.place.name]:
                factors[rows.theirs] = found[0].whole(found[1]).detach().float().cpu()[rows.ours]
        if bool((factors != 1).any()) or len(module.rows[0].place.parts) == 0:
            tensors[f"{name}.ia3_l"] = factors[:, None]
    _refuse_uncovered(adapters, covered)
    names = sorted(key.removesuffix(".ia3_l") for key in tensors)
    values = {"peft_type": "IA3", "target_modules": names, "feedforward_modules": sorted(feedforward)}
    return values | {"init_ia3_weights": True}, tensors


def _terms(rows: Any, adapters: Adapters) -> list[tuple[Any, Tensor, Tensor, float]]:  # noqa: ANN401
    """Return rows, A, B of all rows of ours, and factor of every product that reaches these rows."""
    found = adapters.get((rows.owner, rows.place.name))
    if found is None:
        return []
    adapter, scale = found
    if not isinstance(adapter, LoraWeights):
        raise CheckpointError(f"{rows.place.name} has a {type(adapter).__name__}, it must be LoRA.")
    result = []
    for slot, down, part, factor in adapter.terms():
        if adapter.is_table:
            result.append((rows, down.detach().cpu(), part.detach().cpu(), factor * scale))
            continue
        up = torch.zeros(adapter.out_features, part.shape[1], dtype=part.dtype)
        up[slot.start : slot.start + slot.size] = part.detach().cpu()
        if bool(((rows.ours >= slot.start) & (rows.ours < slot.start + slot.size)).any()):
            result.append((rows, down.detach().cpu(), up, factor * scale))
    return result


def _spread(module: Module, rows: Any, up: Tensor) -> Tensor:  # noqa: ANN401
    """Put B of our rows into a B of theirs, zero elsewhere."""
    if rows.place.name == "word_embeddings":
        return up
    result = torch.zeros(module.size, up.shape[1], dtype=up.dtype)
    result[rows.theirs] = up[rows.ours]
    return result


def _magnitudes(module: Module, adapters: Adapters) -> Tensor:
    """Return the trained lengths of their rows; of a row that is not adapted, its own."""
    result = torch.empty(module.size)
    for rows in module.rows:
        own = torch.linalg.norm(dense_weight(rows.place.module).float().cpu(), dim=1)
        if found := adapters.get((rows.owner, rows.place.name)):
            for slot in found[0].slots:
                trained = getattr(found[0].magnitude, str(slot.index)).detach().float().cpu()
                own[slot.start : slot.start + slot.size] = trained
        result[rows.theirs] = own[rows.ours]
    return result


def _refuse_uncovered(adapters: Adapters, covered: Mapping[tuple[str, str], int]) -> None:
    for key, (adapter, _) in adapters.items():
        if not covered.get(key):
            raise CheckpointError(f"{''.join(key)} is no linear of the Hugging Face model. Leave it out of target.")
        if isinstance(adapter, Factors) and adapter.scales_input and covered[key] < adapter.out_features:
            raise CheckpointError(f"{''.join(key)} is cut in theirs, and multiplies what it reads.")
