"""WebDataset shards: what a tar holds, sample by sample, as rows by number or as a stream.

A sample is the run of members that share a name up to its first dot; the rest of the name is the field. A file
`<shard>.meta.jsonl` beside `<shard>.tar` adds the fields of its row with the same key.
"""

import mmap
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from sat_lightning.data.decoders import META_KEYS, Sample, decode_sample
from sat_lightning.data.records import check_index
from sat_lightning.data.remote import cached_file, describe_failure, exists, identify, open_binary
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.sources import register_source
from sat_lightning.data.tables import parse_json, select_fields
from sat_lightning.errors import DataError

_VERSION = 1
_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@register_source(".tar", records=True)
class TarRecords(Dataset[Any]):
    """Samples of a local, uncompressed tar by number, cut out of a memory map and decoded when asked for.

    Args:
        path: the shard.
        fields: those to keep beside `__key__` and `__shard__`; default all.
        decode: turn members into values by their names, or leave them bytes.
        cache_dir: where the index is kept; default `default_cache_dir()`.

    Raises:
        DataError: the tar is truncated, empty or none, or its metadata cannot be read.
    """

    def __init__(
        self,
        path: str,
        fields: Sequence[str] | None = None,
        decode: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.name = path
        self.fields = fields
        self.decode = decode
        self._meta_file = find_metadata(path)
        key = identify(path) + (f"-{identify(self._meta_file)}" if self._meta_file else "") + f"-{_VERSION}.npz"
        self._index_file = cached_file("index", key, cache_dir, lambda file: _write_index(path, self._meta_file, file))
        self._load()
        if len(self) == 0:
            raise DataError(f"{path} is empty: no sample in it. Give a shard with samples, or leave it out.")

    def _load(self) -> None:
        with np.load(self._index_file, allow_pickle=False) as index:
            self._first_members: NDArray[np.int64] = index["first_members"]
            self._places: NDArray[np.int64] = index["places"]  # [num_members, 2]: offset, size
            self._metadata: NDArray[np.int64] = index["metadata"]  # [num_samples, 2]: offset, size
            self._name_ends: NDArray[np.int64] = index["name_ends"]
            self._names = index["names"].tobytes()
        self._text: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._first_members) - 1

    def __getitem__(self, index: int) -> Sample:
        check_index(self, index)
        sample = self.raw(index)
        if self.decode:
            sample = decode_sample(sample)
        if self.fields is None:
            return sample
        return select_fields(sample, ["__key__", "__shard__", *self.fields], lambda: self.where(index))

    def raw(self, index: int) -> Sample:
        """A sample as it lies there.

        Args:
            index: its number.

        Returns:
            `__key__`, `__shard__`, bytes by field, and `__metadata__`, a line of JSON, where there is metadata.
        """
        if self._text is None:
            with open(self.name, "rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        members = range(self._first_members[index], self._first_members[index + 1])
        sample: Sample = {"__key__": self._name(members[0])[0], "__shard__": self.name}
        for member in members:
            offset, size = self._places[member]
            sample[self._name(member)[1]] = self._text[offset : offset + size]
        if self._meta_file is not None:
            offset, size = self._metadata[index]
            with open(self._meta_file, "rb") as file:
                file.seek(offset)
                sample["__metadata__"] = file.read(size)
        return sample

    def where(self, index: int) -> str:
        """The shard and key of a sample, for messages."""
        return f"{self.name}, key {self._name(int(self._first_members[index]))[0]}"

    def _name(self, member: int) -> tuple[str, str]:
        start = self._name_ends[member - 1] if member else 0
        key, _, field = self._names[start : self._name_ends[member]].decode().partition("\0")
        return key, field

    def __getstate__(self) -> dict[str, Any]:
        kept = ("name", "fields", "decode", "_meta_file", "_index_file")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()


def read_samples(path: str) -> Iterator[Sample]:
    """Read a shard from its beginning, local or remote, compressed or not, in one pass.

    Args:
        path: a `.tar`, `.tar.gz` or `.tgz`.

    Yields:
        Samples as `TarRecords.raw` gives them.

    Raises:
        DataError: it cannot be read, is truncated, or a sample has no metadata.
    """
    meta_file = find_metadata(path)
    metadata = {} if meta_file is None else dict(_read_metadata(meta_file))

    def finish(sample: Sample) -> Sample:
        if meta_file is not None:
            # An empty line is an error when it is decoded: one sample, not the run.
            sample["__metadata__"] = metadata.get(sample["__key__"], (0, b""))[1]
        return sample

    with open_binary(path) as file:
        sample: Sample | None = None
        for key, field, _, content in _read_members(path, file, is_stream=True):
            if sample is None or sample["__key__"] != key:
                if sample is not None:
                    yield finish(sample)
                sample = {"__key__": key, "__shard__": path}
            sample[field] = content
        if sample is not None:
            yield finish(sample)


def find_metadata(path: str) -> str | None:
    """Find the `.meta.jsonl` beside a shard.

    Args:
        path: the shard, local or remote.

    Returns:
        Its path; None if there is none.
    """
    suffix = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), "")
    beside = path.removesuffix(suffix) + ".meta.jsonl"
    return beside if exists(beside) else None


