"""The tokenizer that lies beside a model's weights: a tokenizers file, a vocabulary, or a SentencePiece model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sat_lightning.data.samples import import_extra
from sat_lightning.data.sources import describe_nearest
from sat_lightning.data.tokenizer import END_OF_DOCUMENT_TOKENS, ByteTokenizer, Tokenizer, TokenizersFile
from sat_lightning.errors import DataError, nearest

SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "ice_text.model", "spm.model")
_SPECIAL_TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<mask>",
)


class SentencePieceFile:
    """A SentencePiece model, as SAT's and Hugging Face's folders carry them.

    Args:
        path: the `.model` file.
        end_of_document_token: the piece between documents. Default: the model's own end of sentence.

    Raises:
        DataError: the library is missing, the file is no such model, or it has no such piece.
    """

    def __init__(self, path: str | os.PathLike[str], end_of_document_token: str | None = None) -> None:
        library, content = import_extra("sentencepiece", f"tokenizer '{path}'"), Path(path).read_bytes()
        #: Where a chat template may lie beside it.
        self.folder = Path(path).parent
        self._model = library.SentencePieceProcessor()
        try:
            is_loaded = self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"tokenizer '{path}' is no SentencePiece model ({error}). Copy it again.") from error
        if not is_loaded or not content:
            raise DataError(f"tokenizer '{path}' is no SentencePiece model. Copy it again.")
        self.vocab_size = int(self._model.GetPieceSize())
        self.end_of_document_id = self._find_end_of_document(path, end_of_document_token)
        self.fingerprint = f"{hashlib.sha256(content).hexdigest()}-{self.end_of_document_id}"

    def _find_end_of_document(self, path: str | os.PathLike[str], wanted: str | None) -> int:
        if wanted is None and self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        names = END_OF_DOCUMENT_TOKENS if wanted is None else (wanted,)
        for name in names:
            if self._model.IdToPiece(number := self._model.PieceToId(name)) == name:
                return int(number)
        raise DataError(
            f"tokenizer '{path}' has no end-of-document token: none of {', '.join(names)} is among its "
            f"{self.vocab_size} pieces. Name the one it has in end_of_document_token."
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
        """Encode several texts.

        Args:
            texts: any texts, or UTF-8 bytes.

        Returns:
            The ids of each.
        """
        decoded = [text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in texts]
        return [np.array(ids, dtype=np.int64) for ids in self._model.EncodeAsIds(decoded)]

    def decode(self, ids: ArrayLike) -> str:
        """Turn ids into text.

        Args:
            ids: ids of any integer type.

        Returns:
            The text.
        """
        return str(self._model.DecodeIds(np.asarray(ids).reshape(-1).tolist()))

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, a space where a word begins; none for special ones."""
        return [self._piece_bytes(number) for number in range(self.vocab_size)]

    def _piece_bytes(self, number: int) -> bytes:
        if self._model.IsControl(number) or self._model.IsUnknown(number):
            return b""
        piece = str(self._model.IdToPiece(number))
        if self._model.IsByte(number):  # written as <0x0A>
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()


def get_tokenizer(name: str | os.PathLike[str], end_of_document_token: str | None = None) -> Tokenizer:
    """Load a tokenizer by name, from a file, or from a model's folder.

    Args:
        name: `bytes`; a tokenizers JSON file or a SentencePiece `.model`; a folder that holds `tokenizer.json`, a
            SentencePiece model, `vocab.txt` (BERT's WordPiece), or `vocab.json` with `merges.txt` (GPT-2's byte-level
            BPE); or the name of such a folder in `SAT_HOME`.
        end_of_document_token: the token between documents. Default: found among the usual names.

    Returns:
        The tokenizer.

    Raises:
        DataError: there is none, its library is missing, or it has no such token.
    """
    text = os.fspath(name)
    if text == "bytes":
        return ByteTokenizer()
    path = Path(text).expanduser()
    home = Path(os.environ.get("SAT_HOME") or "~/.sat_models").expanduser()
    if not path.exists() and (home / text).is_dir():
        path = home / text
    if path.is_dir():
        return _from_folder(path, end_of_document_token)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceFile(path, end_of_document_token)
    if path.is_file():
        return TokenizersFile(str(path), end_of_document_token)
    raise DataError(
        f"tokenizer '{text}' is neither 'bytes', nor a file or folder, nor in SAT_HOME ({home})."
        f"{nearest(text, ['bytes'])} As a file: {describe_nearest(path.absolute())} Give 'bytes', a tokenizer.json, a "
        "SentencePiece model, or a model's folder."
    )


def _from_folder(folder: Path, end_of_document_token: str | None) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return TokenizersFile(str(folder), end_of_document_token)
    for name in SENTENCEPIECE_NAMES:
        if (folder / name).is_file():
            return SentencePieceFile(folder / name, end_of_document_token)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return TokenizersFile(str(folder), end_of_document_token, content=_byte_level_bpe(folder))
    if (folder / "vocab.txt").is_file():
        return TokenizersFile(str(folder), end_of_document_token, content=_word_piece(folder))
    names = sorted(path.name for path in folder.iterdir())[:12]
    hint = ""
    if (folder / "model_config.json").is_file():
        kind = json.loads((folder / "model_config.json").read_text(encoding="utf-8")).get("tokenizer_type")
        hint = f" Its model_config.json names '{kind}': fetch that one's files into the folder." if kind else ""
    raise DataError(
        f"tokenizer '{folder}': no tokenizer.json, {', '.join(SENTENCEPIECE_NAMES)}, vocab.txt, or vocab.json with "
        f"merges.txt is there, only {', '.join(names) or 'nothing'}.{hint}"
    )


def _byte_level_bpe(folder: Path) -> bytes:
    library = import_extra("tokenizers", f"tokenizer '{folder}'")
    model = library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return _serialise(tokenizer)


def _word_piece(folder: Path) -> bytes:
    library = import_extra("tokenizers", f"tokenizer '{folder}'")
    tokenizer = library.Tokenizer(library.models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    options = folder / "tokenizer_config.json"
    values = json.loads(options.read_text(encoding="utf-8")) if options.is_file() else {}
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=bool(values.get("do_lower_case", True)))
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece()
    return _serialise(tokenizer)


def _serialise(tokenizer: Any) -> bytes:
    """Mark the special tokens there are, so that text that spells one is not taken apart."""
    tokenizer.add_special_tokens([token for token in _SPECIAL_TOKENS if tokenizer.token_to_id(token) is not None])
    return str(tokenizer.to_str()).encode()
