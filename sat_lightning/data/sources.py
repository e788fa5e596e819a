"""Where documents come from: a registry from file extension or scheme to builder, and what a path stands for."""

import glob
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.braces import expand_braces
from sat_lightning.data.samples import OnBadSample
from sat_lightning.errors import DataError, nearest

Document = str | bytes | NDArray[np.integer[Any]]
"""Text, UTF-8 bytes, or an array of ready token ids."""


class Unfinished(bytes):
    """A piece of a document that goes on in the next one: no end-of-document id follows it."""


class NotTextError(DataError):
    """A file read as text holds something else; one found in a folder is skipped, one that was named is an error."""


@dataclass(frozen=True)
class SourceOptions:
    """How files are read."""

    text_field: str = "text"
    """Name of the field that holds the text of a `.jsonl` row."""
    token_dtype: str = "uint16"
    """Element type of a headerless `.bin` token file: uint16 or uint32."""
    on_bad_sample: OnBadSample = "raise"
    """What happens at a row that cannot be read, or is no text: `raise`, or `skip`, which leaves out and counts it."""
    max_bad_fraction: float = 0.01
    """The share of the rows that may be skipped."""
    cache_dir: str | None = None
    """Where prepared tokens, copies of remote files and indices are kept; default `$SAT_HOME/data`, else the user's
    cache folder. What lies there is removed by `sat-lightning clean-cache` alone."""

    def fingerprint(self) -> str:
        """What identifies the content of a file that is read with these options, wherever it is cached."""
        names = ("text_field", "token_dtype", *(("on_bad_sample",) if self.on_bad_sample != "raise" else ()))
        return repr({name: getattr(self, name) for name in names})


@runtime_checkable
class Source(Protocol):
    """Documents that can be read again and again, lazily."""

    name: str
    num_bytes: int
    """Size for the progress bar; 0 if unknown."""

    def __iter__(self) -> Iterator[Document]: ...

    def fingerprint(self) -> str:
        """What identifies the content; the token store is prepared anew when it changes."""


Builder = Callable[[str, SourceOptions], Iterable[Document]]
BuilderT = TypeVar("BuilderT", bound=Callable[..., Any])

_BUILDERS: dict[str, Builder] = {}
_RECORD_BUILDERS: dict[str, Callable[..., Any]] = {}


def register_source(*names: str, records: bool = False) -> Callable[[BuilderT], BuilderT]:
    """Make a builder known for file extensions (`".jsonl"`) or schemes (`"stdlib://"`).

    A builder of documents takes `(path, options)` and returns documents, for instance as a generator. An extension's
    builder is handed one file; a scheme's is handed what follows `://`, and may return a `Source` to have its content
    fingerprinted rather than its path. A builder of records takes `(path, **its own options)` and returns rows by
    number: anything with `__len__` and `__getitem__`.

    Args:
        *names: extensions with their dot, or schemes with their `://`.
        records: the builder gives rows for `open_records`, not documents for `open_source`.

    Returns:
        A decorator that gives the builder back unchanged.

    Raises:
        DataError: a name is neither, or is taken by another builder.
    """
    builders: dict[str, Any] = _RECORD_BUILDERS if records else _BUILDERS

    def register(builder: BuilderT) -> BuilderT:
        for name in names:
            if not (name.startswith(".") or name.endswith("://")):
                raise DataError(f"register_source: '{name}' is neither an extension ('.ext') nor a scheme ('name://').")
            if builders.setdefault(name, builder) is not builder:
                raise DataError(f"register_source: '{name}' is taken by {builders[name].__qualname__}. Choose another.")
        return builder

    return register


