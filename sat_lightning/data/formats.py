"""The formats we read ourselves: text, `.jsonl`, token files, and the sources of Python's standard library."""

import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.samples import BadSampleError, BadSamples
from sat_lightning.data.sources import (
    FileSource,
    NotTextError,
    SourceOptions,
    Unfinished,
    list_files,
    register_source,
)
from sat_lightning.data.tables import parse_json
from sat_lightning.errors import DataError, nearest

_PIECE_SIZE = 4 << 20
_SNIFFED_SIZE = 8192


@register_source(".txt")
def read_text(path: str, options: SourceOptions) -> Iterator[bytes]:
    """Read a text file as one document, in pieces, so that its size does not matter.

    Args:
        path: the file; every extension without a builder of its own is read like this.
        options: unused.

    Yields:
        Pieces of UTF-8 bytes that end with a line where they can; all but the last are `Unfinished`.

    Raises:
        NotTextError: it holds NUL bytes.
    """
    carried = b""
    with open(path, "rb") as file:
        while True:
            block = file.read(_PIECE_SIZE)
            if not carried and b"\0" in block[:_SNIFFED_SIZE]:
                raise NotTextError(
                    f"{path} is not UTF-8 text: NUL byte at {block.index(0)}. Convert it (iconv -t utf-8), or name it "
                    ".bin or .npy if it holds token ids."
                )
            text = carried + block
            if len(block) < _PIECE_SIZE:
                yield text
                return
            cut = _find_cut(text)
            yield Unfinished(text[:cut])
            carried = text[cut:]


def _find_cut(text: bytes) -> int:
    """After the last line, else before the last character; never at the very end: the last piece needs something."""
    cut = text.rfind(b"\n", 0, len(text) - 1) + 1
    if cut == 0:
        cut = len(text) - 1
        while cut > 1 and text[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
            cut -= 1
    return cut


@register_source(".jsonl")
def read_jsonl(path: str, options: SourceOptions) -> Iterator[str]:
    """Read one document per line: the text field of a JSON object.

    Args:
        path: the file.
        options: `text_field` names the field.

    Yields:
        The texts.

    Raises:
        DataError: a line is not a JSON object with a string in that field; names file, line and cure. With
            `on_bad_sample: skip`, there are more of them than may be left out.
    """
    field, bad = options.text_field, BadSamples(path, options.on_bad_sample, options.max_bad_fraction)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            bad.count()
            try:
                text = take_text(_parse(line, path, number), field, partial("{}, line {}".format, path, number))
            except BadSampleError as error:
                bad.handle(error)
                continue
            yield text


def _parse(line: bytes, path: str, number: int) -> dict[str, Any]:
    try:
        return parse_json(line)
    except ValueError as error:
        raise BadSampleError(f"{path}, line {number}: {error}. Mend or remove the line.") from error


def take_text(row: dict[str, Any], field: str, where: Callable[[], str]) -> str:
    """Take the text out of a row.

    Args:
        row: the row.
        field: that holds the text.
        where: called for the row's place, for messages.

    Returns:
        The text.

    Raises:
        BadSampleError: the field is missing, or holds something else.
    """
    if field not in row:
        raise BadSampleError(
            f"{where()}: no field '{field}'; fields there: {', '.join(sorted(row)) or 'none'}.{nearest(field, row)} "
            "Set text_field to the one that holds the text."
        )
    if not isinstance(row[field], str):
        raise BadSampleError(
            f"{where()}: field '{field}' holds {type(row[field]).__name__}, not text. Set text_field to the one that "
            "holds the text."
        )
    return row[field]


@register_source(".bin")
def read_token_file(path: str, options: SourceOptions) -> Iterator[NDArray[np.integer]]:
    """Map a headerless file of token ids.

    Args:
        path: the file.
        options: `token_dtype` is its element type.

    Yields:
        One memory map of all ids.

    Raises:
        DataError: the type is not uint16 or uint32, or the size of the file is not a multiple of its size.
    """
    if options.token_dtype not in ("uint16", "uint32"):
        raise DataError(f"token_dtype is '{options.token_dtype}'; a .bin token file holds 'uint16' or 'uint32'.")
    dtype, size = np.dtype(options.token_dtype), Path(path).stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes are not a whole number of {dtype} token ids. It is truncated, or of another "
            "token_dtype (uint16, uint32)."
        )
    if size:
        yield np.memmap(path, dtype=dtype, mode="r")


@register_source(".npy")
def read_numpy_file(path: str, options: SourceOptions) -> Iterator[NDArray[np.integer]]:
    """Map a NumPy file of token ids.

    Args:
        path: the file.
        options: unused.

    Yields:
        One memory map of all ids.

    Raises:
        DataError: it is not a whole one-dimensional integer array.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: not a whole NumPy array file ({error}). Write it again with numpy.save.") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(
            f"{path}: a {tokens.dtype} array of shape {tokens.shape}; token ids are one dimension of integers. "
            "Save tokens.reshape(-1).astype('uint32')."
        )
    yield tokens


@register_source("stdlib://")
def open_standard_library(path: str, options: SourceOptions) -> FileSource:
    """Find the Python sources of the standard library of the interpreter that runs.

    Args:
        path: a package or module file in it, e.g. `asyncio`; empty for all of it.
        options: unused.

    Returns:
        The sorted `.py` files, without tests, installed packages and generated build data.

    Raises:
        DataError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    place = root / path
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages")
    files = [place] if place.is_file() else list_files(place, suffix=".py", skip=skip)
    files = [file for file in files if not file.name.startswith("_sysconfigdata")]
    if not files:
        raise DataError(
            f"data path 'stdlib://{path}': no .py files under {place}. Use stdlib:// for all of the standard library, "
            "an interpreter installed with its sources, or a path of your own text."
        )
    return FileSource(f"stdlib://{path}", files, options)
