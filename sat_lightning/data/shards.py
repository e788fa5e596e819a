"""Shards of a stream: found by pattern, read from their beginning, and counted."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO, cast

from sat_lightning.data.braces import expand_braces
from sat_lightning.data.decoders import Sample, decode_sample
from sat_lightning.data.remote import (
    CacheDir,
    cached_file,
    describe_failure,
    expand_remote,
    identify,
    is_remote,
    open_binary,
)
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.sources import resolve_files
from sat_lightning.data.tables import parse_json
from sat_lightning.data.webdataset import TarRecords, read_samples
from sat_lightning.errors import DataError

_TAR = (".tar", ".tar.gz", ".tgz")
_JSON = (".jsonl", ".jsonl.gz")


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """List the shards that paths stand for.

    Args:
        shards: a path, URL, glob, folder or pattern with braces, or a list of those.

    Returns:
        Paths and URLs, in the order given; those of one glob or folder sorted.

    Raises:
        DataError: there is none, or one is of an unknown format.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for path in expand_braces(pattern):
            names = expand_remote(path) if is_remote(path) else [str(file) for file in resolve_files(path)]
            found += [name for name in names if len(names) == 1 or not name.endswith(".meta.jsonl")]
    for shard in found:
        if not shard.endswith(_TAR + _JSON):
            known = ", ".join(_TAR + _JSON)
            raise DataError(f"shards: {shard} is of no known format ({known}). Give such shards.")
    if not found:
        raise DataError("shards: the list of shards is empty. Give at least one.")
    return found


def read_shard(shard: str, first: int = 0, cache_dir: CacheDir = None) -> Iterator[Sample]:
    """Read the samples of a shard, undecoded; its length is noted in the cache once all have been read.

    Args:
        shard: a local or remote shard.
        first: number of the sample to begin with.
        cache_dir: where indices and lengths are kept; default `default_cache_dir()`.

    Yields:
        Samples for `decode_raw`.

    Raises:
        DataError: it cannot be read.
        BadSampleError: it is cut off.
    """
    records = _open_by_number(shard, None if cache_dir is None else str(cache_dir))
    if records is not None:
        yield from (records.raw(index) for index in range(first, len(records)))
        return
    num_read = 0
    for sample in _read_in_one_pass(shard):
        num_read += 1
        if num_read > first:
            yield sample
    _note_length(shard, cache_dir, num_read)


def count_samples(shard: str, cache_dir: CacheDir = None) -> int:
    """Count the samples of a shard: from its index, from the cache, or by reading it.

    Args:
        shard: a local or remote shard.
        cache_dir: where indices and lengths are kept; default `default_cache_dir()`.

    Returns:
        Their number.

    Raises:
        DataError: it cannot be read.
        BadSampleError: it is cut off.
    """
    records = _open_by_number(shard, None if cache_dir is None else str(cache_dir))
    return len(records) if records is not None else _note_length(shard, cache_dir, None)


def decode_raw(sample: Sample) -> Sample:
    """Decode what `read_shard` gave.

    Args:
        sample: undecoded.

    Returns:
        The row of a `.jsonl`, or the fields of a tar's sample.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    if "__line__" not in sample:
        return decode_sample(sample)
    try:
        return parse_json(sample["__json__"])
    except ValueError as error:
        raise BadSampleError(f"{describe_raw(sample)}: {error}. Mend or remove the line.") from error


def describe_raw(sample: Sample) -> str:
    """Say where a sample that `read_shard` gave lies.

    Args:
        sample: undecoded.

    Returns:
        The shard, and the line or key.
    """
    place = f"line {sample['__line__']}" if "__line__" in sample else f"key {sample['__key__']}"
    return f"{sample['__shard__']}, {place}"


@lru_cache(maxsize=256)
def _open_by_number(shard: str, cache_dir: str | None) -> TarRecords | None:
    """A local tar, unless it is compressed, cut off or empty; reading it as a stream then says what there is to say."""
    if is_remote(shard) or not shard.endswith(".tar"):
        return None
    try:
        return TarRecords(shard, cache_dir=cache_dir)
    except DataError:
        return None


def _note_length(shard: str, cache_dir: CacheDir, length: int | None) -> int:
    def write(target: BinaryIO) -> None:
        known = sum(1 for _ in _read_in_one_pass(shard)) if length is None else length
        target.write(json.dumps(known).encode())

    with open(cached_file("lengths", identify(shard), cache_dir, write), "rb") as file:
        return int(json.load(file))


def _read_in_one_pass(shard: str) -> Iterator[Sample]:
    return read_samples(shard) if shard.endswith(_TAR) else _read_json_lines(shard)


def _read_json_lines(path: str) -> Iterator[Sample]:
    with open_binary(path) as file:
        lines = cast(BinaryIO, gzip.open(file)) if path.endswith(".gz") else file
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield {"__shard__": path, "__line__": number, "__json__": line}
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise BadSampleError(
                f"{path}: cut off after line {number} ({error}). Copy or write the shard again, or remove it."
            ) from error
        except OSError as error:
            raise describe_failure(path, error) from error
