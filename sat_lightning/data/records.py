"""Rows by number: map-style sources beside the streams of documents of `sources.py`, each row decoded when asked for.

What has `__len__` and `__getitem__` is a source of records; these add `name`, and `where(index)` for messages.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import Dataset

from sat_lightning.data.braces import expand_braces
from sat_lightning.data.mixed import MixedRows
from sat_lightning.data.remote import expand_remote, is_remote, keep_local_copy
from sat_lightning.data.samples import import_object
from sat_lightning.data.sources import _RECORD_BUILDERS, resolve_files
from sat_lightning.errors import DataError, nearest

Row = dict[str, Any]

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@runtime_checkable
class Records(Protocol):
    """Rows by number. May also have `where(index)`, `num_tokens(index)` and `__getitems__(indices)`."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...  # noqa: ANN401 - a row is what its source holds


class ConcatenatedRecords(Dataset[Any]):
    """Several sources as one: the rows of the first, then those of the second, and so on.

    Args:
        name: what messages call it.
        sources: the sources, in order.
    """

    def __init__(self, name: str, sources: Sequence[Records]) -> None:
        self.name = name
        self.sources = list(sources)
        self._rows = MixedRows(self.sources)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - a row is what its source holds
        source, row = self._locate(index)
        return source[row]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Rows of a batch; each source is asked once."""
        for index in (min(indices, default=0), max(indices, default=0)):
            check_index(self, index)
        return self._rows.__getitems__(indices)

    def num_tokens(self, index: int) -> int:
        """Tokens of a row, if its source can tell."""
        source, row = self._locate(index)
        return int(source.num_tokens(row))  # type: ignore[attr-defined]

    def where(self, index: int) -> str:
        """The place of a row, for messages."""
        return describe_row(*self._locate(index))

    def fingerprint(self) -> str | None:
        """What identifies the rows, if every source can tell."""
        parts = [identify_rows(source) for source in self.sources]
        return None if None in parts else repr(parts)

    def _locate(self, index: int) -> tuple[Records, int]:
        check_index(self, index)
        sources, rows = self._rows.locate([index])
        return self.sources[int(sources[0])], int(rows[0])


class NamedRecords(Dataset[Any]):
    """A user's own dataset, given a name.

    Args:
        name: what messages call it.
        dataset: what has `__len__` and `__getitem__`.
    """

    def __init__(self, name: str, dataset: Any) -> None:  # noqa: ANN401 - the user's own class
        self.name = name
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - a row is what its source holds
        return self.dataset[index]

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401 - whatever the dataset has beside
        if attribute.startswith("__") and attribute != "__getitems__" or attribute == "dataset":
            raise AttributeError(attribute)
        return getattr(self.dataset, attribute)


def open_records(
    path: str | os.PathLike[str] | Sequence[str],
    *,
    create_dataset: str | Callable[..., Any] | None = None,
    **options: Any,  # noqa: ANN401 - each format has its own
) -> Records:
    """Open rows by number; a row is decoded only when asked for.

    Args:
        path: a file, a folder, a glob, a remote file (`s3://...`), a registered scheme such as `hf://`, or a list of
            those. A folder of nothing but images is read as one folder a class.
        create_dataset: a function `(path, **options)`, a `Dataset` class, or the import path of one; it is handed
            `path` as it is.
        **options: of the format, for example `fields` of a table or `cache_dir`; those it does not know are refused.

    Returns:
        The rows; those of a table are dicts.

    Raises:
        DataError: nothing is there, it is empty, or the format or an option is unknown.
    """
    if create_dataset is not None:
        return _open_own(path, create_dataset, options)
    if not isinstance(path, (str, os.PathLike)):
        if not path:
            raise DataError("records: the list of paths is empty. Give at least one.")
        sources = [open_records(one, **options) for one in path]
        return sources[0] if len(sources) == 1 else ConcatenatedRecords(f"{path[0]}, ...", sources)
    path = os.fspath(path)
    if len(paths := expand_braces(path)) > 1 and not os.path.exists(path):
        return open_records(paths, **options)
    scheme, separator, rest = path.partition("://")
    if separator and scheme + separator in _RECORD_BUILDERS:
        return _build(scheme + separator, rest, path, options)
    if is_remote(path):
        urls = expand_remote(path)
        sources = [_build_file(keep_local_copy(url, options.get("cache_dir")), url, options) for url in urls]
        return sources[0] if len(sources) == 1 else ConcatenatedRecords(path, sources)
    if Path(path).is_dir() and Path(path).suffix in _RECORD_BUILDERS:  # an LMDB is a folder
        return _build_file(Path(path), path, options)
    files = resolve_files(path)
    if any(file.name == "state.json" for file in files):  # what Dataset.save_to_disk leaves beside the rows
        files = [file for file in files if file.suffix == ".arrow"] or files
    if len(files) > 1 and all(file.suffix.lower() in _IMAGE_SUFFIXES for file in files) and Path(path).is_dir():
        return _build("images://", path, path, options)
    # What stands beside another file's rows is no table of its own.
    files = [file for file in files if len(files) == 1 or not file.name.endswith(".meta.jsonl")]
    sources = [_build_file(file, path if len(files) == 1 else str(file), options) for file in files]
    return sources[0] if len(sources) == 1 else ConcatenatedRecords(path, sources)


def check_index(records: Records, index: int) -> None:
    """Refuse a row number outside a source.

    Args:
        records: the source.
        index: the row, from 0.

    Raises:
        IndexError: it is outside.
    """
    if not 0 <= index < len(records):
        raise IndexError(f"row {index} of {records.name}, which has {len(records)} rows (0 to {len(records) - 1})")


def describe_row(records: Any, index: int) -> str:  # noqa: ANN401 - a user's own dataset may be anything
    """Say where a row lies.

    Args:
        records: its source.
        index: its number.

    Returns:
        File and line, where the source can tell them; else its name and the number.
    """
    where = getattr(records, "where", None)
    return where(index) if where is not None else f"{getattr(records, 'name', type(records).__name__)}, row {index}"


def identify_rows(rows: Any) -> str | None:  # noqa: ANN401 - a user's own dataset may be anything
    """Identify what a source of rows, or a function over them, gives now.

    Args:
        rows: anything with a `fingerprint()`.

    Returns:
        Its fingerprint, or None if it has none.
    """
    own = getattr(rows, "fingerprint", None)
    return own() if callable(own) else None


def _build_file(file: Path, name: str, options: dict[str, Any]) -> Records:
    return _build(file.suffix.lower(), str(file), name, options)


def _build(key: str, path: str, name: str, options: dict[str, Any]) -> Records:
    builder = _RECORD_BUILDERS.get(key)
    if builder is None:
        raise DataError(
            f"records '{name}': no source of rows is registered for '{key}' ({path}). Known: "
            f"{', '.join(sorted(_RECORD_BUILDERS))}.{nearest(key, _RECORD_BUILDERS)} Convert it, or add your own with "
            f"@register_source('{key}', records=True)."
        )
    return _checked(_call(builder, path, name, options), name)


def _open_own(path: Any, create_dataset: str | Callable[..., Any], options: dict[str, Any]) -> Records:  # noqa: ANN401
    builder = import_object(create_dataset, "create_dataset") if isinstance(create_dataset, str) else create_dataset
    return _checked(_call(builder, path, f"{path}", options), f"{path}")


def _call(builder: Callable[..., Any], path: Any, name: str, options: dict[str, Any]) -> Any:  # noqa: ANN401
    parameters = inspect.signature(builder).parameters.values()
    known = [one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)][1:]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    # Where an index or a copy is cached concerns all of our formats, also those that cache nothing.
    given = {key: value for key, value in options.items() if key != "cache_dir" or takes_all or key in known}
    for key in given:
        if not (takes_all or key in known):
            raise DataError(
                f"records '{name}': unknown option '{key}'; {builder.__qualname__} takes {', '.join(known) or 'none'}."
                f"{nearest(key, known)}"
            )
    return builder(path, **given)


def _checked(built: Any, name: str) -> Records:  # noqa: ANN401 - what a builder gave
    if not (hasattr(built, "__len__") and hasattr(built, "__getitem__")):
        kind = "an iterable" if isinstance(built, Iterable) else "no dataset"
        raise DataError(
            f"records '{name}': {type(built).__name__} is {kind} without __len__ and __getitem__. Return a map-style "
            "dataset."
        )
    if len(built) == 0:
        raise DataError(f"records '{name}' is empty: 0 rows. Give a source with at least one, or leave it out.")
    return built if hasattr(built, "name") else NamedRecords(name, built)
