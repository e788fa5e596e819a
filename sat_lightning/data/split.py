"""Which tokens of a store, or rows of a source, train, which validate, which test."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sat_lightning.data.lengths import tells_lengths, token_lengths
from sat_lightning.data.mixed import Rows, count_tokens, get_rows
from sat_lightning.data.order import derive_key
from sat_lightning.data.records import describe_row
from sat_lightning.data.store import TokenStore
from sat_lightning.errors import DataError

_MAX_NUM_BLOCKS = 16
_MIN_BLOCK_TOKENS = 8192
_MIN_BLOCK_ROWS = 16
_SPLITS = ("validation", "test")

Spans = list[tuple[int, int]]


def split_spans(store: TokenStore, validation: float = 0.0, test: float = 0.0, seed: int = 0) -> dict[str, Spans]:
    """Cut a store into disjoint spans that together cover it.

    The corpus is divided into up to 16 equal stretches, and each gives a block at a random place to validation and to
    test. The tail alone would be whatever sorts last (one author, one package, the newest crawl); spread blocks look
    like the whole. Blocks, not single documents or rows, because they stay a few ranges however large the corpus, and
    because text near a training text in the same file would make the validation loss flatter than it is. Edges move
    forward to the next document where one begins nearby. The sequence length plays no part, so losses at different
    lengths are of the same text.

    Args:
        store: the tokens.
        validation: fraction of the tokens, 0 to below 1.
        test: fraction of the tokens, 0 to below 1.
        seed: chooses the places.

    Returns:
        `train`, `validation` and `test`: ascending half-open ranges of token positions, none empty.

    Raises:
        DataError: the fractions are not fractions, or leave a split that was asked for, or training, without a target.
    """
    fractions = _check_fractions(validation, test)
    edges = _draw_edges(len(store), fractions, seed, _MIN_BLOCK_TOKENS, store)
    spans = _cut(len(store), edges)
    for name, ranges in spans.items():
        num_tokens = sum(stop - start for start, stop in ranges)
        if num_tokens < 2 and fractions.get(name, 1.0) > 0.0:
            raise DataError(
                f"split: {num_tokens} of the {len(store)} tokens of {store.name} would be left for {name} with "
                f"validation={validation} and test={test}, and 2 are the least. Give more text, another fraction, or "
                f"{'a path for ' + name if name in _SPLITS else 'separate files to validate and test on'}."
            )
    return spans


def parse_split(split: str) -> dict[str, float]:
    """Read SAT's notation: how much trains, validates and tests, relative to each other.

    Args:
        split: up to three numbers, for instance `95,5,0`.

    Returns:
        The fractions of `validation` and `test`.

    Raises:
        DataError: it is not that.
    """
    try:
        amounts = [float(part) for part in split.split(",")] + [0.0, 0.0]
    except ValueError:
        amounts = []
    if not 3 <= len(amounts) <= 5 or not amounts[0] > 0 or not all(0 <= amount < math.inf for amount in amounts):
        raise DataError(
            f"split: '{split}' is not up to three numbers for train, validation and test, the first above 0. "
            "Write for instance 95,5,0."
        )
    total = sum(amounts)
    return {"validation": amounts[1] / total, "test": amounts[2] / total}


def split_rows(rows: Rows, validation: float = 0.0, test: float = 0.0, seed: int = 0) -> dict[str, Spans]:
    """Cut a map-style source into disjoint blocks of rows that together cover it, as `split_spans` does with tokens.

    Args:
        rows: the source.
        validation: fraction of the rows.
        test: fraction of the rows.
        seed: chooses the places.

    Returns:
        `train`, `validation` and `test`: ascending half-open ranges of rows, none empty.

    Raises:
        DataError: the fractions are not fractions, or leave nothing for a split that was asked for, or for training.
    """
    fractions = _check_fractions(validation, test)
    spans = _cut(len(rows), _draw_edges(len(rows), fractions, seed, _MIN_BLOCK_ROWS))
    for name, ranges in spans.items():
        if not ranges and fractions.get(name, 1.0) > 0.0:
            source = getattr(rows, "name", type(rows).__name__)
            raise DataError(
                f"split: none of the {len(rows)} rows of {source} would be left for {name} with "
                f"validation={validation} and test={test}. Give more data or another fraction."
            )
    return spans


class RowSpans(Dataset[Any]):
    """The rows of some ranges of a source, without a list of them.

    Args:
        rows: the source.
        spans: half-open ranges of its rows, ascending.
    """

    def __init__(self, rows: Rows, spans: Spans) -> None:
        self.rows = rows
        self.name = getattr(rows, "name", type(rows).__name__)
        self._starts = np.array([start for start, _ in spans], dtype=np.int64)
        self._ends = np.cumsum([stop - start for start, stop in spans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, rows: Sequence[int]) -> list[int]:
        numbers = np.asarray(rows, dtype=np.int64)
        span = np.searchsorted(self._ends, numbers, side="right")
        return (numbers + (self._starts - np.concatenate(([0], self._ends[:-1])))[span]).tolist()

    def num_tokens(self, row: int) -> int:
        """Count the tokens of a row.

        Args:
            row: its number.
        """
        return count_tokens(self.rows, self._locate([row])[0])

    def token_lengths(self) -> NDArray[np.integer[Any]]:
        """Tokens of every row."""
        lengths, starts = token_lengths(self.rows), self._starts
        counts = np.diff(self._ends, prepend=0)
        return np.concatenate([lengths[a : a + n] for a, n in zip(starts.tolist(), counts.tolist(), strict=True)])

    @property
    def knows_lengths(self) -> bool:
        """Whether the tokens of a row can be told without reading it."""
        return tells_lengths(self.rows)

    def where(self, row: int) -> str:
        """The place of a row, for messages.

        Args:
            row: its number.
        """
        return describe_row(self.rows, self._locate([row])[0])

    def __getitem__(self, row: int) -> Any:
        return self.rows[self._locate([row])[0]]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """What a `DataLoader` calls with the rows of a whole batch."""
        return get_rows(self.rows, self._locate(rows))


def _check_fractions(validation: float, test: float) -> dict[str, float]:
    if not all(0.0 <= fraction < 1.0 for fraction in (validation, test)) or validation + test >= 1.0:
        raise DataError(
            f"split: validation={validation} and test={test} must each be at least 0 and together below 1, as "
            "fractions of the tokens (0.05 is 5 %)."
        )
    return {"validation": validation, "test": test}


def _cut(length: int, edges: NDArray[np.int64]) -> dict[str, Spans]:
    spans: dict[str, Spans] = {"train": [], "validation": [], "test": []}
    train_start = 0
    for validation_start, test_start, test_stop in edges.tolist():
        spans["train"].append((train_start, validation_start))
        spans["validation"].append((validation_start, test_start))
        spans["test"].append((test_start, test_stop))
        train_start = test_stop
    spans["train"].append((train_start, length))
    return {name: [(start, stop) for start, stop in ranges if stop > start] for name, ranges in spans.items()}


def _draw_edges(
    num_tokens: int, fractions: dict[str, float], seed: int, min_block: int, store: TokenStore | None = None
) -> NDArray[np.int64]:
    """Where validation starts, test starts and test stops, for every block: [num_blocks, 3], ascending."""
    held_out = sum(fractions.values())
    smallest = min((fraction for fraction in fractions.values() if fraction > 0.0), default=0.0) * num_tokens
    if held_out == 0.0:
        return np.empty((0, 3), dtype=np.int64)
    num_blocks = int(np.clip(smallest // min_block, 1, _MAX_NUM_BLOCKS))
    stretch = num_tokens / num_blocks
    places = np.random.default_rng(derive_key(seed)).random(num_blocks)
    starts = (np.arange(num_blocks) + places * (1.0 - held_out)) * stretch
    lengths = np.array([0.0, fractions["validation"], held_out]) * stretch
    edges = np.rint(starts[:, None] + lengths).astype(np.int64)
    if store is None:
        return edges
    reach = int(smallest / num_blocks / 2)
    # Every edge moves by the same rule and no further than `reach`, so edges cannot overtake each other.
    snapped = [store.next_document(edge, reach) for edge in edges.flatten().tolist()]
    return np.array(snapped, dtype=np.int64).reshape(edges.shape)
