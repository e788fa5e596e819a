"""What a fine-tune added to a base, in a folder without the base: `adapter.json` and `adapter.safetensors`."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sat_lightning.checkpoint.content import hash_content
from sat_lightning.checkpoint.files import SafetensorsFile, found_beside, read_json, write_json, written_whole
from sat_lightning.checkpoint.native import all_mixins, build_mixin, record_mixin
from sat_lightning.checkpoint.report import some
from sat_lightning.checkpoint.split import copy_into, full_shape, is_split
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, nearest
from sat_lightning.mixins.quantized import QuantizedBaseMixin
from sat_lightning.model import BaseMixin
from sat_lightning.model.composed import owner_of
from sat_lightning.model.registry import AnyModel

CONFIG_NAME, WEIGHTS_NAME = "adapter.json", "adapter.safetensors"
_VERSION = 1
_OF_TRAINING = ("dropout", "lora_dropout", "init_std", "init_token_ids")
"""Settings that change nothing about what a mixin is once it is trained."""


def save_adapter(model: AnyModel, folder: str | os.PathLike[str], name: str | Sequence[str] | None = None) -> None:
    """Write what was trained beside a frozen base: some mixins with their settings, and what they train of the base.

    The base itself is recorded by the SHA-256 of its parameters: those of all mixins that are no method of fine-tuning
    and no head of a new task, and of the backbone, but for what the saved mixins train of them.

    Args:
        model: any model.
        folder: made where it is missing; files of an adapter in it are replaced, each whole or not at all.
        name: the mixin, or several, `<part>.<name>` in composed models; what has put the base into 4 bits goes along.
            Default: all methods of fine-tuning and heads of new tasks.

    Raises:
        CheckpointError: if there is no such mixin, one is merged, or the weights are split over ranks.
    """
    chosen = _choose(model, name)
    if merged := [key for key, mixin in chosen.items() if getattr(mixin, "is_merged", False)]:
        raise CheckpointError(f"{some(merged)}: merged, so that the base is not its own. Call unmerge() first.")
    tensors = _own_tensors(model, chosen)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format_version": _VERSION,
        "model_class": type(model).__name__,
        "mixins": [record_mixin(key, mixin, owner_of(model, key).config) for key, mixin in chosen.items()],
        "base_sha256": _hash_base(model, tensors),
        "base_dtype": _dtype_of_base(model, tensors),
    }
    whole = {key: tensor.detach().contiguous().cpu().clone() for key, tensor in tensors.items()}
    with written_whole(folder / WEIGHTS_NAME) as temporary:
        save_file(whole, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, values)


def load_adapter(
    model: AnyModel, folder: str | os.PathLike[str], *, names: Mapping[str, str] | None = None, checks_base: bool = True
) -> list[str]:
    """Add the mixins of a folder to a model, or fill those that it has under these names, and load their weights.

    Args:
        model: the base, with or without the mixins; unchanged if this fails.
        folder: written by `save_adapter`.
        names: other names for mixins of the folder, `{"lora": "french"}`, so that folders of one recipe live together.
        checks_base: whether another base is an error. Off, a base in another precision will do.

    Returns:
        Names of the mixins, in the order in which they were stacked.

    Raises:
        CheckpointError: if it cannot be read, was trained on another base, or does not fit the model.
        HookError: if another mixin holds a seam that one of these takes.
    """
    values, file = _rename(*_read(Path(folder)), names or {}, folder)
    device = next(model.parameters()).device
    added: list[str] = []
    before = [(parent, dict(parent._modules)) for parent in model.modules()]
    try:
        chosen = {}
        for entry in values["mixins"]:
            name = entry["name"]
            if name not in dict(all_mixins(model)):
                model.add_mixin(name, build_mixin(entry, owner_of(model, name).config, str(folder)))
                added.append(name)
            chosen[name] = model.get_mixin(name)
            _refuse_other_kind(chosen[name], entry, owner_of(model, name).config, folder)
        targets = _own_tensors(model, chosen)
        _refuse_misfit(targets, file, folder)
        if checks_base:
            _refuse_other_base(model, targets, values, folder)
    except BaseException:
        for name in reversed(added):
            model.del_mixin(name)
        for parent, children in before:  # linears that a mixin has put into 4 bits
            parent._modules.update({name: child for name, child in children.items() if name in parent._modules})
        raise
    beginnings = tuple(map(_prefix, added))
    with torch.no_grad():
        for key, target in targets.items():
            if key.startswith(beginnings) and not is_split(target):
                target.data = file[key].to(device, copy=True)  # in the precision of the file
            else:
                copy_into(target, file[key])
    return list(chosen)


def _choose(model: AnyModel, name: str | Sequence[str] | None) -> dict[str, BaseMixin]:
    present = dict(all_mixins(model))
    if name is None:
        chosen = {key: mixin for key, mixin in present.items() if mixin.stays_trainable}
        if not chosen:
            raise CheckpointError(
                f"{type(model).__name__} has no method of fine-tuning and no head of a new task among its mixins "
                f"{list(present)}. Name what is to be saved, or save the whole with save_pretrained."
            )
        return chosen
    names = [name] if isinstance(name, str) else list(name)
    for one in names:
        if one not in present:
            raise CheckpointError(f"No mixin is named '{one}', there are {list(present)}.{nearest(one, present)}")
    return {key: one for key, one in present.items() if key in names or isinstance(one, QuantizedBaseMixin)}


def _prefix(name: str) -> str:
    """Return how names of a mixin's tensors begin: `decoder.lora` gives `decoder.mixins.lora.`."""
    part, dot, own = name.rpartition(".")
    return f"{part}{dot}mixins.{own}."


