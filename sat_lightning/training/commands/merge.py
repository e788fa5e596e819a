"""`sat-lightning merge --ckpt ADAPTER_OR_RUN --base BASE --output FOLDER`: a fine-tuned model as a plain one.

--ckpt is an adapter (ours, or PEFT's), which needs the base that it was trained on; or a run, one of its checkpoints or
a model folder with its mixins, which bring their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from sat_lightning.checkpoint import AutoModel, load_peft, save_huggingface, save_pretrained, save_sat
from sat_lightning.checkpoint.adapters import CONFIG_NAME, load_adapter
from sat_lightning.checkpoint.files import read_json
from sat_lightning.checkpoint.merge import merge_adapters
from sat_lightning.checkpoint.native import all_mixins
from sat_lightning.checkpoint.peft import CONFIG_NAME as PEFT_CONFIG_NAME
from sat_lightning.errors import CheckpointError, UsageError
from sat_lightning.training.commands.source import load_model

_WRITERS: dict[str, Any] = {"native": save_pretrained, "sat": save_sat, "hf": save_huggingface}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as all verbs do."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run_merge(verb: str, words: list[str]) -> None:
    """Run the verb.

    Args:
        verb: its name.
        words: what stands after it.

    Raises:
        UsageError: if the words cannot be understood.
        SatError: if something cannot be read or merged, or the output exists.
    """
    parser = _Parser(prog=f"sat-lightning {verb}", allow_abbrev=False, description=__doc__)
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="an adapter, a run, a checkpoint or a folder")
    parser.add_argument("--base", metavar="PATH", help="what the adapter was trained on: a folder or a known name")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--to", choices=_WRITERS, default="native", help="the format of FOLDER; default: native")
    parser.add_argument("--dtype", choices=_DTYPES, help="of what is written; default: the base's")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME", help="a mixin that is not merged")
    options = parser.parse_args(words)
    target = Path(options.output)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty. Name a new folder.")
    model = load_finetuned(options.ckpt, options.base)
    merged = merge_adapters(model, options.keep)
    if not merged:
        raise CheckpointError(f"{options.ckpt} has nothing to merge: its mixins are {list(dict(all_mixins(model)))}.")
    if options.dtype:
        model.to(_DTYPES[options.dtype])
    _WRITERS[options.to](model, target)
    sys.stdout.write(f"merged {', '.join(merged)}; wrote {target}\n")


def load_finetuned(path: str, base: str | None = None) -> Any:  # noqa: ANN401
    """Load a fine-tuned model with its mixins.

    Args:
        path: an adapter's folder, or whatever holds a whole model.
        base: the model that an adapter belongs to, or that a checkpoint without the base was trained on.

    Raises:
        CheckpointError: if something cannot be read, or the base is missing or another one.
    """
    folder = Path(path).expanduser()
    is_ours, is_peft = (folder / CONFIG_NAME).is_file(), (folder / PEFT_CONFIG_NAME).is_file()
    if not (is_ours or is_peft):
        return load_model(path, base=base)
    if base is None:
        raise CheckpointError(f"{path} is an adapter. Give the model that it was trained on: --base PATH.")
    dtype: Any = "auto"
    if is_ours and (trained_in := read_json(folder / CONFIG_NAME).get("base_dtype")) in _DTYPES:
        dtype = _DTYPES[trained_in]  # a file in half precision may have been trained in full, and is known by its bytes
    model = AutoModel.from_pretrained(base, dtype=dtype)
    load_adapter(model, folder) if is_ours else load_peft(model, folder)
    return model
