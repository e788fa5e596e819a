"""Texts -> the ids a classifier reads: as its tokenizer file says, for instance `[CLS] text [SEP] text [SEP]`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.tokenizer import Tokenizer, TokenizersFile
from sat_lightning.errors import DataError

Ids = NDArray[np.int64]


class Frame:
    """Put texts between special tokens, and cut them to a length.

    A `tokenizers` file whose post-processor adds tokens decides: what that gives is what its model was trained on.
    Else the end-of-document id (`[CLS]` in front and `[SEP]` where the vocabulary has them) stands before, between and
    after the texts, so that there is a first and a last token to read a whole text from.

    Args:
        tokenizer: turns text into ids.
        max_length: ids at most, special ones counted.
        truncate: cut the longest text shorter instead of refusing a row.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, truncate: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        library = getattr(tokenizer, "_tokenizer", None) if isinstance(tokenizer, TokenizersFile) else None
        self._library: Any = library if library is not None and library.num_special_tokens_to_add(False) else None
        self._start = self._separator = tokenizer.end_of_document_id
        if library is not None:
            self._start, self._separator = (
                tokenizer.end_of_document_id if found is None else int(found)
                for found in map(library.token_to_id, ("[CLS]", "[SEP]"))
            )
        if self._library is not None and len(around := self._library.encode("").ids) == 2:
            self._start, self._separator = around

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Frame the texts of a row.

        Args:
            texts: one or more; a tokenizer file with special tokens of its own takes two at most.

        Returns:
            The ids, and of each the number of its text, 0 or 1.

        Raises:
            BadSampleError: the row is too long.
            DataError: there are too many texts.
        """
        if self._library is None:
            return self.join([[piece] for piece in self.tokenizer.encode_batch(texts)])
        if len(texts) > 2:
            raise DataError(f"samples.fields are {len(texts)}, and this tokenizer's file frames two at most. Name two.")
        pieces = [self._library.encode(text, add_special_tokens=False) for text in texts]
        num_added = self._library.num_special_tokens_to_add(len(texts) == 2)
        for piece, length in zip(pieces, self._lengths([len(p.ids) for p in pieces], num_added), strict=True):
            piece.truncate(length)
        framed = self._library.post_process(*pieces, add_special_tokens=True)
        return np.array(framed.ids, dtype=np.int64), np.array(framed.type_ids, dtype=np.int64)

    def join(self, parts: Sequence[Sequence[Ids]]) -> tuple[Ids, Ids]:
        """Frame texts that are tokenized already, piece by piece.

        Args:
            parts: the pieces of each text.

        Returns:
            The ids, and of each the number of its text, 0 or 1.
        """
        joined = [np.concatenate([*pieces, np.empty(0, dtype=np.int64)]) for pieces in parts]
        lengths = self._lengths([len(ids) for ids in joined], len(joined) + 1)
        ids, types = [np.array([self._start])], [np.array([0])]
        for number, (piece, length) in enumerate(zip(joined, lengths, strict=True)):
            ids += [piece[:length], np.array([self._separator])]
            types.append(np.full(length + 1, min(number, 1)))
        return np.concatenate(ids), np.concatenate(types)

    @property
    def tells_texts_apart(self) -> bool:
        """Whether models of this tokenizer may want to know which text a token is of."""
        return self._start != self.tokenizer.end_of_document_id or self._library is not None

    def fingerprint(self) -> str:
        """What identifies the lengths of what is framed."""
        return repr((self.tokenizer.fingerprint, self.max_length, self.truncate))

    def _lengths(self, lengths: list[int], num_added: int) -> list[int]:
        """Shorten the longest until all fit."""
        excess = sum(lengths) + num_added - self.max_length
        if excess > 0 and not self.truncate:
            raise BadSampleError(
                f"{sum(lengths) + num_added} tokens are more than sequence_length={self.max_length}. Set samples."
                "too_long: truncate, raise sequence_length, or shorten the row."
            )
        kept = list(lengths)
        for _ in range(max(excess, 0)):
            kept[int(np.argmax(kept))] -= 1
        return [max(length, 0) for length in kept]
