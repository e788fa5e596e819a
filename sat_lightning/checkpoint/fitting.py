"""Fits incoming tensors into a model: every name and shape is accounted for, or nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sat_lightning.checkpoint.report import LoadReport, Tolerance, matches, some
from sat_lightning.checkpoint.resize import Resize
from sat_lightning.checkpoint.split import copy_into, full_shape, is_split
from sat_lightning.errors import CheckpointError
from sat_lightning.model.registry import AnyModel

Dtype = torch.dtype | Literal["auto"] | None


@dataclass
class Incoming:
    """The tensors of a checkpoint by our names."""

    tensors: Mapping[str, Tensor]
    """Each is read when it is asked for."""
    unread: Collection[str] = ()
    """Names of the file that nothing here corresponds to."""
    derived: tuple[str, ...] = ()
    """Our names that no such file has; the constructor made them."""
    notes: list[str] = field(default_factory=list)
    settle: tuple[Callable[[], None], ...] = ()
    """Called once all is loaded."""


def fit(
    model: AnyModel,
    incoming: Incoming,
    tolerance: Tolerance,
    *,
    what: str,
    resize: Resize | None = None,
    adopts: bool = False,
    dtype: Dtype = None,
) -> LoadReport:
    """Put incoming tensors into a model.

    Args:
        model: unchanged if this fails, unless `adopts`.
        incoming: the tensors.
        tolerance: what may differ.
        what: the checkpoint, for messages.
        resize: what is done about other sizes.
        adopts: whether parameters take the tensors as they are, mapped file and all, instead of copying: for a model
            that was built for them and is discarded if this fails.
        dtype: of adopted tensors. Default: the model's; "auto": the file's.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: for a difference that is not allowed.
    """
    own = _targets(model)
    missing, absent_mixins = _check_names(model, own, incoming, tolerance, what)
    mismatched = _fill(own, incoming, tolerance, what, resize, adopts, dtype)
    if absent_mixins:
        model.reinit(absent_mixins)
    for finish in incoming.settle:
        finish()
    loaded = sorted((own.keys() & incoming.tensors.keys()) - set(mismatched))
    unexpected = sorted({*(incoming.tensors.keys() - own.keys()), *incoming.unread})
    kinds = (loaded, missing, unexpected, mismatched, absent_mixins, incoming.notes)
    return LoadReport(*(tuple(kind) for kind in kinds))


def check_fit(model: AnyModel, incoming: Incoming, tolerance: Tolerance, *, what: str) -> None:
    """Refuse incoming tensors that would not fill a model, by their names; see `fit`."""
    _check_names(model, _targets(model), incoming, tolerance, what)


def _fill(
    own: Mapping[str, Tensor],
    incoming: Incoming,
    tolerance: Tolerance,
    what: str,
    resize: Resize | None,
    adopts: bool,
    dtype: Dtype,
) -> list[str]:
    """Put tensors into those of the model; returns the names that keep their values, being of another shape."""
    shared = _shared_storages(own)
    taken: dict[int, tuple[str, Tensor]] = {}
    adopted: set[int] = set()
    mismatched: list[str] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    for name, tensor in incoming.tensors.items():
        if (target := own.get(name)) is None:
            continue
        tensor = tensor if resize is None or is_split(target) else resize.apply(name, tensor, target)
        if full_shape(target) != tuple(tensor.shape):
            _refuse_shape(name, target, tensor, tolerance, what)
            mismatched.append(name)
            continue
        other, same = taken.setdefault(id(target), (name, tensor))
        if other != name and not torch.equal(same, tensor):
            raise CheckpointError(f"{what}: '{other}' and '{name}' differ, and are one tensor in the model.")
        if other != name:
            continue
        if adopts and not is_split(target) and target.untyped_storage().data_ptr() not in shared:
            _adopt(target, tensor, dtype, adopted)
        else:
            waiting.append((target, tensor))
    with torch.no_grad():
        for target, tensor in waiting:
            copy_into(target, tensor)
    return mismatched


def _targets(model: AnyModel) -> dict[str, Tensor]:
    """Return the tensors themselves that a state dict names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    by_name, names = dict(tensors), list(model.state_dict())
    if packed := [name for name in names if name not in by_name]:
        raise CheckpointError(
            f"{type(model).__name__} holds linears in 4 bits ({packed[0]}), which no weights can be loaded into. Load "
            "them first, and quantise then."
        )
    return {name: by_name[name] for name in names}


def _shared_storages(own: Mapping[str, Tensor]) -> set[int]:
    """Return the memory that several different parameters look at: it must be filled, not replaced."""
    places: dict[int, set[int]] = {}
    for tensor in own.values():
        places.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    return {place for place, tensors in places.items() if len(tensors) > 1}


def _check_names(
    model: AnyModel, own: Mapping[str, Tensor], incoming: Incoming, tolerance: Tolerance, what: str
) -> tuple[list[str], list[str]]:
    """Return the names that stay unfilled, and the mixins to initialise for it."""
    missing = sorted(n for n in own.keys() - incoming.tensors.keys() if not matches(n, incoming.derived))
    unexpected = sorted({*(incoming.tensors.keys() - own.keys()), *incoming.unread})
    owners = {name: tolerance.reinitialises(name) for name in missing}
    bad_missing = [n for n in missing if not (owners[n] or matches(n, tolerance.may_miss))]
    bad_unexpected = [n for n in unexpected if not matches(n, tolerance.ignore)]
    if tolerance.strict and (bad_missing or bad_unexpected):
        raise CheckpointError(
            f"{what} does not fit {type(model).__name__}: missing {some(bad_missing)}, unexpected "
            f"{some(bad_unexpected)}. Add the mixins it was saved with, or name what may differ: may_miss (keep "
            "initial values), reinit (mixins), ignore (in the file only)."
        )
    return missing, sorted({owner for owner in owners.values() if owner})


def _refuse_shape(name: str, target: Tensor, tensor: Tensor, tolerance: Tolerance, what: str) -> None:
    if not matches(name, tolerance.may_mismatch):
        raise CheckpointError(
            f"{what}: '{name}' is {list(tensor.shape)}, the model has {list(full_shape(target))}. Build the model from "
            "the configuration beside the file, name it in may_mismatch to keep initial values, or ask for "
            "resize_vocab or resize_positions."
        )


def _adopt(target: Tensor, tensor: Tensor, dtype: Dtype, adopted: set[int]) -> None:
    if target.is_floating_point() and dtype != "auto":
        tensor = tensor.to(target.dtype if dtype is None else dtype)
    if tensor.data_ptr() in adopted:  # a file has it once, for two parameters that may part
        tensor = tensor.clone()
    adopted.add(tensor.data_ptr())
    # Into .data: whoever holds the parameter, a tied module or an optimizer, goes on holding it.
    target.data = tensor.to(target.device)
