"""Several documents in one row: positions restart with each, and attention does not cross from one to the next."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sat_lightning.data.lengths import count_lengths
from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.data.records import check_index, describe_row
from sat_lightning.data.samples import BadSampleError
from sat_lightning.errors import DataError

MaskKind = Literal["tensor", "flex", "none"]

_NO_DOCUMENT = -1


def number_documents(input_ids: Tensor, end_of_document_id: int) -> Tensor:
    """Number the documents of each row by where they end.

    Args:
        input_ids: `[b, s]`.
        end_of_document_id: the last token of every document.

    Returns:
        int64 `[b, s]`, from 0 in each row; an end belongs to the document that it ends.
    """
    is_end = input_ids == end_of_document_id
    return is_end.cumsum(1) - is_end.long()


def restart_positions(document_ids: Tensor) -> Tensor:
    """Count positions from the start of each document.

    Args:
        document_ids: `[b, s]`; the tokens of a document are neighbours.

    Returns:
        int64 `[b, s]`.
    """
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return columns - torch.where(is_start, columns, 0).cummax(1).values


def document_mask(document_ids: Tensor) -> Tensor:
    """Let a token see those of its own document up to itself.

    Args:
        document_ids: `[b, s]`.

    Returns:
        bool `[b, 1, s, s]`; every token sees at least itself.
    """
    length = document_ids.shape[1]
    is_same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return is_same & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()


def document_block_mask(document_ids: Tensor) -> Any:  # noqa: ANN401 - BlockMask of a version that has it
    """Make the same mask for FlexAttention, which skips the blocks that no token of a document reaches.

    Args:
        document_ids: `[b, s]`.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask` `[b, 1, s, s]`.

    Raises:
        DataError: this version of PyTorch has no FlexAttention.
    """
    try:
        from torch.nn.attention.flex_attention import create_block_mask
    except ImportError as error:
        raise DataError(
            f"PyTorch {torch.__version__} has no FlexAttention. Install 2.6 or later, or use the mask as a tensor."
        ) from error

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_ids[row, query] == document_ids[row, key]) & (query >= key)

    num_rows, length = document_ids.shape
    return create_block_mask(is_visible, num_rows, None, length, length, device=str(document_ids.device))


def separate_documents(batch: dict[str, Any], end_of_document_id: int, mask: MaskKind = "tensor") -> dict[str, Any]:
    """Draw the boundaries between the documents of packed rows.

    Args:
        batch: `input_ids` and `target_ids`, both `[b, s]`, as `PackedTokens` gives them.
        end_of_document_id: the last token of every document.
        mask: a bool `tensor`, a `flex` block mask, or `none` (positions restart, attention is the model's own).

    Returns:
        The batch with `position_ids` and `attention_mask`; the target of an end, which is the first token of the next
        document, is -100, as nothing before it tells of it.
    """
    input_ids = batch["input_ids"]
    targets = batch["target_ids"].masked_fill(input_ids == end_of_document_id, IGNORED_TARGET)
    return _mark({**batch, "target_ids": targets}, number_documents(input_ids, end_of_document_id), mask)


def _mark(batch: dict[str, Any], document_ids: Tensor, mask: MaskKind) -> dict[str, Any]:
    batch["position_ids"] = restart_positions(document_ids)
    if mask != "none":
        batch["attention_mask"] = (document_mask if mask == "tensor" else document_block_mask)(document_ids)
    return batch


def pack_by_length(lengths: ArrayLike, row_length: int, window_size: int = 1024) -> list[list[int]]:
    """Put documents into rows of one length, each whole, so that little is left empty.

    Best fit of the longest first, within windows of the order, so that a row depends on its window alone. Source:
    Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024).

    Args:
        lengths: tokens of each document, in their order; 1 to `row_length`.
        row_length: tokens of a row.
        window_size: documents packed together.

    Returns:
        The numbers of the documents of every row, ascending; every document is in one row.

    Raises:
        DataError: a document is longer than a row.
    """
    values = np.asarray(lengths, dtype=np.int64)
    if values.size and values.max() > row_length:
        raise DataError(
            f"pack_by_length: document {int(values.argmax())} has {int(values.max())} tokens, more than "
            f"row_length={row_length}. Split it, or raise row_length."
        )
    rows: list[list[int]] = []
    for start in range(0, len(values), window_size):
        rows += _pack_window(values[start : start + window_size], row_length, start)
    return rows


def _pack_window(lengths: NDArray[np.int64], row_length: int, first: int) -> list[list[int]]:
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # what is left in a row, and its number, ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect_left(spaces, (length, 0))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(first + number)
        if space > length:
            insort(spaces, (space - length, row))
    return [sorted(row) for row in rows]


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Rows of whole documents, by number: what is in a row is fixed, so shuffling and resuming rows is all there is.

    A row is `input_ids`, `target_ids` and `document_ids`, int64 `[s]`; its end may be empty (id 0, target -100,
    document -1). A negative index gives a row that is all empty.

    Args:
        records: samples by number with `input_ids` and `target_ids` `[n]`, as `Tokenize` makes them; skipped ones
            (None) are left out.
        sequence_length: `s`.
        lengths: tokens of each sample, if they are known; default they are counted, in one pass over all samples.
        split: cut samples longer than a row into pieces, each a document of its own, rather than refuse them.
        window_size: samples packed together; see `pack_by_length`.

    Raises:
        BadSampleError: a sample is longer than a row.
    """

    def __init__(
        self,
        records: Any,  # noqa: ANN401 - Records, or a user's own
        sequence_length: int,
        lengths: Sequence[int] | NDArray[Any] | None = None,
        split: bool = False,
        window_size: int = 1024,
    ) -> None:
        self.records = records
        self.name = getattr(records, "name", type(records).__name__)
        self.sequence_length = sequence_length
        measured = count_lengths(records, self.name, None, None) if lengths is None else lengths
        known = np.asarray(measured, dtype=np.int64)
        if known.size and known.max() > sequence_length and not split:
            index = int(known.argmax())
            raise BadSampleError(
                f"{describe_row(records, index)}: {int(known[index])} tokens do not fit into a row of sequence_length="
                f"{sequence_length}. Set split: true, raise sequence_length, or cut samples off when they are "
                "tokenized."
            )
        # The pieces: which sample, and from which of its tokens on.
        num_pieces = -(-known // sequence_length)
        self._samples = np.repeat(np.arange(len(known)), num_pieces)
        number_in_sample = np.arange(len(self._samples)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        self._starts = number_in_sample * sequence_length
        rest = np.minimum(known[self._samples] - self._starts, sequence_length)
        rows = pack_by_length(rest, sequence_length, window_size)
        self._pieces = np.array([piece for row in rows for piece in row], dtype=np.int64)
        self._row_ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self.num_real_tokens = int(rest.sum())

    def __len__(self) -> int:
        return len(self._row_ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.sequence_length
        row = {
            "input_ids": np.zeros(length, dtype=np.int64),
            "target_ids": np.full(length, IGNORED_TARGET, dtype=np.int64),
            "document_ids": np.full(length, _NO_DOCUMENT, dtype=np.int64),
        }
        place = 0
        for number, piece in enumerate(self._pieces_of(index)):
            sample, start = self.records[int(self._samples[piece])], int(self._starts[piece])
            if sample is None:
                continue
            ids = np.asarray(sample["input_ids"])[start : start + length]
            span = slice(place, place := place + len(ids))
            row["input_ids"][span] = ids
            row["target_ids"][span] = np.asarray(sample["target_ids"])[start : start + length]
            row["document_ids"][span] = number
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def _pieces_of(self, index: int) -> list[int]:
        if index < 0:  # the padding row of a sampler
            return []
        check_index(self, index)
        return self._pieces[(self._row_ends[index - 1] if index else 0) : self._row_ends[index]].tolist()

    def num_tokens(self, index: int) -> int:
        """Tokens of a row, empty ones included."""
        return self.sequence_length

    @property
    def fill(self) -> float:
        """The share of all tokens that is not empty."""
        return self.num_real_tokens / max(len(self) * self.sequence_length, 1)


class DocumentCollate:
    """Stack rows of `PackedDocuments` and draw the boundaries.

    Args:
        mask: a bool `tensor`, a `flex` block mask, or `none`.
    """

    def __init__(self, mask: MaskKind = "tensor") -> None:
        if mask not in ("tensor", "flex", "none"):
            raise DataError(f"mask is {mask!r}. Set it to 'tensor', 'flex' or 'none'.")
        self.mask: MaskKind = mask

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Collate a batch.

        Args:
            rows: of `PackedDocuments`.

        Returns:
            `input_ids`, `target_ids` and `position_ids` `[b, s]`, and `attention_mask`.
        """
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        document_ids = stacked.pop("document_ids")
        return _mark(stacked, document_ids, self.mask)
