"""`sat-lightning convert SRC DST --to {native,sat,hf} [--verify]`: a checkpoint of any format as one of another."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from sat_lightning.checkpoint.files import MAX_SHARD_SIZE, found_beside, write_json, write_weights
from sat_lightning.checkpoint.fitting import check_fit
from sat_lightning.checkpoint.hub import locate
from sat_lightning.checkpoint.huggingface import write_huggingface
from sat_lightning.checkpoint.loading import Source, open_incoming
from sat_lightning.checkpoint.native import CONFIG_NAME, describe
from sat_lightning.checkpoint.pretrained import build_empty, read_blueprint
from sat_lightning.checkpoint.report import Tolerance
from sat_lightning.checkpoint.sat import write_sat
from sat_lightning.checkpoint.verify import compare_outputs
from sat_lightning.errors import CheckpointError, UsageError

FORMATS = ("native", "sat", "hf")
# What a model needs beside its weights, carried along as it is.
_COMPANIONS = (
    "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.txt "
    "vocab.json merges.txt spiece.model sentencepiece.bpe.model ice_text.model chat_template.jinja "
    "generation_config.json preprocessor_config.json"
).split()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Literal["native", "sat", "hf"],
    *,
    dtype: torch.dtype | None = None,
    model_parallel_size: int = 1,
    model_type: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    ignore: tuple[str, ...] = (),
    **reading: Any,
) -> None:
    """Write a checkpoint in another format, tensor by tensor; nothing is computed beyond layouts.

    Args:
        source: a folder of any format, a known name, or a URL.
        target: a folder that does not exist yet, or is empty; it appears whole or not at all.
        to: the format.
        dtype: of floating-point tensors.
        model_parallel_size: partitions of a SAT folder.
        model_type: of a Hugging Face folder, where a family has several.
        max_shard_size: bytes above which weights are written in several files (native and Hugging Face).
        ignore: names of the source, with `*`, that are left behind.
        **reading: see `checkpoint.loading.Source`.

    Raises:
        CheckpointError: if the source cannot be read whole, or the target format has no place for a part of it.
    """
    path, target = locate(source), Path(target)
    _refuse_taken(target)
    plan, tolerance = read_blueprint(path), Tolerance(ignore=ignore)
    model = build_empty(plan, str(path))
    incoming = open_incoming(Source(path, **reading), model)
    check_fit(model, incoming, tolerance, what=str(path))
    # What no file has, the constructor has computed.
    tensors = _Ordered(list(model.state_dict()), ChainMap(incoming.tensors, model.state_dict()), dtype)  # type: ignore[arg-type]
    with _appearing_whole(target) as temporary:
        if to == "native":
            write_weights(temporary, tensors.items(), max_shard_size)
            write_json(temporary / CONFIG_NAME, describe(model))
        elif to == "sat":
            config = model.config.replace(model_parallel_size=model_parallel_size)
            values = describe(model) | {"model_parallel_size": model_parallel_size}
            write_sat(tensors, config, values, temporary, step=1)
        else:
            write_huggingface(tensors, model.config, type(model), temporary, model_type, max_shard_size)
        for name in _COMPANIONS:
            if path.is_dir() and (path / name).is_file():
                shutil.copyfile(path / name, temporary / name)


def _refuse_taken(target: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file. Name a new folder.")
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} exists and is not empty.{found_beside(target / 'x')} Choose another folder.")


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Write to a temporary folder beside, and rename it once all is written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.is_dir():
            folder.rmdir()  # empty: os.replace cannot put a folder over it everywhere
        os.replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} was not written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Ordered(Mapping[str, Tensor]):
    """Tensors in the order of the model's state dict, cast when they are asked for."""

    def __init__(self, names: list[str], tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self._names, self._tensors, self._dtype = names, tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as all verbs do."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run_convert(verb: str, words: list[str]) -> None:
    """Run the verb.

    Args:
        verb: its name.
        words: what stands after it.

    Raises:
        UsageError: if the words cannot be understood.
        CheckpointError: see `convert`; and if `--verify` finds a difference above the tolerance.
    """
    parser = _Parser(prog=f"sat-lightning {verb}", allow_abbrev=False, description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a folder of any format, a known name, hf://org/name, or a URL")
    parser.add_argument("target", metavar="DST", help="a new folder")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format of DST")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="cast to; default: as it is")
    parser.add_argument("--model-parallel-size", type=int, default=1, metavar="N", help="partitions of a SAT folder")
    parser.add_argument("--model-type", metavar="NAME", help="of a Hugging Face folder, where a family has several")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file; default: 5")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="names of SRC to leave behind")
    parser.add_argument("--step", help="of a SAT run; default: the one that 'latest' names")
    parser.add_argument("--interleaved-qkv", action="store_true", help="SRC is a ChatGLM-6B of SAT before v0.4.1")
    parser.add_argument("--verify", action="store_true", help="run SRC and DST, compare, exit 1 if they differ")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of --verify, absolute; default: 1e-4")
    options = parser.parse_args(words)
    convert(
        options.source, options.target, options.to,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        model_parallel_size=options.model_parallel_size, model_type=options.model_type,
        max_shard_size=int(options.max_shard_size * (1 << 30)), ignore=tuple(options.ignore), step=options.step,
        interleaved_qkv=options.interleaved_qkv,
    )  # fmt: skip
    sys.stdout.write(f"wrote {options.target}\n")
    if options.verify:
        reading = {"step": options.step, "interleaved_qkv": options.interleaved_qkv, "ignore": tuple(options.ignore)}
        found = compare_outputs(locate(options.source), Path(options.target), **reading)
        sys.stdout.write(f"maximum difference {found.difference:.3e} ({found.description})\n")
        if not found.difference <= options.tolerance:
            raise CheckpointError(
                f"{options.target} differs from {options.source} by {found.difference:.3e}, above the tolerance "
                f"{options.tolerance:g} ({found.description}). Do not use it; lower precision needs a larger "
                "--tolerance."
            )
