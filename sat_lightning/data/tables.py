"""Rows of text files by number: `.jsonl`, `.csv`, `.tsv`, and the lines of `.txt`."""

import codecs
import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from sat_lightning.data.lines import LineRecords, read_csv_rows
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.sources import register_source
from sat_lightning.errors import DataError, nearest

_DECODE = json.JSONDecoder().decode  # json.loads looks for other encodings first, which takes a third of its time


@register_source(".jsonl", records=True)
class JsonRecords(LineRecords):
    """Rows of a `.jsonl` file: a JSON object a line, parsed when asked for.

    Args:
        path: the file.
        fields: those that a row must have; the others are left out. Default all that are there.
        cache_dir: where the row offsets are kept; default `default_cache_dir()`.

    Raises:
        DataError: the file is empty or cannot be read.
    """

    def __init__(
        self, path: str, fields: Sequence[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(path, cache_dir=cache_dir)
        self.fields = fields

    def decode(self, content: bytes, index: int) -> dict[str, Any]:
        """Parse a row.

        Args:
            content: its bytes.
            index: its number.

        Returns:
            The object's fields.

        Raises:
            BadSampleError: it is no JSON object, or a field is missing.
        """
        try:
            row = parse_json(content)  # blank lines after it do not matter to JSON
        except ValueError as error:
            raise self.bad(index, f"{error}. Mend or remove the line.") from error
        return row if self.fields is None else select_fields(row, self.fields, lambda: self.where(index))


@register_source(".txt", records=True)
class TextLines(LineRecords):
    """Lines of a text file that are not blank: `{"text": line}` each.

    Args:
        path: the file.
        cache_dir: where the line offsets are kept; default `default_cache_dir()`.
    """

    def __init__(self, path: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__(path, cache_dir=cache_dir)

    def decode(self, content: bytes, index: int) -> dict[str, Any]:
        """Decode a line.

        Args:
            content: its bytes.
            index: its number.

        Returns:
            The line without its end.

        Raises:
            BadSampleError: it is not UTF-8.
        """
        return {"text": _decode_utf8(self, content.partition(b"\n")[0].rstrip(b"\r"), index)}


class TableRecords(LineRecords):
    """Rows of a delimited table: a dict of strings each, by the names of the header.

    Args:
        path: the file.
        delimiter: between fields.
        fields: columns to keep; default all.
        header: names of the columns of a file without a header; default its first row.
        quoted: fields may stand in double quotes, and hold delimiters and line ends there.
        cache_dir: where the row offsets are kept; default `default_cache_dir()`.

    Raises:
        DataError: the file is empty, has no rows, lacks a column, or a quote is never closed.
    """

    def __init__(
        self,
        path: str,
        delimiter: str = ",",
        fields: Sequence[str] | None = None,
        header: Sequence[str] | None = None,
        quoted: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, delimiter if quoted else None, cache_dir)
        self.delimiter = delimiter
        self.quoted = quoted
        self.header = list(header) if header is not None else self._parse(self.row_bytes(0), 0)
        self.first_row = 1 if header is None else 0
        self.header[0] = self.header[0].removeprefix("\ufeff")
        self.fields = list(self.header if fields is None else fields)
        if missing := [field for field in self.fields if field not in self.header]:
            raise DataError(
                f"{path}, line 1: no column '{missing[0]}'; columns there: {', '.join(self.header)}."
                f"{nearest(missing[0], self.header)} Name another, set the delimiter, or give the header."
            )
        if doubled := {name for name in self.header if self.header.count(name) > 1}:
            raise DataError(
                f"{path}, line 1: two columns are named '{min(doubled)}'. Rename one of them, or give the header."
            )
        if len(self) == 0:
            raise DataError(f"{path} is empty: a header and no rows. Give a file with rows, or leave it out.")

    def decode(self, content: bytes, index: int) -> dict[str, Any]:
        """Parse a row.

        Args:
            content: its bytes.
            index: its number.

        Returns:
            The fields.

        Raises:
            BadSampleError: it has another number of fields than the header.
        """
        values = self._parse(content, index)
        if len(values) != len(self.header):
            raise self.bad(
                index,
                f"{len(values)} fields, and the header has {len(self.header)} ({', '.join(self.header)}). Mend the "
                "row, quote fields that hold the delimiter, or set the right delimiter.",
            )
        row = dict(zip(self.header, values, strict=True))
        return {field: row[field] for field in self.fields}

    def _parse(self, content: bytes, index: int) -> list[str]:
        text = _decode_utf8(self, content, index)
        try:
            return next(read_csv_rows(io.StringIO(text, newline="\n"), self.delimiter, self.quoted))
        except csv.Error as error:
            raise self.bad(index, f"the row cannot be parsed ({error}). Mend it.") from error


register_source(".csv", records=True)(TableRecords)


@register_source(".tsv", records=True)
class TabSeparatedRecords(TableRecords):
    """A table whose fields stand between tabs.

    Args:
        path: the file.
        fields: columns to keep; default all.
        header: names of the columns of a file without a header; default its first row.
        quoted: fields may stand in double quotes.
        cache_dir: where the row offsets are kept; default `default_cache_dir()`.
    """

    def __init__(
        self,
        path: str,
        fields: Sequence[str] | None = None,
        header: Sequence[str] | None = None,
        quoted: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(path, "\t", fields, header, quoted, cache_dir)


def parse_json(line: bytes) -> dict[str, Any]:
    """Parse a line of a `.jsonl` file.

    Args:
        line: its bytes.

    Returns:
        The object.

    Raises:
        ValueError: it is none; says what it is.
    """
    try:
        row = _DECODE(line.decode())
    except json.JSONDecodeError as error:
        content = line.removeprefix(codecs.BOM_UTF8).rstrip()
        if content != line:  # what is cut off matters to the message
            return parse_json(content)
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object with fields")
    return row


def select_fields(row: dict[str, Any], fields: Sequence[str], where: Any) -> dict[str, Any]:  # noqa: ANN401
    """Keep some fields of a row.

    Args:
        row: the row.
        fields: names of those to keep, in order.
        where: called for the place of the row, for messages.

    Returns:
        A row of those fields alone.

    Raises:
        BadSampleError: one is missing.
    """
    try:
        return {field: row[field] for field in fields}
    except KeyError as error:
        missing = error.args[0]
        raise BadSampleError(
            f"{where()}: no field '{missing}'; fields there: {', '.join(sorted(row)) or 'none'}."
            f"{nearest(missing, row)} Name another field, or mend the row."
        ) from error


def _decode_utf8(records: LineRecords, content: bytes, index: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise records.bad(
            index, f"not UTF-8 (byte {error.start} of the row). Convert the file (iconv -t utf-8)."
        ) from error
