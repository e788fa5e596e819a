"""Samples of different lengths -> one batch, and which samples to put together so that little of it is padding."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.errors import DataError

Sample = Mapping[str, Any]


class PadCollate:
    """Pad samples to one length: `input_ids` with `padding_id`, `target_ids` with -100, other sequences with 0.

    A sample that is None (skipped, or the padding row of a sampler) becomes a row of padding alone.

    Args:
        length: `longest` of the batch, or a number of tokens.
        multiple_of: round the length up to a multiple, which keeps the number of shapes small.
        padding_id: of `input_ids`; no target counts there, so any id of the vocabulary will do.
        side: where the padding goes, `right` or `left`.
        attention_mask: what the batch says of it. `padding`: bool `[b, 1, 1, t]`, every query sees what is no padding
            (encoders). `causal`: bool `[b, 1, s, t]`, no later token either. `none`: left to the model, which is right
            for a causal model and padding on the right, as no token sees what follows it.
        position_ids: add `[b, s]`, from 0 at the first token that is no padding.
        token_mask: add bool `[b, s]`, true for tokens.
        fields: sequences to collate, for instance `input_ids`; default all of one dimension of the first sample.

    Raises:
        DataError: a setting is unknown.
    """

    def __init__(
        self,
        length: int | Literal["longest"] = "longest",
        multiple_of: int = 1,
        padding_id: int = 0,
        side: Literal["right", "left"] = "right",
        attention_mask: Literal["none", "padding", "causal"] = "none",
        position_ids: bool = False,
        fields: Sequence[str] | None = None,
        token_mask: bool = False,
    ) -> None:
        self.length = length
        self.multiple_of = multiple_of
        self.padding_id = padding_id
        self.side = side
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.fields = fields
        self.token_mask = token_mask
        if side not in ("right", "left") or attention_mask not in ("none", "padding", "causal"):
            raise DataError(
                f"collate: side is {side!r} and attention_mask {attention_mask!r}. Set them to one of right, left, and "
                "one of none, padding, causal."
            )
        if (length != "longest" and not (isinstance(length, int) and length > 0)) or multiple_of < 1:
            raise DataError(
                f"collate: length is {length!r} and multiple_of {multiple_of}. Set length to 'longest' or a number "
                "above 0, and multiple_of to at least 1."
            )

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """Collate a batch.

        Args:
            samples: with `input_ids`, and other sequences as long as it; or None.

        Returns:
            `[b, s]` of every field, and what the settings add.

        Raises:
            DataError: a sample is longer than `length`, or its sequences differ in length.
        """
        lengths = np.array([0 if sample is None else len(sample["input_ids"]) for sample in samples])
        width = self._width(lengths)
        batch = {name: self._pad(name, samples, lengths, width) for name in self._names(samples)}
        columns = np.arange(width)
        starts = (width - lengths if self.side == "left" else np.zeros_like(lengths))[:, None]
        is_token = torch.from_numpy((columns >= starts) & (columns < starts + lengths[:, None]))  # [b, s]
        if self.attention_mask != "none":
            mask = is_token[:, None, None, :]  # [b, 1, 1, t]
            batch["attention_mask"] = mask if self.attention_mask == "padding" else mask & _causal(width)
        if self.token_mask:
            batch["token_mask"] = is_token
        if self.position_ids:
            batch["position_ids"] = torch.from_numpy(np.maximum(columns - starts, 0))
        return batch

    def _width(self, lengths: NDArray[np.int64]) -> int:
        longest = int(lengths.max(initial=1))
        width = longest if self.length == "longest" else int(self.length)
        if longest > width:
            raise DataError(
                f"collate: sample {int(lengths.argmax())} of the batch has {longest} tokens, more than length={width}. "
                "Raise length, or cut samples off when they are tokenized (too_long: truncate)."
            )
        return -(-width // self.multiple_of) * self.multiple_of

    def _names(self, samples: Sequence[Sample | None]) -> list[str]:
        if self.fields is not None:
            return list(self.fields)
        first = next((sample for sample in samples if sample is not None), None)
        if first is None:
            return ["input_ids", "target_ids"]
        return [name for name, value in first.items() if getattr(value, "ndim", 0) == 1]

    def _pad(self, name: str, samples: Sequence[Sample | None], lengths: NDArray[np.int64], width: int) -> Tensor:
        padding = {"input_ids": self.padding_id, "target_ids": IGNORED_TARGET}.get(name, 0)
        first = next((sample[name] for sample in samples if sample is not None), np.empty(0, dtype=np.int64))
        values = np.full((len(samples), width), padding, dtype=np.asarray(first).dtype)
        for row, (sample, length) in enumerate(zip(samples, lengths.tolist(), strict=True)):
            if sample is not None:
                if len(sample[name]) != length:
                    raise DataError(
                        f"collate: sample {row} of the batch has {length} input_ids and {len(sample[name])} of "
                        f"'{name}'. Name the fields that are as long as input_ids in fields."
                    )
                start = width - length if self.side == "left" else 0
                values[row, start : start + length] = sample[name]
        return torch.from_numpy(values)


class LabelCollate:
    """Stack samples with labels: what they hold is padded with 0 at its end, `target_ids` with -100.

    A sample that is None (a bad one that was skipped) becomes a row of which no target counts.

    Args:
        multiple_of: round the length of texts up to a multiple, which keeps the number of shapes small.
    """

    def __init__(self, multiple_of: int = 1) -> None:
        if multiple_of < 1:
            raise DataError(f"collate: multiple_of is {multiple_of}. Set it to at least 1.")
        self.multiple_of = multiple_of
        self._example: Sample | None = None

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """Collate a batch.

        Args:
            samples: with the same fields; or None.

        Returns:
            A tensor of every field, the batch first.

        Raises:
            DataError: there is no sample at all, in this batch or an earlier one.
        """
        self._example = next((sample for sample in samples if sample is not None), self._example)
        if self._example is None:
            raise DataError(f"collate: all {len(samples)} samples of the first batch are bad. Mend the data.")
        return {name: self._stack(name, samples, like) for name, like in self._example.items()}

    def _stack(self, name: str, samples: Sequence[Sample | None], like: Tensor) -> Tensor:
        values = [None if sample is None else sample[name] for sample in samples]
        shapes = [like.shape, *(value.shape for value in values if value is not None)]
        shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
        if shape and name != "image":
            shape[-1] = -(-shape[-1] // self.multiple_of) * self.multiple_of
        if name == "image" and any(list(size) != shape for size in shapes):
            raise DataError(
                f"collate: images of one batch are {' and '.join(str(list(size)) for size in dict.fromkeys(shapes))}. "
                "Set samples.image_size, and give all of them as many channels."
            )
        stacked = like.new_full((len(values), *shape), IGNORED_TARGET if name == "target_ids" else 0)
        for row, value in zip(stacked, values, strict=True):
            if value is not None:
                row[tuple(slice(0, size) for size in value.shape)] = value
        return stacked


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def bucket_by_length(
    order: Iterable[int], length_of: Callable[[int], int] | Sequence[int] | NDArray[Any], window_size: int
) -> Iterator[int]:
    """Bring samples of similar length together: sort an order by length within windows, longest first.

    A pure function of the order: what lies in a window depends on nothing before it, so it is resumed by beginning at
    the window's first position. Shuffle the batches afterwards if their order matters.

    Args:
        order: sample numbers.
        length_of: a function or an array that gives the length of a sample.
        window_size: samples sorted together.

    Yields:
        The same numbers.

    Raises:
        DataError: the window is empty.
    """
    if window_size < 1:
        raise DataError(f"bucket_by_length: window_size is {window_size}. Set it to at least 1.")
    numbers, length = iter(order), _as_function(length_of)
    while window := list(islice(numbers, window_size)):
        yield from sorted(window, key=lambda number: -length(number))


def batch_by_tokens(
    order: Iterable[int],
    length_of: Callable[[int], int] | Sequence[int] | NDArray[Any],
    max_tokens: int,
    max_samples: int | None = None,
    multiple_of: int = 1,
) -> Iterator[list[int]]:
    """Cut an order into batches that hold at most so many tokens once they are padded to their longest sample.

    A pure function of the order. Give batches to ranks in turn (`islice(batches, rank, None, num_ranks)`).

    Args:
        order: sample numbers.
        length_of: a function or an array that gives the length of a sample.
        max_tokens: rows times the padded length, at most.
        max_samples: rows, at most; default unlimited.
        multiple_of: what the padded length is rounded up to; see `PadCollate`.

    Yields:
        Sample numbers of a batch, none empty.

    Raises:
        DataError: one sample is longer than the budget.
    """
    length, batch, longest = _as_function(length_of), list[int](), 0
    for number in order:
        padded = -(-length(number) // multiple_of) * multiple_of
        if padded > max_tokens:
            raise DataError(
                f"batch_by_tokens: sample {number} takes {padded} tokens, more than max_tokens={max_tokens}. Raise "
                "max_tokens, or cut samples off when they are tokenized."
            )
        is_full = max(longest, padded) * (len(batch) + 1) > max_tokens or len(batch) == max_samples
        if is_full:
            yield batch
            batch, longest = [], 0
        batch.append(number)
        longest = max(longest, padded)
    if batch:
        yield batch


def _as_function(length_of: Callable[[int], int] | ArrayLike) -> Callable[[int], int]:
    if callable(length_of):
        return length_of
    lengths = np.asarray(length_of)
    return lambda number: int(lengths[number])
