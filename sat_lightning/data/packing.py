"""Token store -> rows of one length, as a map-style dataset."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sat_lightning.data.store import TokenStore

IGNORED_TARGET = -100
"""The target of a position without one: what `torch.nn.functional.cross_entropy` ignores by default."""

Span = tuple[int, int]


class PackedTokens(Dataset[dict[str, Tensor]]):
    """Rows of `sequence_length` tokens that tile spans of a store: every token but the first is a target exactly once.

    The spans are read as one stream, and row `i` holds its tokens `i * s` to `i * s + s`: the first `s` are the inputs,
    the last `s` the targets, already shifted by one::

        stream      a b c d e f g h i          s = 4
        row 0       a b c d  ->  b c d e
        row 1       e f g h  ->  f g h i

    A negative index gives the padding row (no target counts), not a row from the end.

    Args:
        store: the tokens.
        sequence_length: `s`, tokens per row.
        spans: half-open `(start, stop)` ranges of token positions, ascending; default the whole store.
        keep_incomplete: keep the last row if it is not full, its missing inputs 0 and targets -100 (validation),
            rather than leave it out (training).
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        spans: Sequence[Span] | None = None,
        keep_incomplete: bool = False,
    ) -> None:
        self.store = store
        self.sequence_length = sequence_length
        self.spans = [(0, len(store))] if spans is None else [(start, stop) for start, stop in spans if stop > start]
        self._starts = np.array([start for start, _ in self.spans], dtype=np.int64)
        self._ends = np.cumsum([stop - start for start, stop in self.spans], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self.spans else 0
        num_targets = max(self.num_tokens - 1, 0)
        self._length = -(-num_targets // sequence_length) if keep_incomplete else num_targets // sequence_length
        self.num_targets = num_targets if keep_incomplete else self._length * sequence_length
        self._offsets = np.arange(sequence_length + 1)

    def __len__(self) -> int:
        return self._length

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        """Gather rows in one go.

        Args:
            rows: row indices; a negative one is the padding row.

        Returns:
            `input_ids` and `target_ids`, both int64 `[len(rows), sequence_length]`.

        Raises:
            IndexError: an index is past the last row.
        """
        indices = np.asarray(rows, dtype=np.int64)
        if indices.size and indices.max() >= self._length:
            raise IndexError(f"row {indices.max()} of {self._length} rows")
        positions = indices[:, None] * self.sequence_length + self._offsets
        missing = (indices < 0)[:, None] | (positions >= self.num_tokens)
        positions[missing] = 0
        tokens = self.store.tokens[self._locate(positions)].astype(np.int64)  # [b, s + 1]
        input_ids = np.where(missing[:, :-1], 0, tokens[:, :-1])
        target_ids = np.where(missing[:, 1:], IGNORED_TARGET, tokens[:, 1:])
        return {"input_ids": torch.from_numpy(input_ids), "target_ids": torch.from_numpy(target_ids)}

    def _locate(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions in the stream of spans -> positions in the store."""
        if len(self.spans) == 1:
            return positions + self._starts[0]
        span = np.searchsorted(self._ends, positions, side="right")
        shift = self._starts - np.concatenate(([0], self._ends[:-1]))
        return positions + shift[span]

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.batch([row]).items()}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Tensor]]:
        """What a `DataLoader` calls with the indices of a whole batch; the samples are views of one gathered batch."""
        batch = self.batch(rows)
        return [
            {"input_ids": input_ids, "target_ids": target_ids}
            for input_ids, target_ids in zip(batch["input_ids"], batch["target_ids"], strict=True)
        ]
