"""Documents -> token store: built once, under a lock, in a stream."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from sat_lightning.data.sources import Document, Source, Unfinished
from sat_lightning.data.store import FORMAT_VERSION, META_FILE, TOKENS_FILE, StoreMeta, TokenStore
from sat_lightning.data.tokenizer import Tokenizer, to_bytes
from sat_lightning.errors import DataError

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096
_SCAN_LENGTH = 1 << 22


def default_cache_dir() -> Path:
    """Find where prepared tokens are kept unless `cache_dir` says so.

    Returns:
        `$SAT_HOME/data`, else `sat_lightning/data` in `$XDG_CACHE_HOME`, `%LOCALAPPDATA%` or `~/.cache`.
    """
    if home := os.environ.get("SAT_HOME"):
        return Path(home).expanduser() / "data"
    cache = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sat_lightning" / "data"


def touch(file: Path) -> None:
    """Note that a file of the cache is used, by its time, so that what nobody uses can be found.

    Args:
        file: what is opened; a cache that may only be read keeps no such note.
    """
    with suppress(OSError):
        os.utime(file)


def prepare_store(source: Source, tokenizer: Tokenizer, cache_dir: str | os.PathLike[str] | None = None) -> TokenStore:
    """Open the token store of a source, and build it first if there is none.

    The store lies in a folder of the cache named by the fingerprints of source and tokenizer: another text or tokenizer
    is another store. It is built under a lock and under another name, so processes may race for it and a killed one
    leaves nothing that looks complete. The memory used does not grow with the corpus.

    Args:
        source: the documents.
        tokenizer: turns them into ids; token files need none and ignore it.
        cache_dir: where stores are kept, made if missing; default `default_cache_dir()`.

    Returns:
        The store.

    Raises:
        DataError: the source holds no text, or ids that are not ids.
    """
    source_fingerprint = source.fingerprint()
    key = hashlib.sha256(f"{FORMAT_VERSION}\n{source_fingerprint}\n{tokenizer.fingerprint}".encode()).hexdigest()[:24]
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    folder = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if folder.exists():
            try:
                store = TokenStore(folder)
                touch(folder / META_FILE)
                return store
            except DataError as error:
                warnings.warn(f"{error} It is prepared again now.", stacklevel=2)
                shutil.rmtree(folder)
        partial = cache / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed preparation: the lock says nobody is at it
        partial.mkdir()
        try:
            meta = _write_tokens(source, tokenizer, partial / TOKENS_FILE)
            replace(meta, source_fingerprint=source_fingerprint).write(partial)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return TokenStore(folder)


def _write_tokens(source: Source, tokenizer: Tokenizer, path: Path) -> StoreMeta:
    documents = iter(source)
    first = next(documents, None)
    if isinstance(first, np.ndarray):
        meta = _write_ready_tokens([first, *_only_arrays(documents, source)], source, path)
    else:
        with path.open("wb") as file:
            writer = _TextWriter(source, tokenizer, file)
            if first is not None:
                writer.add(first)
            for document in documents:
                if isinstance(document, np.ndarray):
                    raise DataError(_describe_mixture(source))
                writer.add(document)
            meta = writer.finish()
    if meta.num_tokens == 0:
        raise DataError(f"data path '{source.name}' is empty: 0 tokens in it. Give a path with at least one document.")
    return meta


def _only_arrays(documents: Iterator[Document], source: Source) -> Iterator[NDArray[np.integer[Any]]]:
    for document in documents:
        if not isinstance(document, np.ndarray):
            raise DataError(_describe_mixture(source))
        yield document


def _describe_mixture(source: Source) -> str:
    return f"{source.name}: token files (.bin, .npy) and text in one source. Give them as two, or tokenize both alike."


class _TextWriter:
    """Tokenizes documents in batches and appends them to a file."""

    def __init__(self, source: Source, tokenizer: Tokenizer, file: BinaryIO) -> None:
        self.tokenizer = tokenizer
        self.file = file
        self.dtype = np.min_scalar_type(max(tokenizer.vocab_size - 1, tokenizer.end_of_document_id))
        self.end = np.array([tokenizer.end_of_document_id], dtype=self.dtype)
        self.meta = StoreMeta(
            source=source.name,
            source_fingerprint="",
            tokenizer_fingerprint=tokenizer.fingerprint,
            dtype=self.dtype.name,
            num_tokens=0,
            max_token_id=0,
            end_of_document_id=tokenizer.end_of_document_id,
        )
        self.num_documents = self.num_tokens = self.max_token_id = self.text_bytes = 0
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.is_unfinished = False
        self.progress = tqdm(
            total=source.num_bytes or None, desc=f"tokenizing {source.name}", unit="B", unit_scale=True, disable=None
        )

    def add(self, document: str | bytes) -> None:
        """Take one document, or an unfinished piece of one."""
        text = to_bytes(document)
        if not text and not self.is_unfinished:
            return
        self.is_unfinished = isinstance(text, Unfinished)
        self.pending.append(text)
        self.pending_bytes += len(text)
        if self.pending_bytes >= _BATCH_BYTES or len(self.pending) >= _BATCH_DOCUMENTS:
            self._flush()

    def finish(self) -> StoreMeta:
        """Write what is pending and count up."""
        self._flush()
        self.progress.close()
        return replace(
            self.meta,
            num_tokens=self.num_tokens,
            max_token_id=self.max_token_id,
            num_documents=self.num_documents,
            text_bytes=self.text_bytes,
        )

    def _flush(self) -> None:
        if not self.pending:
            return
        pieces: list[NDArray[np.integer[Any]]] = []
        for text, ids in zip(self.pending, self.tokenizer.encode_batch(self.pending), strict=True):
            pieces.append(ids.astype(self.dtype))
            if not isinstance(text, Unfinished):
                pieces.append(self.end)
                self.num_documents += 1
        tokens = np.concatenate(pieces)
        self.file.write(tokens.tobytes())
        self.num_tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, int(tokens.max(initial=0)))
        self.text_bytes += self.pending_bytes
        self.progress.update(self.pending_bytes)
        self.pending, self.pending_bytes = [], 0


def _write_ready_tokens(arrays: list[NDArray[np.integer[Any]]], source: Source, path: Path) -> StoreMeta:
    """Check ready token ids, and copy them unless they are one memory map, which can stay where it is."""
    dtype = np.result_type(*(array.dtype for array in arrays))
    only = arrays[0] if len(arrays) == 1 and isinstance(arrays[0], np.memmap) else None
    num_tokens, smallest, largest = 0, 0, 0
    with path.open("wb") as file:
        for array in arrays:
            for start in range(0, len(array), _SCAN_LENGTH):
                tokens = np.asarray(array[start : start + _SCAN_LENGTH])
                num_tokens += len(tokens)
                smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
                if only is None:
                    file.write(tokens.astype(dtype).tobytes())
    if smallest < 0:
        raise DataError(f"{source.name}: token id {smallest} is negative. Write the file again with ids of 0 and more.")
    return StoreMeta(
        source=source.name,
        source_fingerprint="",
        tokenizer_fingerprint="",
        dtype=dtype.str if only is not None else dtype.name,
        num_tokens=num_tokens,
        max_token_id=largest,
        tokens_file=path.name if only is None else str(Path(str(only.filename)).absolute()),
        offset=0 if only is None else int(only.offset),
    )