class FileSource:
    """Files read one after the other, each by the builder of its extension, as text if it has none.

    Args:
        name: what messages call it.
        files: the files, in order.
        options: how they are read.
        skip_what_is_not_text: leave out files that are not text, with a warning, rather than refuse them.
    """

    def __init__(
        self, name: str, files: Sequence[Path], options: SourceOptions, skip_what_is_not_text: bool = False
    ) -> None:
        self.name = name
        self.files = files
        self.options = options
        self.skip_what_is_not_text = skip_what_is_not_text
        self._stats = [file.stat() for file in files]
        self.num_bytes = sum(stat.st_size for stat in self._stats)

    def __iter__(self) -> Iterator[Document]:
        skipped: list[str] = []
        for file in self.files:
            builder = _BUILDERS.get(file.suffix.lower(), _BUILDERS[".txt"])
            try:
                yield from builder(str(file), self.options)
            except NotTextError:
                if not self.skip_what_is_not_text:
                    raise
                skipped.append(file.name)
        if skipped:
            warnings.warn(
                f"{self.name}: {len(skipped)} of {len(self.files)} files are not text and were left out, "
                f"for instance {', '.join(skipped[:3])}.",
                stacklevel=2,
            )

    def fingerprint(self) -> str:
        """Digest of names, sizes and modification times, and of the options."""
        digest = hashlib.sha256(self.options.fingerprint().encode())
        for file, stat in zip(self.files, self._stats, strict=True):
            digest.update(os.fsencode(file) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class _BuiltSource:
    """A scheme's builder that gives plain documents, called anew for every reading."""

    num_bytes = 0

    def __init__(self, name: str, read: Callable[[], Iterable[Document]]) -> None:
        self.name = name
        self._read = read

    def __iter__(self) -> Iterator[Document]:
        return iter(self._read())

    def fingerprint(self) -> str:
        return self.name


class _CombinedSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.name = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        self.num_bytes = sum(source.num_bytes for source in sources)

    def __iter__(self) -> Iterator[Document]:
        return chain.from_iterable(self.sources)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


def open_source(path: str | os.PathLike[str] | Sequence[str], options: SourceOptions | None = None) -> Source:
    """Find what a path stands for; nothing is read yet.

    Args:
        path: a file, a folder (all files in it, recursively, hidden ones left out), a glob (`**` goes deep), a
            registered scheme such as `stdlib://` or `s3://`, any of them with braces (`s3://bucket/{000..031}.tar`),
            or a list of those.
        options: how files are read.

    Returns:
        The documents, as a `Source` that can be read repeatedly.

    Raises:
        DataError: nothing is there, or the scheme is unknown.
    """
    options = options or SourceOptions()
    given = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(one) for one in path]
    if not given:
        raise DataError("data path is an empty list. Give at least one file, folder, glob or scheme, e.g. stdlib://")
    # Braces may be part of a file's name.
    expanded = [one for pattern in given for one in ([pattern] if Path(pattern).exists() else expand_braces(pattern))]
    sources = [_open_one(one, options) for one in expanded]
    return sources[0] if len(sources) == 1 else _CombinedSource(sources)


def _open_one(path: str, options: SourceOptions) -> Source:
    scheme, separator, rest = path.partition("://")
    if separator:
        builder = _BUILDERS.get(scheme + separator)
        if builder is None:
            known = sorted(name for name in _BUILDERS if name.endswith("://"))
            raise DataError(
                f"data path '{path}': no source is registered for '{scheme}://'. Known: {', '.join(known)}."
                f"{nearest(scheme + separator, known)} Add your own with @register_source('{scheme}://')."
            )
        built = builder(rest, options)
        return built if isinstance(built, Source) else _BuiltSource(path, lambda: builder(rest, options))
    files = resolve_files(path)
    return FileSource(path, files, options, skip_what_is_not_text=files != [Path(path).expanduser().absolute()])


def resolve_files(path: str) -> list[Path]:
    """Find the files that a path stands for.

    Args:
        path: a file, a folder (all files in it, recursively, hidden ones left out) or a glob.

    Returns:
        Absolute paths, sorted; at least one.

    Raises:
        DataError: there is none.
    """
    if not path.strip():
        raise DataError("data path is empty. Give a file, folder or glob, or stdlib:// for Python's own sources.")
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return [place]
    files = list_files(place) if place.is_dir() else _expand_glob(place)
    if not files:
        raise DataError(_describe_missing(path, place))
    return files


def list_files(folder: Path, suffix: str = "", skip: Iterable[str] = ()) -> list[Path]:
    """List the files under a folder, sorted, hidden ones and `__pycache__` left out.

    Args:
        folder: where to look, recursively.
        suffix: what their names end with.
        skip: names of folders not to enter.

    Returns:
        Their paths.
    """
    skipped = {"__pycache__", *skip}
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(place, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    # By parts, so that the order is the same wherever the separator sorts.
    return sorted((file for file in found if file.is_file()), key=lambda file: file.parts)


def _expand_glob(pattern: Path) -> list[Path]:
    found = map(Path, glob.glob(str(pattern), recursive=True))
    return sorted((file for file in found if file.is_file()), key=lambda file: file.parts)


def _describe_missing(path: str, place: Path) -> str:
    cure = "Give an existing file, folder or glob, or stdlib:// for the sources of Python's standard library."
    if place.is_dir():
        return f"data path '{path}': the folder {place} holds no files (hidden ones are left out). {cure}"
    if glob.has_magic(str(place)):
        return f"data path '{path}': no file matches {place} ('**' enters folders, '*' does not). {cure}"
    return f"data path '{path}' does not exist: {describe_nearest(place)} {cure}"


def describe_nearest(place: Path) -> str:
    """Say what was looked for and what lies near it.

    Args:
        place: an absolute path that does not exist.

    Returns:
        Two sentences for an error message.
    """
    parent, wanted = place.parent, place.name
    while not parent.is_dir() and parent != parent.parent:
        parent, wanted = parent.parent, parent.name
    names = sorted(entry.name for entry in parent.iterdir())
    close = get_close_matches(wanted, names, n=3, cutoff=0.4)
    there = f"Nearest names in {parent}: {', '.join(close)}." if close else f"{parent} holds nothing named like it."
    return f"looked for {place}. {there}"
