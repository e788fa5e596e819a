"""Where the rows of a text file begin: found once, kept in the cache, memory-mapped; and rows cut out by number."""

import csv
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from sat_lightning.data.records import check_index
from sat_lightning.data.remote import cached_file, identify
from sat_lightning.data.samples import BadSampleError
from sat_lightning.errors import DataError

_VERSION = 1
_BLOCK_SIZE = 16 << 20
_NUM_BUFFERED = 1 << 16
_NEWLINE = 10
_MAX_FIELD_SIZE = 2**31 - 1


class LineRecords(Dataset[Any]):
    """Base of text files with one row a line: finds a row's bytes by number, and names its line in messages.

    The offsets of the rows lie in a memory-mapped file, eight bytes a row, and the text in another: building the
    source costs one pass over the file the first time, and nothing later; it never holds a row.

    Args:
        path: the file.
        delimiter: of a quoted table, whose rows may span lines; None for plain lines.
        cache_dir: where the offsets are kept; default `default_cache_dir()`.

    Raises:
        DataError: the file is empty or cannot be read, or a quote is never closed.
    """

    def __init__(
        self, path: str, delimiter: str | None = None, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self.name = path
        self.path = path
        kind = hashlib.sha256(f"{_VERSION}\0{delimiter}".encode()).hexdigest()[:8]
        key = f"{identify(path)}-{kind}.offsets"
        self._index_file = cached_file("index", key, cache_dir, lambda file: _write_offsets(path, delimiter, file))
        # The last offset is the end of the file.
        self._num_rows = self._index_file.stat().st_size // 8 - 1
        self.first_row = 0
        self._offsets: NDArray[np.int64] | None = None
        self._text: mmap.mmap | None = None
        if self._num_rows == 0:
            raise DataError(f"{path} is empty: no line in it holds anything. Give a file with rows, or leave it out.")

    def __len__(self) -> int:
        return self._num_rows - self.first_row

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        return self.decode(self.row_bytes(index), index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of a batch, their places looked up at once."""
        numbers = np.asarray(indices, dtype=np.int64)
        for outside in numbers[(numbers < 0) | (numbers >= len(self))].tolist():
            check_index(self, outside)
        offsets, text = self._map()
        starts = offsets[numbers + self.first_row].tolist()
        ends = offsets[numbers + self.first_row + 1].tolist()
        return [self.decode(text[a:b], index) for index, a, b in zip(numbers.tolist(), starts, ends, strict=True)]

    def decode(self, content: bytes, index: int) -> dict[str, Any]:
        """Turn the bytes of a row into a row.

        Args:
            content: the bytes, perhaps with blank lines after them.
            index: its number, for messages.

        Returns:
            The row.
        """
        raise NotImplementedError

    def row_bytes(self, index: int) -> bytes:
        """The bytes of a row, with whatever blank lines follow it.

        Args:
            index: its number; `first_row` rows of the file, its header, come before row 0.

        Returns:
            A copy of the bytes.
        """
        index += self.first_row
        offsets, text = self._map()
        return text[offsets[index] : offsets[index + 1]]

    def _map(self) -> tuple[NDArray[np.int64], mmap.mmap]:
        if self._offsets is None or self._text is None:
            self._offsets = np.memmap(self._index_file, dtype=np.int64, mode="r").view(np.ndarray)
            with open(self.path, "rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._offsets, self._text

    def where(self, index: int) -> str:
        """The file and line of a row.

        Args:
            index: its number.

        Returns:
            For instance `corpus.jsonl, line 17`.
        """
        offsets, text = self._map()
        stop, num_lines = int(offsets[index + self.first_row]), 0
        # Only errors ask for it, so it may cost a pass over what lies before.
        for start in range(0, stop, _BLOCK_SIZE):
            num_lines += text[start : min(start + _BLOCK_SIZE, stop)].count(b"\n")
        return f"{self.path}, line {num_lines + 1}"

    def fingerprint(self) -> str:
        """What identifies the rows: the file as it is now, and how it is read."""
        settings = {key: value for key, value in self.__dict__.items() if not key.startswith("_")}
        return f"{identify(self.path)}{sorted(settings.items())}"

    def bad(self, index: int, reason: str) -> BadSampleError:
        """An error about a row.

        Args:
            index: its number.
            reason: what is wrong, and the cure.

        Returns:
            The error, to be raised.
        """
        return BadSampleError(f"{self.where(index)}: {reason}")

    def __getstate__(self) -> dict[str, Any]:
        # Neither memory map can be pickled cheaply; a worker opens its own.
        return {**self.__dict__, "_offsets": None, "_text": None}


def read_csv_rows(lines: Iterable[str], delimiter: str, quoted: bool = True) -> Iterator[list[str]]:
    """Parse delimited text strictly: a quote that is never closed is an error, not a field of a gigabyte.

    Args:
        lines: lines of text, with their ends.
        delimiter: between fields.
        quoted: fields may stand in double quotes; False takes quotes as they are.

    Returns:
        Rows of fields.
    """
    csv.field_size_limit(_MAX_FIELD_SIZE)  # Python's default of 128 KiB would refuse an ordinary document
    if not quoted:
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _write_offsets(path: str, delimiter: str | None, target: BinaryIO) -> None:
    size = Path(path).stat().st_size
    with (
        open(path, "rb") as file,
        tqdm(total=size, desc=f"indexing {path}", unit="B", unit_scale=True, disable=None) as progress,
    ):
        # Rows can only span lines between quotes.
        spans_lines = delimiter is not None and _holds_quote(file)
        file.seek(0)
        blocks = _scan_table(path, file, str(delimiter), progress) if spans_lines else _scan_lines(file, progress)
        for block in blocks:
            target.write(block.astype(np.int64).tobytes())
    target.write(np.array([size], dtype=np.int64).tobytes())


def _holds_quote(file: BinaryIO) -> bool:
    while block := file.read(_BLOCK_SIZE):
        if b'"' in block:
            return True
    return False


def _scan_lines(file: BinaryIO, progress: Any) -> Iterator[NDArray[np.int64]]:  # noqa: ANN401 - a tqdm
    """Starts of the lines that hold anything, a block of the file at a time."""
    position, carried = 0, list[bytes]()
    while block := file.read(_BLOCK_SIZE):
        progress.update(len(block))
        carried.append(block)
        if b"\n" in block:  # a line may be longer than many blocks
            text = b"".join(carried)
            cut = text.rfind(b"\n") + 1
            yield position + _line_starts(text[:cut])
            carried, position = [text[cut:]], position + cut
    yield position + _line_starts(b"".join(carried))


def _line_starts(text: bytes) -> NDArray[np.int64]:
    if not text:
        return np.empty(0, dtype=np.int64)
    values = np.frombuffer(text, dtype=np.uint8)
    newlines = np.flatnonzero(values == _NEWLINE)
    starts = np.concatenate(([0], newlines + 1))
    starts = starts[starts < len(values)]
    ends = np.concatenate((newlines, [len(values)]))[: len(starts)]
    is_blank = starts == ends
    # A line that begins with white space may hold nothing else; few do.
    for number in np.flatnonzero((values[starts] <= 32) & ~is_blank).tolist():
        is_blank[number] = not text[starts[number] : ends[number]].strip()
    return starts[~is_blank]


def _scan_table(path: str, file: BinaryIO, delimiter: str, progress: Any) -> Iterator[NDArray[np.int64]]:  # noqa: ANN401
    """Starts of the rows of a table, by the parser that will read them."""
    position = start = num_lines = 0

    def read_lines() -> Iterator[str]:
        nonlocal position, num_lines
        for line in file:
            position += len(line)
            num_lines += 1
            yield line.decode("latin-1")  # delimiters, quotes and line ends are ASCII; the rest does not matter here

    starts: list[int] = []
    first_line = 1
    try:
        for row in read_csv_rows(read_lines(), delimiter):
            if len(row) > 1 or (row and row[0].strip()):
                starts.append(start)
            progress.update(position - start)
            start, first_line = position, num_lines + 1
            if len(starts) == _NUM_BUFFERED:
                yield np.array(starts)
                starts.clear()
    except csv.Error as error:
        raise DataError(
            f"{path}, line {first_line}: the row that begins there cannot be parsed ({error}). Close the quote, double "
            "those inside a quoted field, or set quoted: false if quotes mean nothing in this file."
        ) from error
    yield np.array(starts, dtype=np.int64)
