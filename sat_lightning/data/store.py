"""Token ids on disk: what a prepared store holds, opened as a memory map."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat_lightning.errors import DataError

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
META_FILE = "meta.json"


@dataclass(frozen=True)
class StoreMeta:
    """What `meta.json` says about a token store."""

    source: str
    """Where the tokens come from, in words."""
    source_fingerprint: str
    """Digest of names, sizes and modification times of the source."""
    tokenizer_fingerprint: str
    """Identifies the tokenizer."""
    dtype: str
    """Element type of the token file."""
    num_tokens: int
    """Token ids in the store, end-of-document ids included."""
    max_token_id: int
    """The largest id that occurs."""
    num_documents: int | None = None
    """Documents in the store; None for token files, which do not say."""
    text_bytes: int | None = None
    """UTF-8 bytes of the text; None for token files."""
    end_of_document_id: int | None = None
    """The id between documents; None for token files."""
    tokens_file: str = TOKENS_FILE
    """Where the ids lie: a file of the store, or the absolute path of the token file given."""
    offset: int = 0
    """Bytes before the first id in that file."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    def write(self, folder: Path) -> None:
        """Write `meta.json`.

        Args:
            folder: of the store.
        """
        (folder / META_FILE).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


class TokenStore:
    """Token ids of a corpus in one memory map; documents follow each other, each closed by an end-of-document id.

    Args:
        folder: what `prepare_store` made.

    Raises:
        DataError: the folder holds no complete store of this version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        self.name = self.meta.source
        self._tokens: NDArray[np.integer[Any]] | None = None
        file = folder / self.meta.tokens_file
        expected = self.meta.offset + self.meta.num_tokens * np.dtype(self.meta.dtype).itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise DataError(
                f"token store {folder} is damaged: {file.name} has {size} bytes, and {self.meta.num_tokens} tokens of "
                f"{self.meta.dtype} need {expected}. Delete the folder to have it prepared again."
            )

    def __len__(self) -> int:
        return self.meta.num_tokens

    @property
    def tokens(self) -> NDArray[np.integer[Any]]:
        """All ids, unsigned, `[num_tokens]`: a read-only memory map, opened at first use."""
        if self._tokens is None:
            file, meta = self.folder / self.meta.tokens_file, self.meta
            mapped = np.memmap(file, dtype=meta.dtype, mode="r", offset=meta.offset, shape=(meta.num_tokens,))
            self._tokens = mapped.view(np.ndarray)  # indexing the subclass costs more
        return self._tokens

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, end-of-document ids counted as tokens; None for token files."""
        return None if self.meta.text_bytes is None else self.meta.text_bytes / self.meta.num_tokens

    def next_document(self, position: int, reach: int) -> int:
        """The start of the first document at or after a position, or the position if none starts within reach.

        Args:
            position: a token position, 0 to `len(store)`.
            reach: how many tokens further to look.

        Returns:
            A token position.
        """
        if self.meta.end_of_document_id is None or position <= 0:
            return position
        window = self.tokens[position - 1 : position + reach]
        ends = np.flatnonzero(window == self.meta.end_of_document_id)
        return position + int(ends[0]) if ends.size else position

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole corpus to a worker.
        return {**self.__dict__, "_tokens": None}


def _read_meta(folder: Path) -> StoreMeta:
    file = folder / META_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"token store {folder} has format version {values['format_version']}, and this is version "
                f"{FORMAT_VERSION}. Delete the folder to have it prepared again."
            )
        return StoreMeta(**values)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{folder} is no complete token store: {META_FILE} cannot be read ({error}). Delete the folder to have it "
            "prepared again."
        ) from error
