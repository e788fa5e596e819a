"""Rows by number that libraries of the extra `[data]` read: Arrow, Parquet, Hugging Face's hub, LMDB, image folders."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from sat_lightning.data.records import check_index
from sat_lightning.data.samples import BadSampleError, import_extra
from sat_lightning.data.sources import register_source
from sat_lightning.data.tables import parse_json
from sat_lightning.errors import DataError, nearest


class ArrowRecords(Dataset[Any]):
    """Rows of a `datasets.Dataset`, which maps them from disk.

    Args:
        name: what messages call it.
        dataset: of the `datasets` library.
        fields: columns to keep; default all.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, name: str, dataset: Any, fields: Sequence[str] | None = None) -> None:  # noqa: ANN401
        self.name = name
        for field in fields or ():
            if field not in dataset.column_names:
                raise DataError(
                    f"{name}: no column '{field}'; columns there: {', '.join(dataset.column_names)}."
                    f"{nearest(field, dataset.column_names)} Name another."
                )
        self.dataset = dataset if fields is None else dataset.select_columns(list(fields))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        return self.dataset[int(index)]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of a batch, gathered at once."""
        columns = self.dataset[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def fingerprint(self) -> str:
        """What identifies the rows, as the library knows it."""
        return str(self.dataset._fingerprint)


@register_source(".parquet", records=True)
def open_parquet(
    path: str, fields: Sequence[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> ArrowRecords:
    """Open a Parquet file; the first time it is written out as Arrow, which can be read by row.

    Args:
        path: the file.
        fields: columns to keep; default all.
        cache_dir: where the Arrow file is kept; default that of the `datasets` library.

    Returns:
        Its rows.

    Raises:
        DataError: the library is missing, or the file is none.
    """
    datasets = import_extra("datasets", f"records '{path}'")
    cache = None if cache_dir is None else str(cache_dir)
    try:
        dataset = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=cache)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path}: not a whole Parquet file ({_reason(error)}). Write it again.") from error
    return ArrowRecords(path, dataset, fields)


@register_source(".arrow", records=True)
def open_arrow(path: str, fields: Sequence[str] | None = None) -> ArrowRecords:
    """Map an Arrow file as `datasets` writes it.

    Args:
        path: the file.
        fields: columns to keep; default all.

    Returns:
        Its rows.

    Raises:
        DataError: the library is missing, or the file is none.
    """
    datasets = import_extra("datasets", f"records '{path}'")
    try:
        dataset = datasets.Dataset.from_file(path)
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(
            f"{path}: not a whole Arrow stream ({_reason(error)}). Write it with Dataset.save_to_disk."
        ) from error
    return ArrowRecords(path, dataset, fields)


@register_source("hf://", records=True)
def open_hub(
    path: str, fields: Sequence[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> ArrowRecords:
    """Open a dataset of the Hugging Face hub: `hf://org/name/subset/split`.

    Args:
        path: `org/name`, `org/name/split` or `org/name/subset/split`; the split is `train` if none is given.
        fields: columns to keep; default all.
        cache_dir: where it is kept; default that of the `datasets` library.

    Returns:
        Its rows.

    Raises:
        DataError: the library is missing, the path has other parts, or the hub does not give it.
    """
    datasets = import_extra("datasets", f"records 'hf://{path}'")
    parts = path.strip("/").split("/")
    if not 2 <= len(parts) <= 4:
        raise DataError(
            f"records 'hf://{path}': {len(parts)} part(s). Give hf://org/name, hf://org/name/split or "
            "hf://org/name/subset/split."
        )
    subset = parts[2] if len(parts) == 4 else None
    split = parts[-1] if len(parts) > 2 else "train"
    cache = None if cache_dir is None else str(cache_dir)
    try:
        dataset = datasets.load_dataset("/".join(parts[:2]), subset, split=split, cache_dir=cache)
    except Exception as error:  # network, credentials, names: the library raises many kinds
        raise DataError(
            f"records 'hf://{path}' cannot be read ({_reason(error)}). Check the name, the subset and the split, the "
            "network, and HF_TOKEN for a private dataset."
        ) from error
    return ArrowRecords(f"hf://{path}", dataset, fields)


@register_source(".lmdb", records=True)
class LmdbRecords(Dataset[Any]):
    """Values of an LMDB by the order of their keys; read-only, without locks, opened anew in every process.

    Args:
        path: the database, a file or a folder.
        decode: `json` for objects, `text` or `bytes` for `{"key": ..., "text" or "bytes": ...}`. Pickled values are
            never read: unpickling runs whatever code they hold.

    Raises:
        DataError: the library is missing, the file is none, or `decode` is unknown.
    """

    def __init__(self, path: str, decode: str = "json") -> None:
        self.name = path
        self.decode = decode
        if decode not in ("json", "text", "bytes"):
            raise DataError(f"{path}: decode is '{decode}'. Set it to 'json', 'text' or 'bytes'.")
        with self._begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            self._keys = PackedStrings(tqdm(keys, desc=f"indexing {path}", unit="key", unit_scale=True, disable=None))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        with self._begin() as transaction:
            value = bytes(transaction.get(self._keys[index]))
        if self.decode == "bytes":
            return {"key": self._keys[index], "bytes": value}
        try:
            return parse_json(value) if self.decode == "json" else {"key": self._keys[index], "text": value.decode()}
        except ValueError as error:
            raise BadSampleError(f"{self.where(index)}: {error}. Mend the value, or set decode: bytes.") from error

    def where(self, index: int) -> str:
        """The key of a row, for messages."""
        return f"{self.name}, key {self._keys[index]!r}"

    def _begin(self) -> Any:  # noqa: ANN401 - the library is optional
        return _open_lmdb(os.path.realpath(self.name)).begin(buffers=False)


@register_source("images://", records=True)
class ImageFolder(Dataset[Any]):
    """Images by class: `root/<class>/<anything>.png`; a row is `{"image": uint8 [h, w, 3], "label": int, "path": str}`.

    Args:
        path: the root; each folder in it is a class, numbered by name.

    Raises:
        DataError: there are no images in folders of classes.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        root = Path(path).expanduser().absolute()
        self._root = str(root)
        suffixes = set(_pillow(path).registered_extensions())
        self.classes = sorted(entry.name for entry in _visible(root) if entry.is_dir())
        files = (file for name in self.classes for file in _find_images(self._root, name, suffixes))
        self._files = PackedStrings(tqdm(files, desc=f"listing {path}", unit="file", unit_scale=True, disable=None))
        if len(self._files) == 0:
            raise DataError(f"{path}: no image in a folder of its class. Arrange them as {path}/<class>/<name>.png.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        file = os.fsdecode(self._files[index])
        try:
            with _pillow(self.name).open(Path(self._root, file)) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise BadSampleError(f"{self.where(index)}: not a whole image ({error}). Replace or remove it.") from error
        return {"image": pixels, "label": self.classes.index(file.split("/", 1)[0]), "path": file}

    def where(self, index: int) -> str:
        """The file of a row, for messages."""
        return os.path.join(self._root, os.fsdecode(self._files[index]))


class PackedStrings:
    """Byte strings end to end: a list of a million of them would take ten times the memory.

    Args:
        strings: the strings, taken one at a time.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        content, self._ends = bytearray(), array("q")
        for string in strings:
            content += string
            self._ends.append(len(content))
        self._content = bytes(content)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return self._content[self._ends[index - 1] if index else 0 : self._ends[index]]


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _find_images(root: str, folder: str, suffixes: set[str]) -> Iterator[bytes]:
    """Images below a folder, as paths relative to the root, in the order of their names."""
    for entry in _visible(os.path.join(root, folder)):
        path = f"{folder}/{entry.name}"
        if entry.is_dir():
            yield from _find_images(root, path, suffixes)
        elif os.path.splitext(entry.name)[1].lower() in suffixes:
            yield os.fsencode(path)


def _pillow(name: str) -> Any:  # noqa: ANN401 - the library is optional
    return import_extra("PIL.Image", f"records '{name}'")


@cache
def _open_lmdb(path: str) -> Any:  # noqa: ANN401 - the library is optional
    """Open a database, once a process: the library refuses a second time."""
    lmdb = import_extra("lmdb", f"records '{path}'")
    try:
        environment = lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{path}: not a readable LMDB ({error}). Write it again.") from error
    if hasattr(os, "register_at_fork"):
        # A forked worker must not use its parent's, and may open its own only once that is closed.
        os.register_at_fork(after_in_child=environment.close)
        os.register_at_fork(after_in_child=_open_lmdb.cache_clear)
    return environment


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
