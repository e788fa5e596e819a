"""A fine-tuned model as a plain one: what can be is put into the weights of the base."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sat_lightning.checkpoint.native import all_mixins
from sat_lightning.errors import CheckpointError, nearest
from sat_lightning.mixins.quantized import QuantizedBaseMixin, dequantize_base
from sat_lightning.mixins.weight_tuning import WeightTuningMixin
from sat_lightning.model.composed import owner_of
from sat_lightning.model.registry import AnyModel


def merge_adapters(model: AnyModel, keep: Collection[str] = ()) -> list[str]:
    """Merge every method of fine-tuning into the weights, and remove it; heads of new tasks stay as they are.

    Those that are disabled are removed only. One that is merged already is removed, and its weights stay. Linears of 4
    bits become dense.

    Args:
        model: changed in place, in the order in which its methods were added.
        keep: names of mixins that may stay, `<part>.<name>` in composed models.

    Returns:
        The names of what was merged.

    Raises:
        CheckpointError: if a method cannot be in the weights (a prefix, say) and is not to be kept; the model is then
            as it was.
        HookError: if merging a method would not be right; see `WeightTuningMixin.merge`.
    """
    present = dict(all_mixins(model))
    if unknown := [name for name in keep if name not in present]:
        raise CheckpointError(
            f"No mixin is named '{unknown[0]}', to be kept; there are {list(present)}.{nearest(unknown[0], present)}"
        )
    methods = {name: mixin for name, mixin in present.items() if mixin.freezes_base and name not in keep}
    for name, mixin in methods.items():
        # One without parameters of its own has trained the base's, which hold it already.
        if not isinstance(mixin, WeightTuningMixin) and any(True for _ in mixin.parameters()):
            raise CheckpointError(
                f"'{name}' is a {type(mixin).__name__}, which no weight of the base can hold. Keep it beside the "
                f"merged model (--keep {name}), or remove it first."
            )
    active = [n for n, mixin in methods.items() if not mixin._is_silent or getattr(mixin, "is_merged", False)]
    for name in methods.keys() - active:
        _remove(model, name)
    weights = [methods[name] for name in active if isinstance(methods[name], WeightTuningMixin)]
    _merge_in_order([mixin for mixin in weights if not mixin.is_merged])
    merged = [name for name in active if not isinstance(methods[name], QuantizedBaseMixin)]
    for name in merged:
        _remove(model, name)
    for part in {id(part): part for part in (owner_of(model, name) for name in present)}.values():
        dequantize_base(part)
    return merged


def _remove(model: AnyModel, name: str) -> None:
    owner_of(model, name).del_mixin(name.rpartition(".")[2])


def _merge_in_order(mixins: list[Any]) -> None:
    merged: list[Any] = []
    try:
        for mixin in mixins:
            mixin.merge()
            merged.append(mixin)
    except BaseException:
        for mixin in reversed(merged):
            mixin.unmerge()
        raise
