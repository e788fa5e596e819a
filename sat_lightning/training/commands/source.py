"""What a verb is pointed at: a run, one of its checkpoints, or a model folder; and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from sat_lightning.checkpoint import AutoModel
from sat_lightning.checkpoint.hub import locate
from sat_lightning.checkpoint.loading import find_format
from sat_lightning.data import ByteTokenizer
from sat_lightning.data.model_tokenizers import get_tokenizer
from sat_lightning.data.tokenizer import Tokenizer
from sat_lightning.errors import CheckpointError, DataError, UsageError
from sat_lightning.model import BaseModel, ComposedModel
from sat_lightning.training.checkpoints import COMPLETE_NAME, CONFIG_NAME, AtomicCheckpointIO, find_resume_checkpoint
from sat_lightning.training.frozen_base import FROZEN_BASE_KEY, check_base, frozen_names, refuse_differing
from sat_lightning.training.initialise import init_from
from sat_lightning.training.module import SATLightningModule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Source:
    """A model to write with, and what lies beside it."""

    model: Any
    tokenizer: Tokenizer
    weights: Path
    """The folder or file that was read."""
    end_tokens: list[int] = field(default_factory=list)
    """Ids that end a text: the tokenizer's end of a document, and those of a `generation_config.json`."""
    begin_tokens: list[int] = field(default_factory=list)
    """Ids before a text of the user's, by the tokenizer's own file: LLaMA's `<s>`. A run of ours is trained without."""
    close_tokens: list[int] = field(default_factory=list)
    """Ids behind a text that an encoder reads whole: T5's `</s>`."""
    samples: dict[str, Any] = field(default_factory=dict)
    """How a run made samples of rows, a `template` among it."""
    template: Any = None
    """In what form a message is put, if prompts are messages; see `commands.template`."""


def load_source(
    path: str, *, tokenizer: str | None = None, dtype: str = "float32", device: str = "auto", overrides: Any = None
) -> Source:
    """Load a model and its tokenizer.

    Args:
        path: the folder of a run, a checkpoint of one, a model folder (ours, SAT's, Hugging Face's), a known name, or
            `hf://organisation/name`.
        tokenizer: see `get_tokenizer`. Default: the files beside the weights, or what the run's configuration names.
        dtype: of the parameters.
        device: as torch names it; "auto" is the GPU if there is one.
        overrides: fields of the configuration to change, of a model folder.

    Returns:
        Both, the model in evaluation mode on its device.

    Raises:
        CheckpointError: there is no model, or it cannot be read.
        DataError: there is no tokenizer.
        UsageError: there is no such device.
    """
    place = find_device(device)
    weights, run = find_weights(path)
    found = _find_tokenizer(tokenizer, weights, run)  # the quick part first
    if weights.suffix in (".ckpt", ".pt") or (weights / COMPLETE_NAME).is_file():
        model = _load_checkpoint(weights, run)
    else:
        model = AutoModel.from_pretrained(weights, overrides=overrides or {})
    before, behind = ([], []) if run is not None and tokenizer is None else find_wrapping(found)
    samples = {} if run is None else _at(_read_config(run), "data", "init_args", "options", "samples") or {}
    ends = _find_ends(found, weights)
    return Source(model.to(place, DTYPES[dtype]).eval(), found, weights, ends, before, behind, samples)


def load_model(path: str, *, base: str | None = None, overrides: Any = None) -> Any:  # noqa: ANN401
    """Load the model of a run, a checkpoint or a folder, without a tokenizer.

    Args:
        path: see `load_source`.
        base: what a checkpoint without its base was trained on. Default: what the run began with.
        overrides: fields of the configuration to change, of a model folder.

    Returns:
        The model with its mixins.
    """
    weights, run = find_weights(path)
    if weights.suffix in (".ckpt", ".pt") or (weights / COMPLETE_NAME).is_file():
        return _load_checkpoint(weights, run, base)
    return AutoModel.from_pretrained(weights, overrides=overrides or {}, dtype="auto")


def find_device(name: str) -> torch.device:
    """Return a device by name.

    Args:
        name: as torch names it, or "auto".

    Raises:
        UsageError: there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {reason} Give cpu, cuda, cuda:1, or auto.") from error


def find_weights(path: str) -> tuple[Path, Path | None]:
    """Find what is to be read, and the folder of the run it comes from.

    Args:
        path: see `load_source`. Of a run, what `ExportModel` wrote comes before checkpoints: it is as new, and whole.

    Returns:
        A checkpoint or a model folder, and the run's folder, if there is one.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    given = Path(path).expanduser()
    is_checkpoint = given.suffix in (".ckpt", ".pt") and given.exists()
    if not is_checkpoint and (given / CONFIG_NAME).is_file():
        saved = _read_config(given)
        callbacks = [entry for entry in _at(saved, "trainer", "callbacks") or [] if isinstance(entry, dict)]
        arguments = [entry.get("init_args") or {} for entry in callbacks]
        names = ["model", *(str(each["folder_name"]) for each in arguments if each.get("folder_name"))]
        exported = [given / name for name in names if (given / name / "model_config.json").is_file()]
        folders = [str(each["dirpath"]) for each in arguments if each.get("dirpath")]
        return (exported[-1] if exported else find_resume_checkpoint(given, folders)), given
    if not is_checkpoint and (given / "checkpoints").is_dir():
        return find_resume_checkpoint(given), given
    where = given if is_checkpoint else locate(path)
    if not where.exists():
        find_format(where)  # says what lies near
    above = [where, *where.resolve().parents[:3]]
    return where, next((folder for folder in above if (folder / CONFIG_NAME).is_file()), None)