class _StrictTarInfo(tarfile.TarInfo):
    """A header; `tarfile` takes whatever is none for the end of the archive, but only a block of zeros is."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, and the mark of the end is missing") from error


def _read_members(path: str, file: BinaryIO, is_stream: bool) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes]]:
    """Key, field and header of every file in a tar, in order; of a stream the content too."""
    key = "none yet"
    try:
        with tarfile.open(fileobj=file, mode="r|*" if is_stream else "r:", tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, field = name.partition(".")
                if member.isfile() and stem and dot:
                    key = f"{folder}/{stem}" if folder else stem
                    content = archive.extractfile(member) if is_stream else None
                    yield key, field, member, b"" if content is None else content.read()
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header of the shard
    except OSError as error:
        raise describe_failure(path, error) from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadSampleError(
            f"{path}: not a whole tar ({error}); the last key read was {key}. Copy or write the shard again, or remove "
            "it."
        ) from error


def _write_index(path: str, meta_file: str | None, target: BinaryIO) -> None:
    """Where every member lies, samples in order: `first_members`, `places`, `names`, and where its metadata lies."""
    first_members, places, metadata = array("q"), array("q"), array("q")
    name_ends, names = array("q"), bytearray()
    rows = {} if meta_file is None else {key: (start, len(line)) for key, (start, line) in _read_metadata(meta_file)}
    previous = None
    progress = tqdm(total=os.path.getsize(path), desc=f"indexing {path}", unit="B", unit_scale=True, disable=None)
    with open(path, "rb") as file, progress:
        for key, field, member, _ in _read_members(path, file, is_stream=False):
            if key != previous:
                first_members.append(len(name_ends))
                metadata.extend(rows.get(key, (0, 0)))
                previous = key
            places.extend((member.offset_data, member.size))
            names += f"{key}\0{field}".encode()
            name_ends.append(len(names))
            progress.update(member.offset_data + member.size - progress.n)
    first_members.append(len(name_ends))
    np.savez(
        target,
        first_members=np.array(first_members),
        places=np.array(places).reshape(-1, 2),
        metadata=np.array(metadata).reshape(-1, 2),
        name_ends=np.array(name_ends),
        names=np.frombuffer(bytes(names), dtype=np.uint8),
    )


def _read_metadata(path: str) -> Iterator[tuple[str, tuple[int, bytes]]]:
    """Key, offset and line of every row of a `.meta.jsonl`."""
    start = 0
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = parse_json(line)
                    key = next(row[name] for name in META_KEYS if name in row)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: {error}. Mend or remove the line.") from error
                except StopIteration:
                    raise DataError(
                        f"{path}, line {number}: no field 'key'; fields there: {', '.join(sorted(row))}. Give every "
                        "row the key of its sample."
                    ) from None
                yield str(key), (start, line)
            start += len(line)
