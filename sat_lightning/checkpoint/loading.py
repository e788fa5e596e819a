"""Opens a checkpoint of any format, and loads it into a model that stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sat_lightning.checkpoint.files import found_beside, open_tensors, open_weights, read_json
from sat_lightning.checkpoint.fitting import Incoming, fit
from sat_lightning.checkpoint.huggingface import RECORD, find_key_map, is_tied, open_huggingface
from sat_lightning.checkpoint.keymap import plan_import
from sat_lightning.checkpoint.migrate import adapters_in_post_order, migrate_sat
from sat_lightning.checkpoint.native import CONFIG_NAME
from sat_lightning.checkpoint.report import LoadReport, Tolerance, matches, some
from sat_lightning.checkpoint.sat import find_config, is_sat_folder, open_sat
from sat_lightning.errors import CheckpointError
from sat_lightning.model.registry import AnyModel

#: Names of Hugging Face's files of weights, whose tensors only the config.json beside them explains.
HF_STEMS = ("model", "pytorch_model")
Format = Literal["native", "sat", "hf"]


@dataclass(frozen=True)
class Source:
    """Where tensors are read, and how old files are understood.

    Args:
        path: a file or a folder.
        step: of a SAT run. Default: the one `latest` names.
        prefix: reads only names that begin so, without it ("encoder.").
        mixin_names: names of mixins that an old SAT file numbers: `{0: "extra_position_embedding"}`.
        interleaved_qkv: a ChatGLM-6B file of SAT before v0.4.1.
    """

    path: Path
    step: int | str | None = None
    prefix: str = ""
    mixin_names: Mapping[int | str, str] | None = None
    interleaved_qkv: bool = False


def find_format(path: Path) -> Format:
    """Tell what wrote a file or folder.

    Raises:
        CheckpointError: if there is none, or it is no checkpoint; the message lists what is near.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder.{found_beside(path)}")
    if path.is_file():
        _refuse_part(path)
        return "sat" if path.suffix in (".pt", ".pth", ".bin") else "native"
    has_weights = any(path.glob("model.safetensors*")) or any(path.glob("pytorch_model.bin*"))
    if (path / CONFIG_NAME).is_file():
        return "native" if has_weights or not is_sat_folder(path) else "sat"
    if (path / "config.json").is_file():
        return "hf"
    if is_sat_folder(path):
        return "sat"
    if has_weights:
        return "native"
    if kinds := [one for one in ("adapter.json", "adapter_config.json") if (path / one).is_file()]:
        call = "load_adapter" if kinds[0] == "adapter.json" else "load_peft"
        raise CheckpointError(
            f"{path} is an adapter. Load the model that it was trained on, then call {call}(model, folder), or make a "
            "plain model of both by `sat-lightning merge`."
        )
    inside = sorted(config.parent.name for name in (CONFIG_NAME, "config.json") for config in path.glob(f"*/{name}"))
    hint = f" Folders in it that are: {some(inside)}." if inside else found_beside(path / CONFIG_NAME)
    raise CheckpointError(
        f"{path} is no model folder: it has neither {CONFIG_NAME}, nor config.json, nor SAT's 'latest'.{hint}"
    )


def _refuse_part(file: Path) -> None:
    """Refuse a file that says nothing without its folder."""
    is_theirs = (file.parent / "config.json").is_file() and not (file.parent / CONFIG_NAME).is_file()
    if file.suffix == ".json" or file.name == "latest" or (is_theirs and file.stem in HF_STEMS):
        raise CheckpointError(f"{file} is a part of a model folder. Pass the folder: {file.parent}.")


def load_checkpoint(
    model: AnyModel,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    may_miss: tuple[str, ...] = (),
    may_mismatch: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    reinit: bool | tuple[str, ...] = (),
    **reading: Any,
) -> LoadReport:
    """Load a checkpoint of any format into a model that stands, mixins and all.

    Args:
        model: receives the weights, in its own dtype and on its own device.
        path: a native, SAT or Hugging Face folder, or a file of weights.
        strict: whether any difference that is not allowed below is an error.
        may_miss: names of the model, with `*`, that the checkpoint may lack: they keep their values.
        may_mismatch: names, with `*`, that may have another shape there: they keep their values.
        ignore: names of the checkpoint, with `*`, that the model may lack.
        reinit: mixins (True: all) that the checkpoint may lack: their `reinit` is called.
        **reading: fields of `Source`: step, prefix, mixin_names, interleaved_qkv.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: if there is nothing to read, or it does not fit; the model is then as it was.
    """
    tolerance = Tolerance(strict, may_miss, may_mismatch, ignore, reinit)
    incoming = open_incoming(Source(Path(path), **reading), model)
    return fit(model, incoming, tolerance, what=str(path))


def open_incoming(source: Source, model: AnyModel) -> Incoming:
    """Open the tensors that a source has for a model."""
    path, kind = source.path, find_format(source.path)
    own = model.state_dict()
    if kind == "hf":
        return _open_hf(path, model, own)
    if kind == "sat":
        tensors = open_sat(path, model.config, type(model).__name__, source.step)
    elif path.is_file():
        tensors = open_tensors(path)
    else:
        found = open_weights(path)
        if found is None:
            raise CheckpointError(f"{path} has no model.safetensors.{found_beside(path / 'model.safetensors')}")
        tensors = found[0]
    tensors, notes = migrate_sat(
        tensors,
        own,
        model.config,
        mixin_names=source.mixin_names,
        interleaved_qkv=source.interleaved_qkv,
        prefix=source.prefix,
        what=str(path),
    )
    is_of_sat = kind == "sat" and "added_mixins" not in _read_values(path)
    adapters = adapters_in_post_order(model, tensors) if is_of_sat else {}
    notes = [
        *notes,
        *(f"{name}: its layers run in post order, as SAT's do whatever layernorm_order is" for name in adapters),
    ]
    return Incoming(tensors, notes=notes, settle=tuple(mixin.run_post for mixin in adapters.values()))


def _read_values(path: Path) -> dict[str, Any]:
    config_file = find_config(path)
    return {} if config_file is None else read_json(config_file)


def _open_hf(path: Path, model: AnyModel, own: Mapping[str, Tensor]) -> Incoming:
    values = read_json(path / "config.json")
    _, key_map = find_key_map(values, type(model))
    tensors = open_huggingface(path)
    plan = plan_import(
        key_map, tensors.keys(), model.config, own.keys(), what=str(path), is_tied=is_tied(values, key_map),
        strict=False,
    )  # fmt: skip

    imported = plan.read(tensors, str(path), copied=open_huggingface(path, is_copied=True))
    if RECORD in model.config.extra:
        model.config.extra[RECORD]["layout"] = plan.layout
    notes = [f"{name}: never used, left behind" for name in tensors if matches(name, key_map.unused)]
    return Incoming(imported, plan.unread, key_map.derived, notes=notes)
