"""Files that lie elsewhere: opened as a stream, or copied into the cache once, through `fsspec`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from filelock import FileLock
from tqdm import tqdm

from sat_lightning.data.preparation import default_cache_dir, touch
from sat_lightning.data.samples import import_extra
from sat_lightning.errors import DataError

_BLOCK_SIZE = 8 << 20

CACHE_FOLDERS = ("index", "lengths", "remote", "tokens")
"""The folders of a cache that `cached_file` writes to."""

T = TypeVar("T")
CacheDir = str | os.PathLike[str] | None


def is_remote(path: str) -> bool:
    """Whether a path names a file system by its scheme."""
    return "://" in path


def open_binary(path: str) -> BinaryIO:
    """Open a local or remote file as a stream of bytes.

    Args:
        path: a local path, or a URL that `fsspec` knows.

    Returns:
        The open file; close it.

    Raises:
        DataError: it cannot be read.
    """
    if not is_remote(path):
        try:
            return open(path, "rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. Give an existing, readable file.") from error
    fsspec = import_extra("fsspec", f"remote path '{path}'")
    return cast(BinaryIO, _attempt(path, lambda: fsspec.open(path, "rb").open()))


def expand_remote(pattern: str) -> list[str]:
    """List the remote files that a glob or a name stands for.

    Args:
        pattern: a URL, perhaps with `*`.

    Returns:
        URLs, sorted.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    fsspec = import_extra("fsspec", f"remote path '{pattern}'")
    file_system, path = _attempt(pattern, lambda: fsspec.core.url_to_fs(pattern))
    if "*" not in pattern:
        return [pattern]
    found = _attempt(pattern, lambda: sorted(file_system.glob(path)))
    if not found:
        raise DataError(f"remote path '{pattern}': no file matches. Check the bucket and the pattern.")
    return [file_system.unstrip_protocol(one) for one in found]


def exists(path: str) -> bool:
    """Whether there is such a file.

    Args:
        path: local or remote.

    Returns:
        True if there is.

    Raises:
        DataError: nobody can tell, for instance without a network.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    fsspec = import_extra("fsspec", f"remote path '{path}'")
    file_system, place = _attempt(path, lambda: fsspec.core.url_to_fs(path))
    return bool(_attempt(path, lambda: file_system.exists(place)))


def describe_failure(path: str, error: Exception) -> DataError:
    """Make an error of what a file system raised.

    Args:
        path: what was read.
        error: what it raised.

    Returns:
        The error, to be raised.
    """
    return DataError(
        f"path '{path}' cannot be read ({type(error).__name__}: {error}). Check that it exists, the network and the "
        "credentials of this machine."
    )


def identify(path: str) -> str:
    """Describe what a file holds now: another size, time or etag is another file.

    Args:
        path: local or remote.

    Returns:
        A digest.

    Raises:
        DataError: it cannot be read.
    """
    if is_remote(path):
        fsspec = import_extra("fsspec", f"remote path '{path}'")
        file_system, place = _attempt(path, lambda: fsspec.core.url_to_fs(path))
        info = _attempt(path, lambda: file_system.info(place))
        found = {
            key: str(info[key]) for key in ("size", "mtime", "ETag", "etag", "LastModified", "created") if key in info
        }
        content = f"{path}\0{sorted(found.items())}"
    else:
        stat = _attempt(path, lambda: os.stat(path))
        content = f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def keep_local_copy(path: str, cache_dir: CacheDir = None) -> Path:
    """Copy a remote file into the cache unless it lies there, so that its rows can be read by number.

    Args:
        path: a URL that `fsspec` knows.
        cache_dir: where copies are kept; default `default_cache_dir()`.

    Returns:
        The local file, with the extension of the remote one.

    Raises:
        DataError: it cannot be read.
    """

    def copy(target: BinaryIO) -> None:
        progress = tqdm(desc=f"copying {path}", unit="B", unit_scale=True, disable=None)
        with open_binary(path) as source, progress:
            while block := _attempt(path, lambda: source.read(_BLOCK_SIZE)):
                target.write(block)
                progress.update(len(block))

    return cached_file("remote", f"{identify(path)}-{path.rpartition('/')[2]}", cache_dir, copy)


def cached_file(kind: str, key: str, cache_dir: CacheDir, write: Callable[[BinaryIO], None]) -> Path:
    """Find a file of the cache, and write it first if there is none.

    Args:
        kind: folder of the cache.
        key: name of the file.
        cache_dir: the cache; default `default_cache_dir()`.
        write: writes the content into the open binary file it is handed.

    Returns:
        The file; it was renamed into place when it was whole.
    """
    file = (default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()) / kind / key
    if file.is_file():
        touch(file)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(key + ".lock")):
        if not file.is_file():
            partial = file.with_name(key + ".partial")
            try:
                with partial.open("wb") as target:
                    write(target)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)
    return file


def _attempt(path: str, action: Callable[[], T]) -> T:
    """Do something with a path; whatever its file system raises becomes an error that names it and the cure."""
    try:
        return action()
    except ImportError as error:  # fsspec names the package of the protocol
        raise DataError(f"remote path '{path}': {error}") from error
    except ValueError as error:
        raise DataError(f"remote path '{path}': {error}. Give a URL of a protocol that fsspec knows.") from error
    except Exception as error:  # every file system has errors of its own
        raise describe_failure(path, error) from error