def _own_tensors(model: AnyModel, mixins: Mapping[str, BaseMixin]) -> dict[str, Tensor]:
    """Return parameters and buffers of mixins, and what they train of the base, by their names in the model."""
    found: dict[str, Tensor] = {}
    for name, mixin in mixins.items():
        state = mixin.state_dict(keep_vars=True)
        found |= {_prefix(name) + key: tensor for key, tensor in state.items()}
        owner, (part, dot, _) = owner_of(model, name), name.rpartition(".")
        found |= {part + dot + key: parameter for key, parameter in mixin.tuned_in(owner).items()}
    return found


def _hash_base(model: AnyModel, own: Mapping[str, Tensor]) -> str:
    if split := [key for key, tensor in model.named_parameters() if is_split(tensor)]:
        raise CheckpointError(
            f"ZeRO-3 has split {some(split)} over the ranks, so that nobody has the base whole. Save a checkpoint, and "
            "save or load the adapter in one process."
        )
    return hash_content(_base(model, own))


def _base(model: AnyModel, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters beside those of methods, of new heads, and what they train."""
    beside = tuple(_prefix(name) for name, mixin in all_mixins(model) if mixin.stays_trainable)
    left_out = {id(tensor) for tensor in own.values()}
    for key, tensor in model.named_parameters():
        if id(tensor) not in left_out and not key.startswith(beside):
            yield key, tensor


def _dtype_of_base(model: AnyModel, own: Mapping[str, Tensor]) -> str | None:
    """Return the one precision of the base, if it is one: its hash is that of these bytes."""
    found = {str(tensor.dtype).removeprefix("torch.") for _, tensor in _base(model, own) if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _read(folder: Path) -> tuple[dict[str, Any], SafetensorsFile]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            is_peft = (folder / "adapter_config.json").is_file()
            hint = " It is an adapter of PEFT's: call load_peft." if is_peft else found_beside(folder / name)
            raise CheckpointError(f"{folder / name}: there is no such file.{hint}")
    values = read_json(folder / CONFIG_NAME)
    if values.get("format_version") != _VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has format_version {values.get('format_version')}, this program reads {_VERSION}. "
            "Install the version that wrote it."
        )
    return values, SafetensorsFile(folder / WEIGHTS_NAME)


def _rename(
    values: dict[str, Any], file: SafetensorsFile, names: Mapping[str, str], folder: str | os.PathLike[str]
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return what a folder holds, with its mixins under other names."""
    saved = [entry["name"] for entry in values["mixins"]]
    if unknown := [name for name in names if name not in saved]:
        raise CheckpointError(f"{folder} has no mixin '{unknown[0]}', it has {saved}.{nearest(unknown[0], saved)}")
    chosen = [names.get(name, name) for name in saved]
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise CheckpointError(f"{folder}: names would call two mixins '{twice[0]}'. Give each a name of its own.")
    tensors = {}
    for key in file.keys():
        old = next((name for name in saved if key.startswith(_prefix(name))), None)
        renamed = key if old is None else _prefix(names.get(old, old)) + key.removeprefix(_prefix(old))
        tensors[renamed] = file[key]
    mixins = [entry | {"name": name} for entry, name in zip(values["mixins"], chosen, strict=True)]
    return values | {"mixins": mixins}, tensors


def _refuse_other_kind(
    mixin: BaseMixin, entry: Mapping[str, Any], config: TransformerConfig, folder: str | os.PathLike[str]
) -> None:
    """Refuse to fill a mixin of another class, or of settings by which the same weights do something else."""
    cure = (
        f"Remove it with del_mixin('{entry['name']}') first, and the file builds its own; or give the file's another "
        f"name: names={{'{entry['name']}': ...}}."
    )
    own = record_mixin(entry["name"], mixin, config)
    if own["class_path"] != entry["class_path"]:
        raise CheckpointError(
            f"{folder}: '{entry['name']}' is a {entry['class_path']}, the model has a {own['class_path']} of that "
            f"name. {cure}"
        )
    if entry["init_args"] is None or own["init_args"] is None:
        return
    then, now = _settings(mixin, entry), _settings(mixin, own)
    for key in sorted(then.keys() & now.keys()):
        if then[key] != now[key] and key not in _OF_TRAINING:
            raise CheckpointError(
                f"{folder}: '{entry['name']}' was saved with {key}={then[key]!r}, the model's has {now[key]!r}. {cure}"
            )


def _settings(mixin: BaseMixin, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a description says, and what its class takes where it says nothing."""
    found: dict[str, Any] = {"scale": 1.0}
    for cls in reversed(type(mixin).__mro__[: -len(BaseMixin.__mro__)]):
        if init := vars(cls).get("__init__"):
            parameters = inspect.signature(init).parameters.values()
            found |= {one.name: one.default for one in parameters if one.default is not one.empty}
    given = entry["init_args"] | {key: entry[key] for key in ("scale",) if key in entry}
    return json.loads(json.dumps(found | given, default=str))


def _refuse_misfit(targets: Mapping[str, Tensor], file: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    missing, unexpected = sorted(targets.keys() - file.keys()), sorted(file.keys() - targets.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit: missing {some(missing)}, unexpected {some(unexpected)}. The mixins of the model "
            "have other settings than those saved: remove them, and the file builds its own."
        )
    for key, target in targets.items():
        if tuple(file[key].shape) != full_shape(target):
            raise CheckpointError(
                f"{folder}: '{key}' is {list(file[key].shape)}, the model has {list(full_shape(target))}. The mixin "
                "has other settings than the one saved, or the base other sizes."
            )


def _refuse_other_base(
    model: AnyModel, targets: Mapping[str, Tensor], values: Mapping[str, Any], folder: str | os.PathLike[str]
) -> None:
    if (now := _hash_base(model, targets)) != (then := values["base_sha256"]):
        raise CheckpointError(
            f"{folder} was trained on another base: a {values['model_class']} whose parameters have SHA-256 {then}, "
            f"those of this {type(model).__name__} have {now}. Load the base that it was trained on; if this is it in "
            "another precision, or changed on purpose, pass checks_base=False."
        )
