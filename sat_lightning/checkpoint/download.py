"""Files from the network: resumed after a break, checked, unpacked without leaving their folder."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sat_lightning import __version__
from sat_lightning.errors import CheckpointError

MAX_ATTEMPTS = 5
"""Attempts in a row that bring no byte."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each later pause is twice the one before."""
MAX_RATIO = 50
"""How many times its own size an archive may unpack to: weights hardly shrink, a bomb does."""
_BLOCK_SIZE = 1 << 20
_TIMEOUT = 60.0


def download(url: str, target: Path, *, size: int | None = None, sha256: str | None = None) -> None:
    """Copy a file of the network to `target`, which appears whole or not at all.

    A break is taken up where it was, in this call or a later one: `<target>.part` stays until the file is whole.

    Args:
        url: http or https.
        target: the file; its folder exists.
        size: bytes it must have, where known.
        sha256: hexadecimal digest it must have, where known.

    Raises:
        CheckpointError: if the server refuses, breaks off again and again, or the file is not the one expected.
    """
    partial, validator = target.with_name(target.name + ".part"), target.with_name(target.name + ".etag")
    attempts = 0
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        try:
            if _fetch(url, partial, validator):
                break
            reason = f"it broke off after {partial.stat().st_size} bytes"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise CheckpointError(
                    f"{url}: the server says {error.code} {error.reason}. Check the address."
                ) from error
            reason = f"the server says {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        after = partial.stat().st_size if partial.is_file() else 0
        attempts = 0 if after > before else attempts + 1
        if attempts >= MAX_ATTEMPTS:
            raise CheckpointError(
                f"{url}: {reason}, {MAX_ATTEMPTS} times in a row. Check the network and call again: {after} bytes are "
                f"kept in {partial}."
            )
        time.sleep(FIRST_PAUSE * 2**attempts)
    try:
        _check(partial, url, size, sha256)
        os.replace(partial, target)
    finally:
        validator.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def _fetch(url: str, partial: Path, validator: Path) -> bool:
    """Append what is left of a file; tells whether it is whole now."""
    start = partial.stat().st_size if partial.is_file() and validator.is_file() else 0
    headers = {"User-Agent": f"sat_lightning/{__version__}", "Accept-Encoding": "identity"}
    if start:
        # Without the same ETag the server must send the whole file: a changed one is never glued to the old half.
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text(encoding="utf-8")}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left, or the file shrank: ask for all of it
            partial.unlink()
            return False
        raise
    with response:
        resumes = response.status == 206
        start = start if resumes else 0
        etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if etag and not etag.startswith("W/"):
            validator.write_text(etag, encoding="utf-8")
        else:
            validator.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with partial.open("r+b" if resumes else "wb") as file:
            file.seek(start)
            _copy(response, file, url, start, total)
            return total is None or file.tell() >= total


def _copy(response: Any, file: Any, url: str, start: int, total: int | None) -> None:
    with tqdm(desc=url, initial=start, total=total, unit="B", unit_scale=True, disable=None) as progress:
        while block := response.read(_BLOCK_SIZE):
            file.write(block)
            progress.update(len(block))


def _check(file: Path, url: str, size: int | None, sha256: str | None) -> None:
    found = file.stat().st_size
    if size is not None and found != size:
        raise CheckpointError(f"{url}: {found} bytes came, {size} are expected. It was deleted; try again or a mirror.")
    if sha256 is not None:
        with file.open("rb") as opened:
            digest = (
                hashlib.file_digest(opened, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest(opened)
            )
        if digest != sha256.lower():
            raise CheckpointError(
                f"{url}: the SHA-256 is {digest}, {sha256.lower()} is expected. It was deleted; do not use this source "
                "before you know why."
            )


def _digest(opened: Any) -> str:
    digest = hashlib.sha256()
    while block := opened.read(_BLOCK_SIZE):
        digest.update(block)
    return digest.hexdigest()


def unzip(archive: Path, folder: Path) -> None:
    """Unpack the model folder of an archive; nothing is written elsewhere, and `folder` appears whole or not at all.

    Args:
        archive: a zip whose files lie at its top, or in one folder there.
        folder: does not exist yet.

    Raises:
        CheckpointError: if it is no zip, is damaged, names a place outside, holds links, or unpacks to too much.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check_members(members, archive)
            for member in members:
                target = temporary / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK_SIZE)
        tops = list(temporary.iterdir())
        os.replace(tops[0] if len(tops) == 1 and tops[0].is_dir() else temporary, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{archive.name} is no whole zip file ({error}). Download it again.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_members(members: list[zipfile.ZipInfo], archive: Path) -> None:
    limit = MAX_RATIO * archive.stat().st_size + (1 << 20)
    for member in members:
        parts = Path(member.filename).parts
        if member.filename.startswith(("/", "\\")) or ".." in parts or "\\" in member.filename or ":" in parts[0]:
            raise CheckpointError(
                f"{archive.name}: '{member.filename}' lies outside of the archive's folder. Not unpacked."
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise CheckpointError(f"{archive.name}: '{member.filename}' is a link. Not unpacked.")
    if not members:
        raise CheckpointError(f"{archive.name} is empty.")
    if (total := sum(member.file_size for member in members)) > limit:
        raise CheckpointError(
            f"{archive.name} has {archive.stat().st_size} bytes and would unpack to {total}, more than {MAX_RATIO} "
            "times that. Not unpacked."
        )
