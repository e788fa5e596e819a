"""Text <-> token ids: bytes, or a file of the `tokenizers` library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sat_lightning.data.sources import describe_nearest
from sat_lightning.errors import DataError, nearest

END_OF_DOCUMENT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
    "<|end|>",
    "[SEP]",
)
"""What tokenizers usually call the token between documents, in the order tried."""


class Tokenizer(Protocol):
    """What the data layer needs of a tokenizer."""

    vocab_size: int
    end_of_document_id: int
    fingerprint: str
    """Identifies the mapping; prepared tokens are kept apart by it."""

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """Token ids of a text, without any added special token."""

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64]]:
        """Token ids of several texts."""

    def decode(self, ids: ArrayLike) -> str:
        """Text of token ids."""


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: 256 ids, and 256 for the end of a document."""

    vocab_size = 257
    end_of_document_id = 256
    fingerprint = "bytes-257"

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """Turn text, or bytes as they are, into ids.

        Args:
            text: any text; lone surrogates are encoded too.

        Returns:
            One id per byte.
        """
        return np.frombuffer(to_bytes(text), dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64]]:
        """Encode several texts.

        Args:
            texts: any texts.

        Returns:
            The ids of each.
        """
        return [self.encode(text) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        """Turn ids into text.

        Args:
            ids: ids of any integer type; ids above 255 are left out.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        values = np.asarray(ids).reshape(-1)
        return values[values < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token; none for the end of a document."""
        return [bytes([value]) for value in range(256)] + [b""]


class TokenizersFile:
    """A tokenizer in the JSON format of the `tokenizers` library.

    Args:
        path: the JSON file, or a folder that holds `tokenizer.json`.
        end_of_document_token: the token between documents; default the first usual name the vocabulary has.
        content: of such a file, which need not exist then.

    Raises:
        DataError: the library or the file is missing, the file is no tokenizer, or no such token is found.
    """

    def __init__(self, path: str, end_of_document_token: str | None = None, content: bytes | None = None) -> None:
        file = Path(path).expanduser().absolute()
        file = file / "tokenizer.json" if file.is_dir() else file
        if content is None and not file.is_file():
            raise DataError(
                f"tokenizer '{path}' is neither 'bytes' nor a tokenizers JSON file.{nearest(path, ['bytes'])} "
                f"As a file: {describe_nearest(file)} Give 'bytes' or the path of a tokenizer.json."
            )
        #: Where a chat template may lie beside it.
        self.folder = file.parent
        content = file.read_bytes() if content is None else content
        self._tokenizer = _load_library_tokenizer(path, content)
        # The largest id, not the number of entries: a vocabulary may have holes.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_of_document_id = self._find_end_of_document(path, end_of_document_token)
        self.fingerprint = f"{hashlib.sha256(content).hexdigest()}-{self.end_of_document_id}"

    def _find_end_of_document(self, path: str, wanted: str | None) -> int:
        names = END_OF_DOCUMENT_TOKENS if wanted is None else (wanted,)
        for name in names:
            if (token_id := self._tokenizer.token_to_id(name)) is not None:
                return int(token_id)
        raise DataError(
            f"tokenizer '{path}' has no end-of-document token: none of {', '.join(names)} is among its "
            f"{self.vocab_size} tokens. Name the one it has in end_of_document_token, or add one to the file."
        )

    def encode(self, text: str | bytes) -> NDArray[np.int64]:
        """Turn text into ids, without special tokens added.

        Args:
            text: any text, or UTF-8 bytes.

        Returns:
            The ids.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64]]:
        """Encode several texts, on all cores.

        Args:
            texts: any texts, or UTF-8 bytes.

        Returns:
            The ids of each.
        """
        decoded = [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in texts]
        encodings = self._tokenizer.encode_batch(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: ArrayLike) -> str:
        """Turn ids into text.

        Args:
            ids: ids of any integer type.

        Returns:
            The text, without special tokens.
        """
        return str(self._tokenizer.decode(np.asarray(ids).reshape(-1).tolist()))

    def to_json(self) -> str:
        """The tokenizer in the JSON format of the `tokenizers` library."""
        return str(self._tokenizer.to_str())


def load_tokenizer(name: str, end_of_document_token: str | None = None) -> Tokenizer:
    """Load a tokenizer by name.

    Args:
        name: `bytes`, or the path of a `tokenizers` JSON file, or what else `get_tokenizer` reads: a
            SentencePiece model, a model's folder.
        end_of_document_token: the token between documents of such a file; default found among the usual names.

    Returns:
        The tokenizer.

    Raises:
        DataError: see `TokenizersFile`.
    """
    if name == "bytes" or not Path(name).expanduser().exists():
        return ByteTokenizer() if name == "bytes" else TokenizersFile(name, end_of_document_token)
    from sat_lightning.data.model_tokenizers import get_tokenizer  # it builds upon this module

    return get_tokenizer(name, end_of_document_token)


def to_bytes(text: str | bytes) -> bytes:
    """The UTF-8 bytes of a text.

    Args:
        text: text, or its bytes.

    Returns:
        Its bytes; the same object if it was bytes.
    """
    # A lone surrogate (from JSON escapes) has no UTF-8 form; it must not stop a corpus of a million documents.
    return text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text


def _load_library_tokenizer(path: str, content: bytes) -> Any:  # noqa: ANN401 - the library is optional
    try:
        from tokenizers import Tokenizer as LibraryTokenizer
    except ImportError as error:
        raise DataError(
            f"tokenizer '{path}' needs the tokenizers library, which is not installed. Run: "
            'pip install "sat_lightning[data]"'
        ) from error
    try:
        tokenizer = LibraryTokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"tokenizer '{path}' is not a tokenizers JSON file ({error}). Give its tokenizer.json."
        ) from error
    tokenizer.no_truncation()  # a file may carry both from fine-tuning; either would corrupt a corpus
    tokenizer.no_padding()
    return tokenizer
