"""Hugging Face folders: config.json and safetensors or .bin files, read and written by the families' key maps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sat_lightning.checkpoint.files import MAX_SHARD_SIZE, found_beside, open_weights, write_json, write_weights
from sat_lightning.checkpoint.keymap import plan_export
from sat_lightning.checkpoint.native import all_mixins, refuse_quantized
from sat_lightning.checkpoint.report import some
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, nearest
from sat_lightning.model import BaseMixin, registered_models
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.registry import AnyModel
from sat_lightning.models import import_families

RECORD = "hugging_face"
"""Key of `config.extra` that keeps what our configuration does not say: their config.json, and the file's layout."""


def find_key_map(values: Mapping[str, Any], model_class: type[AnyModel] | None = None) -> tuple[type[AnyModel], KeyMap]:
    """Find the class of ours and its table that read a Hugging Face folder.

    Args:
        values: its config.json.
        model_class: read as this class. Default: the class that answers to its `model_type` and `architectures`.

    Returns:
        The class and the table.

    Raises:
        CheckpointError: if no table answers.
    """
    model_type, architectures = values.get("model_type"), values.get("architectures") or []
    import_families()
    # A subclass inherits tables, but the family itself answers for them.
    answering = (
        [model_class] if model_class else [cls for cls in registered_models().values() if "key_maps" in vars(cls)]
    )
    known = [(cls, key_map) for cls in answering for key_map in cls.key_maps]
    fitting = [(cls, key_map) for cls, key_map in known if key_map.model_type == model_type]
    for name in architectures:
        for cls, key_map in fitting:
            if name in key_map.architectures:
                return cls, key_map
    if fitting and not architectures:
        return fitting[0]
    raise _refuse_family(str(model_type), architectures, known, fitting)


def _refuse_family(
    model_type: str, architectures: list[str], known: list[tuple[type[AnyModel], KeyMap]], fitting: list[Any]
) -> CheckpointError:
    said = f"config.json says model_type '{model_type}', {', '.join(architectures) or 'no architecture'}"
    if fitting:
        names = sorted({name for _, key_map in fitting for name in key_map.architectures})
        return CheckpointError(
            f"{said}; of this type the known classes are {', '.join(names)}."
            f"{nearest(architectures[0], names)} Set `architectures` to the one whose weights the folder holds, or "
            "declare a key map for the class."
        )
    types = sorted({key_map.model_type for _, key_map in known})
    return CheckpointError(
        f"{said}; the types that can be read here are {', '.join(types) or 'none'}.{nearest(model_type, types)} Load "
        "it by the class of its own family (AutoModel finds it), or declare a key map."
    )


def import_config(model_class: type[AnyModel], key_map: KeyMap, values: Mapping[str, Any]) -> TransformerConfig:
    """Make our configuration from their config.json, which is kept in `extra` for the way back."""
    fields = key_map.config_from_hf(values)
    return model_class.config_class(**fields, extra={RECORD: {"config": dict(values)}})


def open_huggingface(folder: Path, is_copied: bool = False) -> Mapping[str, Tensor]:
    """Open the weights of a Hugging Face folder.

    Args:
        folder: the folder.
        is_copied: see `files.SafetensorsFile`.

    Returns:
        Their tensors by name.

    Raises:
        CheckpointError: if there are none; the message lists what is there.
    """
    found = open_weights(folder, is_copied)
    if found is None:
        raise CheckpointError(
            f"{folder} has a config.json and no weights: neither model.safetensors nor pytorch_model.bin, whole or "
            f"with an index.{found_beside(folder / 'model.safetensors')}"
        )
    return found[0]


def is_tied(values: Mapping[str, Any], key_map: KeyMap) -> bool:
    """Tell whether a config.json ties the pairs of `key_map.tied`."""
    return key_map.is_tied(values)


def save_huggingface(
    model: AnyModel,
    folder: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a folder that transformers loads: config.json and safetensors.

    Args:
        model: any model of a family with a key map.
        folder: made where it is missing; files of these names in it are replaced.
        model_type: of theirs, where the family has several. Default: that of the folder it was read from, or the first.
        max_shard_size: bytes above which the weights are written in several files and an index.

    Raises:
        CheckpointError: if the family has no such map, or a tensor (an added mixin's, say) has no place in it.
    """
    refuse_quantized(model)
    _refuse_methods(model)
    write_huggingface(model.state_dict(), model.config, type(model), Path(folder), model_type, max_shard_size)


def _refuse_methods(model: AnyModel) -> None:
    """Refuse what would be lost: a method of fine-tuning that is not in the weights."""
    methods = [(name, mixin) for name, mixin in all_mixins(model) if mixin.freezes_base]
    if names := [name for name, one in methods if any(True for _ in one.parameters()) and not _is_merged(one)]:
        raise CheckpointError(
            f"{some(names)}: of fine-tuning, for which a Hugging Face model has no place. Put it into the weights by "
            "merge_adapters(model) or `sat-lightning merge --to hf`; or write it beside by save_peft, and remove it."
        )


def _is_merged(mixin: BaseMixin) -> bool:
    return getattr(mixin, "is_merged", False)  # which says itself what to do


def write_huggingface(
    tensors: Mapping[str, Tensor],
    config: TransformerConfig,
    model_class: type[AnyModel],
    folder: Path,
    model_type: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write tensors of our names as a Hugging Face folder; see `save_huggingface`."""
    record = config.extra.get(RECORD, {})
    before = dict(record.get("config", {}))
    key_map = choose_map(model_class, before, model_type)
    if before.get("model_type") != key_map.model_type:
        record, before = {}, {}
    values = _export_config(key_map, config, model_class, before)
    what = f"the {model_class.__name__}"
    plan = plan_export(
        key_map, tensors.keys(), config, layout=record.get("layout"), is_tied=is_tied(values, key_map), what=what
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, plan.write(tensors, what), max_shard_size)
    if plan.is_untied:
        values["tie_word_embeddings"] = False
    elif key_map.tied and "tie_word_embeddings" not in before:
        values["tie_word_embeddings"] = is_tied(values, key_map)
    write_json(folder / "config.json", values)


def choose_map(model_class: type[AnyModel], before: Mapping[str, Any], model_type: str | None = None) -> KeyMap:
    """Return the table to write by: the one that is asked for, that of the folder read before, or the first."""
    wanted = model_type or before.get("model_type")
    if before and (model_type is None or before.get("model_type") == model_type):
        return find_key_map(before, model_class)[1]
    maps = {key_map.model_type: key_map for key_map in reversed(model_class.key_maps)}
    if not maps:
        raise CheckpointError(
            f"{model_class.__name__} has no key map, so Hugging Face has no such family. Save it as native or sat."
        )
    if wanted is not None and wanted not in maps:
        raise CheckpointError(
            f"{model_class.__name__} has no key map '{wanted}', it has {', '.join(maps)}.{nearest(str(wanted), maps)}"
        )
    return maps[wanted] if wanted is not None else model_class.key_maps[0]


def _export_config(
    key_map: KeyMap, config: TransformerConfig, model_class: type[AnyModel], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return their config.json: as it was read, but for what was changed since."""
    now = key_map.config_to_hf(config)
    if not before:
        return {"model_type": key_map.model_type, "architectures": [key_map.architectures[0]], **now}
    then = key_map.config_to_hf(import_config(model_class, key_map, before))
    return dict(before) | {name: value for name, value in now.items() if name not in then or then[name] != value}
