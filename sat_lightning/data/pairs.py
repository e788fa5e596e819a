"""Rows of two texts: what an encoder reads, and what its decoder is to write.

Legend: b batch, s length of what is read, t of what is written.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sat_lightning.data.collate import PadCollate, Sample
from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.data.transforms import Tokenize

_NAMES = ("input_ids", "target_ids")


class TokenizePair:
    """Turn a row into `input_ids` `[s]`, read by an encoder, and `target_ids` `[t]`, written by a decoder, not shifted.

    Args:
        source: tokenizes what is read.
        target: tokenizes what is written; with `add_end` its end is one of the targets.
    """

    def __init__(self, source: Tokenize, target: Tokenize) -> None:
        self.source, self.target = source, target

    def __call__(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Tokenize a row.

        Args:
            row: with text in every field.

        Returns:
            `input_ids` and `target_ids`, int64.

        Raises:
            BadSampleError: a field is missing or no text, or there are too few or too many tokens.
        """
        return {"input_ids": self.source.whole(row), "target_ids": self.target.whole(row)}

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return f"{self.source.fingerprint()} {self.target.fingerprint()}"


class PairCollate:
    """Pad pairs: `input_ids` `[b, s]`, its `attention_mask` `[b, s]`, true for tokens, and `target_ids` `[b, t]`, -100.

    A pair that is None becomes a row without a target, of which one token is seen: what sees nothing has no softmax.

    Args:
        padding_id: of `input_ids`.
        multiple_of: round both lengths up to a multiple, which keeps the number of shapes small.
    """

    def __init__(self, padding_id: int = 0, multiple_of: int = 1) -> None:
        self._pad = PadCollate(multiple_of=multiple_of, padding_id=padding_id)

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """Collate a batch.

        Args:
            samples: of `TokenizePair`, or None.

        Returns:
            See the class.
        """
        read, written = (
            self._pad(
                [None if pair is None else {"input_ids": pair[name], "target_ids": pair[name]} for pair in samples]
            )
            for name in ("input_ids", "target_ids")
        )
        mask = read["target_ids"] != IGNORED_TARGET
        mask[:, 0] = True
        return {"input_ids": read["input_ids"], "attention_mask": mask, "target_ids": written["target_ids"]}
