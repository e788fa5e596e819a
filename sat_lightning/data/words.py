"""Where words begin, by the tokens alone: what whole words are hidden by.

Legend: b batch, s length, v vocabulary.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.errors import DataError

_BLANKS = str.maketrans("Ġ▁Ċĉ", "    ")  # how byte-level vocabularies and SentencePiece write a space and a line's end


class WordEdges:
    """Tell words apart: a token goes on with a word if it begins, and the token before it ends, inside of one.

    Args:
        tokenizer: with `to_json()` (the format of the `tokenizers` library) or `token_bytes()`.
        vocab_size: of the model; ids beyond the tokenizer's are words of their own.

    Raises:
        DataError: the tokenizer does not say what its tokens are.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:  # noqa: ANN401
        texts = [""] * vocab_size
        for number, text in _texts(tokenizer):
            if number < vocab_size:
                texts[number] = text
        self.begins_inside = torch.tensor([text[:1].isalnum() for text in texts])  # [v]
        self.ends_inside = torch.tensor([text[-1:].isalnum() for text in texts])  # [v]

    def number(self, input_ids: Tensor) -> Tensor:
        """Number the words of each row.

        Args:
            input_ids: `[b, s]`; the tables follow it to its device.

        Returns:
            int64 `[b, s]`, from 0 in each row.
        """
        if self.begins_inside.device != input_ids.device:
            self.begins_inside = self.begins_inside.to(input_ids.device)
            self.ends_inside = self.ends_inside.to(input_ids.device)
        goes_on = self.begins_inside[input_ids[:, 1:]] & self.ends_inside[input_ids[:, :-1]]
        return F.pad(~goes_on, (1, 0), value=True).cumsum(1) - 1


def _texts(tokenizer: Any) -> list[tuple[int, str]]:  # noqa: ANN401
    """Return ids with the text of their tokens, blanks as spaces; special ones are left out."""
    if hasattr(tokenizer, "to_json"):
        return _texts_of_file(json.loads(tokenizer.to_json()))
    if hasattr(tokenizer, "token_bytes"):
        # Bytes beyond ASCII are parts of letters, mostly.
        pieces = enumerate(tokenizer.token_bytes())
        return [(number, "".join("a" if byte > 127 else chr(byte) for byte in piece)) for number, piece in pieces]
    raise DataError(
        f"{type(tokenizer).__name__} does not say what its tokens are: give it to_json() or token_bytes(), or batches "
        "word_ids."
    )


def _texts_of_file(values: dict[str, Any]) -> list[tuple[int, str]]:
    model = values["model"]
    vocabulary = model["vocab"]
    named = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((one[0], place) for place, one in enumerate(vocabulary))
    )
    special = {token["id"] for token in values.get("added_tokens") or [] if token.get("special")}
    inner = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
    found = []
    for piece, number in named:
        text = piece.translate(_BLANKS)
        if inner is not None:  # here it is the pieces inside of a word that are marked
            text = piece.removeprefix(inner) if piece.startswith(inner) else f" {piece}"
        found.append((number, "" if number in special else text))
    return found
