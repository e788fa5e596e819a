"""Rows by number of NumPy arrays and headerless token files, memory-mapped."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sat_lightning.data.formats import read_token_file
from sat_lightning.data.packing import PackedTokens
from sat_lightning.data.records import Records, check_index
from sat_lightning.data.sources import SourceOptions, register_source
from sat_lightning.errors import DataError


class TokenRows(Dataset[Any]):
    """Rows of one length that tile an array of token ids; see `PackedTokens`.

    Args:
        name: what messages call it.
        tokens: ids, `[num_tokens]`, perhaps memory-mapped.
        sequence_length: tokens per row.

    Raises:
        DataError: there are too few tokens for a row.
    """

    def __init__(self, name: str, tokens: NDArray[np.integer[Any]], sequence_length: int) -> None:
        self.name = name
        self.rows = PackedTokens(_MappedTokens(tokens), sequence_length)  # type: ignore[arg-type]
        if len(self) == 0:
            raise DataError(
                f"{name}: {len(tokens)} tokens are too few for one row of sequence_length={sequence_length}, which "
                f"takes {sequence_length + 1}. Give more tokens, or lower sequence_length."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Rows of a batch, gathered at once."""
        return self.rows.__getitems__(indices)

    def num_tokens(self, index: int) -> int:
        """Tokens of a row."""
        return self.rows.sequence_length


class ArrayRows(Dataset[Any]):
    """Rows of an array of two or more dimensions: `{field: array[index]}` each.

    Args:
        name: what messages call it.
        values: the array, perhaps memory-mapped.
        field: what the entry of a row is called.
    """

    def __init__(self, name: str, values: NDArray[Any], field: str = "input_ids") -> None:
        self.name = name
        self.values = values
        self.field = field

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        check_index(self, index)
        return {self.field: np.array(self.values[index])}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of a batch, gathered at once."""
        return [{self.field: row} for row in self.values[np.asarray(indices)]]

    def num_tokens(self, index: int) -> int:
        """Elements along a row's first dimension."""
        return int(self.values.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole array to a worker.
        file = getattr(self.values, "filename", None)
        return self.__dict__ if file is None else {**self.__dict__, "values": None, "file": str(file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state.pop("file", None)
        self.__dict__.update(state)
        if file is not None:
            self.values = np.load(file, mmap_mode="r", allow_pickle=False)


class _MappedTokens:
    """What `PackedTokens` needs of a token store, over an array that stays where it is."""

    def __init__(self, tokens: NDArray[np.integer[Any]]) -> None:
        self._tokens: NDArray[np.integer[Any]] | None = tokens
        self._length = len(tokens)
        is_map = isinstance(tokens, np.memmap)
        self._place = (tokens.filename, tokens.dtype, tokens.offset) if is_map else None  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> NDArray[np.integer[Any]]:
        if self._tokens is None and self._place is not None:
            file, dtype, offset = self._place
            self._tokens = np.memmap(file, dtype=dtype, mode="r", offset=offset).view(np.ndarray)
        if self._tokens is None:
            raise DataError("the token array is gone. Open it again.")
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": self._tokens if self._place is None else None}


@register_source(".npy", records=True)
def open_array(path: str, sequence_length: int | None = None, field: str = "input_ids") -> Records:
    """Map a NumPy file: token ids in one dimension as rows of one length, or the rows of several dimensions.

    Args:
        path: the file.
        sequence_length: tokens per row; for one dimension only.
        field: what the entry of a row is called; for several dimensions only.

    Returns:
        Its rows.

    Raises:
        DataError: it is no whole array, or one dimension without a `sequence_length`.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: not a whole NumPy array file ({error}). Write it again with numpy.save.") from error
    return _open_tokens(path, values, sequence_length) if values.ndim == 1 else ArrayRows(path, values, field)


@register_source(".bin", records=True)
def open_tokens(path: str, sequence_length: int | None = None, token_dtype: str = "uint16") -> Records:
    """Map a headerless file of token ids as rows of one length.

    Args:
        path: the file.
        sequence_length: tokens per row.
        token_dtype: `uint16` or `uint32`.

    Returns:
        Its rows: `input_ids` and `target_ids`, shifted by one.

    Raises:
        DataError: the file is empty or damaged, or there is no `sequence_length`.
    """
    for tokens in read_token_file(path, SourceOptions(token_dtype=token_dtype)):
        return _open_tokens(path, tokens, sequence_length)
    raise DataError(f"{path} is empty: 0 tokens. Give a file with tokens, or leave it out.")


def _open_tokens(path: str, tokens: NDArray[np.integer[Any]], sequence_length: int | None) -> Records:
    if sequence_length is None:
        raise DataError(f"{path}: token ids in one dimension have no rows. Set sequence_length, tokens per row.")
    if tokens.dtype.kind not in "ui":
        raise DataError(f"{path}: a {tokens.dtype} array; token ids are integers. Save it with astype('uint32').")
    return TokenRows(path, tokens, sequence_length)
