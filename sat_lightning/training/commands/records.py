"""Prompts from a file, and an output that a killed run can go on with.

An input line is `{"prompt": "..."}`, with `"input_ids": [...]` in the place of text if wished, or a JSON string. Its
other entries come back in the output line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sat_lightning.errors import DataError, UsageError
from sat_lightning.training.runs import write_whole

#: Entries of an output line that are ours, whatever the input's line has under these names.
OWN_FIELDS = frozenset(("index", "generated", "finish", "num_tokens", "score", "alternatives"))
SETTINGS_SUFFIX = ".settings.json"


@dataclass(frozen=True)
class Record:
    """One prompt."""

    index: int
    """Its line, from 0 on."""
    prompt: str | tuple[int, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    """All that its line said."""


def read_records(path: str | os.PathLike[str], name: str = "prompt") -> list[Record]:
    """Read a JSONL file of prompts; empty lines are left out, and still count.

    Args:
        path: of the file.
        name: of the entry that holds the text.

    Returns:
        The prompts in their order.

    Raises:
        DataError: the file or a line cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--input {path} cannot be read: {error}.") from error
    found = [_read_line(line, index, str(path), name) for index, line in enumerate(lines) if line.strip()]
    if not found:
        raise DataError(f"--input {path} holds no prompt.")
    return found


def _read_line(line: str, index: int, path: str, name: str) -> Record:
    where = f"{path}:{index + 1}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f'{where} is no JSON ({error.msg}). A line is {{"{name}": "..."}}, or a JSON string.'
        ) from error
    if isinstance(value, str):
        return Record(index, value, {name: value})
    if isinstance(value, dict) and isinstance(value.get(name), str):
        return Record(index, value[name], value)
    ids = value.get("input_ids") if isinstance(value, dict) else None
    if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
        return Record(index, tuple(ids), value)
    known = f"a {type(value).__name__}"
    if isinstance(value, dict):
        known = f"only {', '.join(map(repr, value)) or 'nothing'}"
        wrong = [f"'{key}' is of type {type(value[key]).__name__}" for key in (name, "input_ids") if key in value]
        known = wrong[0] if wrong else known
    raise DataError(f"{where} holds no text as '{name}' and no input_ids, {known}. Name the entry: --field NAME.")


class Output:
    """A JSONL file that grows by whole lines, each once, and that says what is in it already.

    While it grows its lines stand in the order in which they were finished; `sort` puts them into the order of the
    input. Each has its `index`. A last line that was torn by a kill is cut off. Beside the file lies
    `<file>.settings.json`: what the lines were made with, so that no other settings add to them.

    Args:
        path: of the file.
        settings: plain values.
        overwrite: begin anew, whatever is there; it is there until `begin`.

    Raises:
        UsageError: the file was made with other settings.
        DataError: it cannot be read or written, or its lines belong to other prompts.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.settings_path = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        self.overwrite = overwrite
        self.settings = settings if overwrite else self._settle(settings)
        self.done: set[int] = set()
        self._places: dict[int, tuple[int, int]] = {}

    def _settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of this file: those of before where there are some, which `settings` must not change."""
        if not self.path.exists() or not self.path.stat().st_size:
            return settings
        if not self.settings_path.is_file():
            raise DataError(f"{self.path} exists, and is no output of this verb. Choose another, or give --overwrite.")
        before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        # A seed that nobody chose is the one of before.
        settings = {**settings, **({"seed": before.get("seed")} if settings.get("seed") is None else {})}
        other = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if other:
            names = ", ".join(f"{name} (was {before.get(name)!r}, is {settings.get(name)!r})" for name in other)
            raise UsageError(f"{self.path} was begun with other settings: {names}. Restore them, or give --overwrite.")
        return settings

    def begin(self, settings: dict[str, Any], records: Sequence[Record]) -> None:
        """Write the settings down, mend the file, and find out which prompts are done; the lines are looked at first.

        Args:
            settings: as they are used now, seed included.
            records: all prompts of the input.
        """
        if self.overwrite:
            self.path.unlink(missing_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        prompts = {record.index: record.fields for record in records}
        start = 0
        for number, line in enumerate(whole.splitlines(keepends=True), start=1):
            index, found = self._read_line(line, number)
            given = {name: value for name, value in prompts.get(index, {}).items() if name not in OWN_FIELDS}
            if index not in prompts or not given.items() <= found.items():
                raise DataError(
                    f"{self.path}:{number} belongs to another input. Choose another output, or --overwrite."
                )
            self._places[index] = (start, len(line))
            start += len(line)
        self.done = set(self._places)
        write_whole(self.settings_path, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _read_line(self, line: bytes, number: int) -> tuple[int, dict[str, Any]]:
        try:
            found = json.loads(line)
            return int(found["index"]), found
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}:{number} is no line of this verb. Choose another, or --overwrite.") from error

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines, each with its `index`, by one write that is forced to the disk.

        Args:
            lines: of a batch.

        Raises:
            DataError: the disk does not take them.
        """
        encoded = {line["index"]: encode_line(line) for line in lines}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                start = file.tell()
                file.write(b"".join(encoded.values()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self.path} could not be written: {error}. What it holds stays; go on later.") from error
        for index, line in encoded.items():
            self._places[index] = (start, len(line))
            start += len(line)
        self.done |= encoded.keys()

    def sort(self) -> None:
        """Put the lines into the order of the input, in a new file that takes the place of the old one."""
        order = sorted(self._places)
        if [self._places[index] for index in order] == sorted(self._places.values()):
            return
        content = self.path.read_bytes()
        write_whole(self.path, b"".join(content[start : start + size] for start, size in map(self._places.get, order)))  # type: ignore[misc]


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a second process from adding to the same output.

    Args:
        path: of the output.

    Raises:
        DataError: another process writes it.
    """
    place = Path(path).with_name(f".{Path(path).name}.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:  # the file is the other's: it stays
        raise DataError(
            f"{path} is being written by another process. Wait for it, or choose another output."
        ) from error
    try:
        yield
    finally:
        _remove(place)
        lock.release()


def _remove(place: Path) -> None:
    """Remove a lock's file while it is held: who opened it meanwhile sees that it is gone, and begins anew."""
    with suppress(PermissionError):  # an open file stays on Windows
        place.unlink(missing_ok=True)


def encode_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON: readable text, and lone surrogates as escapes."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")
