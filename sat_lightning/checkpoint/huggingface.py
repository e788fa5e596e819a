"""Hugging Face folders: config.json and safetensors or .bin files, read and written by the families' key maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, nearest
from sat_lightning.model import BaseModel, registered_models
from sat_lightning.model.keymap import KeyMap

RECORD = "hugging_face"
"""Key of `config.extra` that keeps what our configuration does not say: their config.json, and the file's layout."""


def find_key_map(
    values: Mapping[str, Any], model_class: type[BaseModel] | None = None
) -> tuple[type[BaseModel], KeyMap]:
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
    names = sorted({name for _, key_map in known for name in (key_map.model_type, *key_map.architectures)})
    wanted = ", ".join(architectures) or "no architecture"
    raise CheckpointError(
        f"config.json says model_type '{model_type}', {wanted}; known here are {', '.join(names) or 'none'}."
        f"{nearest(architectures[0] if architectures else str(model_type), names)} Set `architectures` to the class "
        "whose weights the folder holds, or declare a key map for it."
    )


def import_config(model_class: type[BaseModel], key_map: KeyMap, values: Mapping[str, Any]) -> TransformerConfig:
    """Make our configuration from their config.json, which is kept in `extra` for the way back."""
    fields = key_map.config_from_hf(values)
    return model_class.config_class(**fields, extra={RECORD: {"config": dict(values)}})
