"""`adapter_ids` of a call: which method of fine-tuning speaks for which row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sat_lightning.errors import InputError


def check_adapter_ids(model: Any, adapter_ids: Any) -> None:  # noqa: ANN401
    """Refuse a choice that the model cannot follow; the numbers in a tensor are not looked at.

    Args:
        model: with `mixins`.
        adapter_ids: of the call.

    Raises:
        InputError: if an enabled method reaches every row, or a list has the number of no method.
    """
    for name, mixin in model.mixins.items():
        if mixin.tells_rows_apart is False and not mixin._is_silent:
            cure = f"call get_mixin('{name}').disable()"
            if mixin.tuned_parameters:  # they are in the base, and cannot be disabled
                cure = f"call del_mixin('{name}') if the base as it trained it is the base of all rows"
            raise InputError(
                f"adapter_ids chooses a method for each row, and '{name}', a {type(mixin).__name__} as it is here, "
                f"reaches every row. Leave adapter_ids out, or {cure}."
            )
    if isinstance(adapter_ids, (list, tuple)):
        refuse_unknown_ids(model, adapter_ids)


def refuse_unknown_ids(model: nn.Module, adapter_ids: Sequence[int]) -> None:
    """Refuse numbers that no method of a model, or of its parts, has.

    Raises:
        InputError: with the numbers there are.
    """
    ids = [getattr(module, "adapter_id", None) for module in model.modules()]
    present = {-1, *(number for number in ids if number is not None)}
    if unknown := set(adapter_ids) - present:
        raise InputError(f"adapter_ids names {sorted(unknown)}; the model has {sorted(present)}, -1 for none.")


def for_parts(model: nn.Module, kw: dict[str, Any]) -> dict[str, Any]:
    """Check a list over all parts of a model, and return keywords by which none refuses the numbers of another."""
    ids = kw.get("adapter_ids")
    if not isinstance(ids, (list, tuple)):
        return kw
    refuse_unknown_ids(model, ids)
    return kw | {"adapter_ids": torch.tensor(ids)}
