"""The cache of prepared data: what lies there, and how what nobody uses any more is removed from it."""

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from filelock import FileLock, Timeout

from sat_lightning.data.preparation import default_cache_dir
from sat_lightning.data.remote import CACHE_FOLDERS, CacheDir
from sat_lightning.data.store import META_FILE, TokenStore
from sat_lightning.errors import DataError, UsageError

_SECONDS_A_DAY = 86400.0


class CacheEntry(NamedTuple):
    """Something that can be made again: tokens of a corpus, a copy of a remote file, an index, counts."""

    path: Path
    """A folder or file."""
    what: str
    """What it is, for people."""
    num_bytes: int
    """Its size."""
    unused_days: float
    """Days since it was last opened."""


def list_cache(cache_dir: CacheDir = None) -> list[CacheEntry]:
    """List what the cache holds, what was used longest ago first.

    Args:
        cache_dir: the cache; default `default_cache_dir()`.

    Returns:
        Its entries; files that are no part of the cache are left out.
    """
    return sorted(_entries(_folder(cache_dir)), key=lambda entry: -entry.unused_days)


def clean_cache(
    cache_dir: CacheDir = None, unused_days: float = 30.0, max_gigabytes: float = math.inf, dry_run: bool = False
) -> list[CacheEntry]:
    """Remove what was not opened for some days, and then what was opened longest ago until the rest is small enough.

    What is being prepared at the moment stays. Nothing else of a cache is ever removed by itself: a corpus that changed
    is prepared beside its older version.

    Args:
        cache_dir: the cache; default `default_cache_dir()`.
        unused_days: what was not opened for so long goes.
        max_gigabytes: what may stay, in 10**9 bytes.
        dry_run: remove nothing, only say what would be.

    Returns:
        What was removed.

    Raises:
        DataError: a limit is negative or no number.
    """
    if not (unused_days >= 0 and max_gigabytes >= 0):
        raise DataError(f"cache: unused_days is {unused_days} and max_gigabytes {max_gigabytes}. Give 0 or more.")
    entries = list_cache(cache_dir)
    size, removed = sum(entry.num_bytes for entry in entries), []
    for entry in entries:
        if entry.unused_days < unused_days and size <= max_gigabytes * 1e9:
            continue
        if dry_run or _remove(entry.path):
            removed.append(entry)
            size -= entry.num_bytes
    return removed


def run_clean(verb: str, words: list[str]) -> None:
    """Run `clean_cache` as a command.

    Args:
        verb: its name.
        words: options.

    Raises:
        UsageError: an option is unknown.
    """
    parser = _Parser(prog=verb, description=str(clean_cache.__doc__).partition("\n")[0])
    parser.add_argument("--cache_dir", help="the cache; default that of SATDataModule")
    parser.add_argument("--unused_days", type=float, default=30.0, help="what was not opened for so long goes (30)")
    parser.add_argument("--max_gigabytes", type=float, default=math.inf, help="what may stay (unlimited)")
    parser.add_argument("--dry_run", action="store_true", help="remove nothing, only say what would be")
    chosen = parser.parse_args(words)
    removed = clean_cache(chosen.cache_dir, chosen.unused_days, chosen.max_gigabytes, chosen.dry_run)
    for entry in removed:
        sys.stdout.write(f"{entry.num_bytes / 1e6:12.1f} MB  {entry.unused_days:6.1f} days  {entry.what}\n")
    done = "would be removed" if chosen.dry_run else "removed"
    size = sum(entry.num_bytes for entry in removed)
    sys.stdout.write(f"{len(removed)} entries, {size / 1e6:.1f} MB {done} from {_folder(chosen.cache_dir)}\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Known are --cache_dir, --unused_days, --max_gigabytes and --dry_run.")


def _folder(cache_dir: CacheDir) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()


def _entries(cache: Path) -> Iterator[CacheEntry]:
    now = time.time()

    def describe(path: Path, what: str, last_used: float, num_bytes: int) -> CacheEntry:
        return CacheEntry(path, what, num_bytes, max(0.0, (now - last_used) / _SECONDS_A_DAY))

    for file in sorted(cache.glob(f"*/{META_FILE}")):
        folder = file.parent
        try:
            what = f"tokens of {TokenStore(folder).name}"
        except DataError:
            what = f"damaged tokens in {folder.name}"
        yield describe(folder, what, file.stat().st_mtime, sum(one.stat().st_size for one in folder.iterdir()))
    for kind in CACHE_FOLDERS:
        for file in sorted((cache / kind).glob("*")):
            if file.is_file() and file.suffix not in (".lock", ".partial"):
                stat = file.stat()
                yield describe(file, f"{kind}/{file.name}", stat.st_mtime, stat.st_size)


def _remove(path: Path) -> bool:
    """Remove an entry unless somebody is preparing or opening it; by one rename, so that no half of it is ever seen."""
    try:
        with FileLock(path.with_name(path.name + ".lock"), timeout=0):
            doomed = path.with_name(f"{path.name}.removed-{os.getpid()}")
            os.replace(path, doomed)
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
    except (Timeout, FileNotFoundError):
        return False
    return True