def _load_checkpoint(path: Path, run: Path | None, base: str | None = None) -> Any:  # noqa: ANN401
    """Build the model as the run did, and fill it with what the checkpoint holds."""
    from sat_lightning.training.trainer_cli import _find_in_current_folder, _import_ours

    _find_in_current_folder()
    _import_ours()
    content = AtomicCheckpointIO().load_checkpoint(path)
    if "state_dict" not in content:
        raise CheckpointError(f"{path} holds no 'state_dict': it is no checkpoint of a training run.")
    settings = {} if run is None else _read_config(run)
    with torch.random.fork_rng(devices=[]):  # what began at random, and was not saved, begins so again
        if isinstance(settings.get("seed_everything"), int):
            torch.manual_seed(settings["seed_everything"])
        module = _build(run) if run is not None else _rebuild(path)
        module.configure_model()
    is_partial = FROZEN_BASE_KEY in content
    base = base or settings.get("init_from")
    if is_partial and base:
        init_from(module, base)  # the run brought its base along, and so do we; its hash is compared
    saved, own = content["state_dict"].keys(), module.state_dict().keys()
    refuse_differing(own - saved - (frozen_names(module) if is_partial else set()), saved - own)
    if is_partial:
        check_base(content[FROZEN_BASE_KEY], module)
    try:
        module.load_state_dict(content["state_dict"], strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model of {run or 'its own settings'}: {error}") from error
    model = getattr(module, "model", None)
    if not isinstance(model, (BaseModel, ComposedModel)):
        raise CheckpointError(
            f"{path}: a {type(module).__name__} holds no model of ours as `model`, so it cannot write."
        )
    return model


def _build(run: Path) -> Any:  # noqa: ANN401
    """Build the module that a run's configuration describes, as `fit` does."""
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse, about what Lightning calls
            config = parser.parse_object({"model": _read_config(run).get("model")})
            return parser.instantiate_classes(config).model
    except Exception as error:  # jsonargparse has errors of many kinds, and wraps those of classes
        raise CheckpointError(f"{run / CONFIG_NAME}: the model cannot be built: {error}") from error


def _rebuild(path: Path) -> Any:  # noqa: ANN401
    """Build the module from the words that its checkpoint carries; what is new runs nothing that a file says."""
    try:
        return SATLightningModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its kind depends on what is missing
        raise CheckpointError(
            f"{path} lies in no folder of a run with {CONFIG_NAME}, and cannot rebuild its model by itself "
            f"({error}). Give the folder of the run, or export the model."
        ) from error


def _find_tokenizer(name: str | None, weights: Path, run: Path | None) -> Tokenizer:
    if name is not None:
        return get_tokenizer(name)
    reason: DataError | None = None
    if weights.is_dir() and not (weights / COMPLETE_NAME).is_file():
        try:
            return get_tokenizer(weights)
        except DataError as error:
            reason = error
    if run is not None:
        arguments = _at(_read_config(run), "data", "init_args") or {}
        if isinstance(arguments.get("tokenizer"), str):
            end = (arguments.get("options") or {}).get("end_of_document_token")
            wanted = arguments["tokenizer"]
            return ByteTokenizer() if wanted == "bytes" else get_tokenizer(wanted, end)
    where = f"{run / CONFIG_NAME} names no tokenizer." if run else str(reason or f"{weights} comes without a run.")
    raise DataError(f"There is no tokenizer: {where} Name one: --tokenizer bytes, a file, or a model's folder.")


def find_wrapping(tokenizer: Any) -> tuple[list[int], list[int]]:  # noqa: ANN401
    """Return the ids that a tokenizer's file puts before and behind a text when it is asked for special tokens.

    Args:
        tokenizer: one with `to_json()`, the format of the `tokenizers` library; others put none.
    """
    if not hasattr(tokenizer, "to_json"):
        return [], []
    from tokenizers import Tokenizer as LibraryTokenizer  # it is there: it has made this one

    library = LibraryTokenizer.from_str(tokenizer.to_json())
    bare, whole = (library.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (whole[: places[0]], whole[places[0] + len(bare) :]) if places and bare else ([], [])


def _find_ends(tokenizer: Tokenizer, weights: Path) -> list[int]:
    ends = [int(tokenizer.end_of_document_id)]
    for file in (weights / "generation_config.json", weights / "config.json"):
        if file.is_file():
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            ends += named if isinstance(named, list) else [] if named is None else [named]
    return sorted({int(token) for token in ends})


def _read_config(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / CONFIG_NAME).read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError) as error:
        raise CheckpointError(f"{run / CONFIG_NAME} cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _at(values: Any, *names: str) -> Any:  # noqa: ANN401
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def describe_path(path: str | os.PathLike[str]) -> str:
    """Return a path as settings of an output keep it: absolute where it exists, as given otherwise."""
    return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else os.fspath(path)
