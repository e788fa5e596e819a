"""From a name, a folder or a URL to a model that stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from sat_lightning.checkpoint.building import NoRandomFill
from sat_lightning.checkpoint.files import found_beside, read_json
from sat_lightning.checkpoint.fitting import fit
from sat_lightning.checkpoint.hub import locate
from sat_lightning.checkpoint.huggingface import find_key_map, import_config
from sat_lightning.checkpoint.loading import Format, Source, find_format, open_incoming
from sat_lightning.checkpoint.migrate import migrate_native
from sat_lightning.checkpoint.native import CONFIG_NAME, FORMAT_KEYS, all_mixins, build
from sat_lightning.checkpoint.report import Tolerance
from sat_lightning.checkpoint.resize import PositionFill, Resize, VocabularyFill, round_up
from sat_lightning.checkpoint.sat import find_config
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, ConfigError, nearest
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.registry import AnyModel
from sat_lightning.models import find_family

__all__ = ["AutoModel", "from_pretrained"]
_READING = tuple(field.name for field in fields(Source) if field.name != "path")
_TOLERANCE = tuple(field.name for field in fields(Tolerance))


@dataclass
class Blueprint:
    """What a checkpoint says about the model it is of."""

    kind: Format
    values: Mapping[str, Any]
    model_class: type[AnyModel]
    config: TransformerConfig
    key_map: KeyMap | None = None


def from_pretrained(
    model_class: type[AnyModel] | None,
    name: str | os.PathLike[str],
    *,
    build_only: bool = False,
    dtype: torch.dtype | Literal["auto"] | None = None,
    resize_vocab: VocabularyFill | None = None,
    resize_positions: PositionFill | None = None,
    make_vocab_size_divisible_by: int | None = None,
    home: str | os.PathLike[str] | None = None,
    url: str | None = None,
    offline: bool | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> AnyModel:
    """Build the model of a checkpoint, and load its weights; `BaseModel.from_pretrained` describes the arguments."""
    options = {**(overrides or {}), **options}
    reading = {key: options.pop(key) for key in _READING if key in options}
    tolerance = Tolerance(**{key: options.pop(key) for key in _TOLERANCE if key in options})
    path = locate(name, home=home, url=url, offline=offline)
    plan = read_blueprint(path, model_class)
    if make_vocab_size_divisible_by is not None:
        options["vocab_size"] = round_up(
            options.get("vocab_size", plan.config.vocab_size), make_vocab_size_divisible_by
        )
        resize_vocab = resize_vocab or "zeros"
    _refuse_unknown(options, plan)
    before, plan.config = plan.config, plan.config.replace(**options)
    resize = Resize(before, plan.config, resize_vocab, resize_positions)
    if build_only:
        return build_model(plan, str(path)).eval()
    keeps_some = tolerance != Tolerance() or resize.needs_initial_values
    model = build_model(plan, str(path)) if keeps_some else build_empty(plan, str(path))
    incoming = open_incoming(Source(path, **reading), model)
    origin = plan.values.get("model_class", type(model).__name__)
    what = str(path) if origin == type(model).__name__ else f"{path} (a {origin})"
    model.load_report = fit(model, incoming, tolerance, what=what, resize=resize, adopts=True, dtype=dtype)
    if isinstance(dtype, torch.dtype):
        model.to(dtype)
    return model.eval()


def _refuse_unknown(options: Mapping[str, Any], plan: Blueprint) -> None:
    names = {field.name for field in fields(plan.config)} - {"extra"}
    for name in options.keys() - names:
        if name == "args":
            raise ConfigError(
                "from_pretrained takes no args: it reads the architecture from the checkpoint, and returns the model "
                "alone (its configuration is model.config). Give what is to change by name: hidden_dropout=0.1."
            )
        raise ConfigError(
            f"'{name}' is neither an argument of from_pretrained nor a field of {type(plan.config).__name__}."
            f"{nearest(name, {*names, *_READING, *_TOLERANCE, *signature(from_pretrained).parameters})}"
        )


class AutoModel:
    """Build the model that a checkpoint names."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> AnyModel:
        """Build the model class that a checkpoint names, and load its weights.

        Args:
            name: a folder (native, SAT's or Hugging Face's), a known name, `hf://organisation/name`, or a URL.
            **options: see `BaseModel.from_pretrained`.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: if it cannot be read, or its weights do not fit.
            ConfigError: if it names an unknown class, or an option is neither known nor a field.
        """
        return from_pretrained(None, name, **options)


def read_blueprint(path: Path, model_class: type[AnyModel] | None = None) -> Blueprint:
    """Read what a checkpoint says about its model.

    Args:
        path: a file or folder.
        model_class: the class to build. Default: the one the checkpoint names.

    Returns:
        Class and configuration.

    Raises:
        CheckpointError: if there is no configuration, or it names no class.
        ConfigError: if it names an unknown one.
    """
    kind = find_format(path)
    if kind == "hf":
        values = read_json(path / "config.json")
        model_class, key_map = find_key_map(values, model_class)
        return Blueprint(kind, values, model_class, import_config(model_class, key_map, values), key_map)
    file = find_config(path)
    if file is None:
        raise CheckpointError(
            f"{path} comes without {CONFIG_NAME}, so its architecture is unknown.{found_beside(path / CONFIG_NAME)} "
            "Write one, or build the model and use load_checkpoint(model, path)."
        )
    values = migrate_native(read_json(file), str(file))
    if model_class is None:
        if "model_class" not in values:
            raise CheckpointError(f'{file} names no model_class. Add it, for example "model_class": "GPT2Model".')
        model_class = find_family(values["model_class"])
    fields_ = {key: value for key, value in values.items() if key not in FORMAT_KEYS}
    for key, value in fields_.items():  # SAT's rule: such a path is relative to the folder
        if key.endswith("_path") and isinstance(value, str):
            fields_[key] = os.path.join(file.parent, value)
    try:
        config = model_class.config_class.from_dict(fields_).replace(model_parallel_size=1)
    except TypeError as error:
        raise CheckpointError(f"{file}: a value is of a wrong type ({error}). Restore it, or save again.") from error
    return Blueprint(kind, values, model_class, config)


def build_model(plan: Blueprint, what: str) -> AnyModel:
    """Build the model of a blueprint, with initial values."""
    if plan.key_map is None:
        return build(plan.model_class, plan.config, plan.values, what)
    model = plan.model_class(plan.config)
    names = [name for name, _ in all_mixins(model)]
    for name in [name for name in plan.key_map.without if name in names]:
        model.del_mixin(name)
    for name, make in plan.key_map.adds.items():
        if name not in names:
            model.add_mixin(name, make(model.config))
    return model


def build_empty(plan: Blueprint, what: str) -> AnyModel:
    """Build without drawing initial values: every parameter is about to be read."""
    with NoRandomFill():
        return build_model(plan, what)
