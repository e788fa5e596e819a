"""Sources side by side as one map-style dataset, and what else a mixture needs to know of them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sat_lightning.data.lengths import token_lengths
from sat_lightning.data.mixture import Mixture
from sat_lightning.data.order import PADDING_ROW
from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.errors import DataError

_SAMPLED_LENGTHS = 4096


@runtime_checkable
class Rows(Protocol):
    """Samples that are looked up by number; `__getitems__`, `name` and `num_tokens(index)` are welcome too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MixedRows(Dataset[Any]):
    """Map-style sources, their rows numbered through: those of the second follow those of the first.

    `PADDING_ROW` is the first row with every target ignored.

    Args:
        sources: the sources.
    """

    def __init__(self, sources: Sequence[Rows]) -> None:
        self.sources = list(sources)
        self._starts = np.concatenate(([0], np.cumsum([len(source) for source in sources], dtype=np.int64)))
        self._lengths: list[NDArray[np.integer[Any]]] | None = None

    def lengths_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tell the tokens of rows; the first time, every source tells or counts those of all its rows.

        Args:
            ids: numbers of rows.

        Returns:
            Tokens of each.
        """
        if self._lengths is None:
            self._lengths = [token_lengths(source) for source in self.sources]
        sources, rows = self.locate(ids)
        found = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(sources).tolist():
            places = np.flatnonzero(sources == number)
            found[places] = self._lengths[number][rows[places]]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None}  # a worker needs none

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, ids: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the source of each id, and the row in it.

        Args:
            ids: numbers of rows.

        Returns:
            Sources and rows; the padding row stays what it is, in the first source.
        """
        numbers = np.asarray(ids, dtype=np.int64)
        sources = np.maximum(np.searchsorted(self._starts, numbers, side="right") - 1, 0)
        return sources, numbers - self._starts[sources]

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]

    def __getitems__(self, ids: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """What a `DataLoader` calls with the ids of a whole batch; each source is asked once."""
        sources, rows = self.locate(ids)
        samples: list[Any] = [None] * len(rows)
        for number in np.unique(sources).tolist():
            places = np.flatnonzero(sources == number).tolist()
            found = get_rows(self.sources[number], rows[places].tolist())
            for place, sample in zip(places, found, strict=True):
                samples[place] = sample
        return samples


class OrderedRows(Dataset[Any]):
    """The first epoch of a mixture as a dataset, its samples in the order of training.

    Args:
        rows: of all sources.
        mixture: the order.
        length: how many samples, if epochs never end.
    """

    def __init__(self, rows: MixedRows, mixture: Mixture, length: int) -> None:
        self.rows = rows
        self.mixture = mixture
        self.length = mixture.epoch_size or length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        """What a `DataLoader` calls with the positions of a whole batch."""
        return self.rows.__getitems__(self.mixture.ids(positions))


def get_rows(source: Rows, rows: list[int]) -> list[Any]:
    """Look up rows, all at once if the source can.

    Args:
        source: map-style.
        rows: their numbers; `PADDING_ROW` is the first row with every target ignored.

    Returns:
        The samples.
    """
    real = [max(row, 0) for row in rows]
    found = source.__getitems__(real) if hasattr(source, "__getitems__") else [source[row] for row in real]
    return [_ignore_targets(sample) if row == PADDING_ROW else sample for row, sample in zip(rows, found, strict=True)]


def _ignore_targets(sample: Any) -> Any:
    if sample is None:  # a bad sample that was skipped
        return None
    targets = sample.get("target_ids") if isinstance(sample, dict) else None
    if not isinstance(targets, (Tensor, np.ndarray)):
        raise DataError(
            f"data: a {type(sample).__name__} without target_ids cannot be padded, and the rows do not divide "
            "by the ranks. Return a dict with an array target_ids, or evaluate on one device."
        )
    ignored = targets.clone() if isinstance(targets, Tensor) else targets.copy()
    ignored[...] = IGNORED_TARGET
    return {**sample, "target_ids": ignored}


def count_tokens(source: Rows, row: int) -> int:
    """Return the tokens of one row.

    Args:
        source: says so itself by `num_tokens(row)`, or by its `sequence_length` if all rows are alike.
        row: its number.

    Raises:
        DataError: the source does not say.
    """
    num_tokens = getattr(source, "num_tokens", None)
    if callable(num_tokens):
        return int(num_tokens(row))
    if hasattr(source, "sequence_length"):
        return int(source.sequence_length)
    raise DataError(
        f"mixture: {getattr(source, 'name', type(source).__name__)} does not tell how many tokens a row has. Give it "
        "num_tokens(index), or use weight or probability instead of tokens."
    )


def mean_tokens(source: Rows) -> float:
    """Return the tokens per row, exactly: every row is counted, unless all are alike.

    Args:
        source: as for `token_lengths`.
    """
    lengths = token_lengths(source)
    return float(lengths[0] if lengths.strides == (0,) else np.mean(lengths))


def estimate_tokens(source: Rows) -> float:
    """Return the tokens per row of 4096 rows spread evenly, for reports.

    Args:
        source: as for `count_tokens`.
    """
    rows = np.linspace(0, len(source) - 1, num=min(len(source), _SAMPLED_LENGTHS)).astype(np.int64)
    return float(np.mean([count_tokens(source, row) for row in rows.tolist()]))
