"""From rows to samples: a function for each source, and the one most sources want, text to ids and targets."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sat_lightning.data.lengths import count_lengths, num_tokens_of
from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.data.records import Records, describe_row, identify_rows, open_records
from sat_lightning.data.remote import CacheDir
from sat_lightning.data.samples import BadSampleError, BadSamples, OnBadSample, process_sample, resolve_process
from sat_lightning.data.tokenizer import Tokenizer, load_tokenizer
from sat_lightning.errors import DataError, nearest

TooLong = Literal["raise", "truncate"]


class Tokenize:
    """Turn fields of text into `input_ids` and `target_ids`, both int64 `[n]`, the targets shifted by one.

    The fields follow each other, then the end of the document. Of the fields that are not learned, such as a prompt,
    the targets are -100::

        fields ["prompt", "answer"], learned ["answer"]
        tokens     p p p a a .        inputs   p    p    p a a
                                      targets  -100 -100 a a .

    Args:
        tokenizer: a tokenizer, or the name of one: `bytes`, a `tokenizers` JSON file, a folder with `tokenizer.json`.
        fields: fields of the row, in order.
        learned: those whose tokens are targets; default all. The end is one if the last field is.
        max_length: `n` at most; default unlimited.
        too_long: what happens to a longer sample: `raise` refuses it, `truncate` cuts off its end.
        add_end: close the sample with the end-of-document id.

    Raises:
        DataError: there is no such tokenizer, a learned field is not among the fields, or a setting is unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str = "bytes",
        fields: Sequence[str] = ("text",),
        learned: Sequence[str] | None = None,
        max_length: int | None = None,
        too_long: TooLong = "raise",
        add_end: bool = True,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.fields = list(fields)
        self.learned = set(self.fields if learned is None else learned)
        self.max_length = max_length
        self.too_long = too_long
        self.add_end = add_end
        if unknown := self.learned - set(self.fields):
            raise DataError(
                f"learned names '{min(unknown)}', which is not among fields ({', '.join(self.fields)})."
                f"{nearest(min(unknown), self.fields)} Add it to fields."
            )
        if too_long not in ("raise", "truncate"):
            raise DataError(f"too_long is {too_long!r}. Set it to 'raise' or 'truncate'.")
        if not self.fields or (max_length is not None and max_length < 1):
            raise DataError(f"fields is {self.fields} and max_length {max_length}. Give a field and a length above 0.")

    def __call__(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """Tokenize a row.

        Args:
            row: with text in every field.

        Returns:
            `input_ids` and `target_ids`.

        Raises:
            BadSampleError: a field is missing or no text, or there are too few or too many tokens.
        """
        tokens, learned = self.join(row)
        num_inputs = self._fit(len(tokens) - 1)
        if num_inputs < 1:
            raise BadSampleError(f"{len(tokens)} token(s), and a target needs one before it. Remove the empty row.")
        targets = np.where(learned[1 : num_inputs + 1], tokens[1 : num_inputs + 1], IGNORED_TARGET)
        return {"input_ids": torch.from_numpy(tokens[:num_inputs]), "target_ids": torch.from_numpy(targets)}

    def whole(self, row: dict[str, Any]) -> Tensor:
        """Tokenize a row into ids alone, int64 `[n]`.

        Args:
            row: with text in every field.

        Raises:
            BadSampleError: a field is missing or no text, or there are too few or too many tokens.
        """
        tokens, _ = self.join(row)
        if len(tokens) == 0:
            raise BadSampleError(f"no text in {', '.join(self.fields)}. Remove the empty row.")
        return torch.from_numpy(tokens[: self._fit(len(tokens))])

    def join(self, row: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return all ids of a row, whatever their number, and of each whether it is learned."""
        pieces = self.tokenizer.encode_batch([self._text(row, field) for field in self.fields])
        return self.close(pieces, [field in self.learned for field in self.fields])

    def close(
        self, pieces: Sequence[NDArray[np.int64]], is_learned: Sequence[bool]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Put pieces behind each other, and the end of the document, which is learned as the last piece is.

        Args:
            pieces: ids.
            is_learned: of each piece.

        Returns:
            Ids, and of each whether it is learned.
        """
        tokens = np.concatenate([*pieces, np.empty(0, dtype=np.int64)])
        learned = np.repeat(np.array(is_learned, dtype=bool), [len(ids) for ids in pieces])
        end = self.tokenizer.end_of_document_id
        if not self.add_end:
            return tokens, learned
        return np.append(tokens, end), np.append(learned, is_learned[-1])

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return repr((self.tokenizer.fingerprint, self.fields, self.max_length, self.too_long, self.add_end))

    def _fit(self, num_tokens: int) -> int:
        """Return how many of so many tokens are kept."""
        if self.max_length is None or num_tokens <= self.max_length:
            return num_tokens
        if self.too_long == "raise":
            raise BadSampleError(
                f"{num_tokens} tokens are more than max_length={self.max_length}. Set too_long: truncate, give the "
                "model a longer max_sequence_length, or shorten the row."
            )
        return self.max_length

    def _text(self, row: dict[str, Any], field: str) -> str | bytes:
        text = self._take(row, field)
        if not isinstance(text, (str, bytes)):
            raise BadSampleError(
                f"field '{field}' holds {type(text).__name__}, not text. Name another in fields, or make text of it "
                "in a process_fn."
            )
        return text

    def _take(self, row: dict[str, Any], field: str) -> Any:  # noqa: ANN401 - whatever a file holds
        if field not in row:
            raise BadSampleError(
                f"no field '{field}'; fields there: {', '.join(sorted(row)) or 'none'}.{nearest(field, row)} Name "
                "another in fields."
            )
        return row[field]


class ProcessedRecords(Dataset[Any]):
    """Rows by number, each put through a function when it is asked for.

    A row that is skipped, and a negative index (the padding row of a sampler), give None, which the collate functions
    turn into a row of which no target counts: the batch keeps its shape, and no other row is repeated in its place.

    Args:
        source: rows by number, or the path of some, which `open_records` opens.
        process_fn: takes a row, gives a sample; or its import path. Default the row itself.
        on_bad_sample: what happens at a row that cannot be read or processed: `raise`, or `skip`.
        max_bad_fraction: the share of the rows that may be skipped.
        options: of the format, for a path.
        cache_dir: where the lengths of samples are kept once they were counted.
    """

    def __init__(
        self,
        source: Records | str,
        process_fn: Callable[[Any], Any] | str | None = None,
        on_bad_sample: OnBadSample = "raise",
        max_bad_fraction: float = 0.01,
        options: dict[str, Any] | None = None,
        cache_dir: CacheDir = None,
    ) -> None:
        self.source = open_records(source, **(options or {})) if isinstance(source, str) else source
        self.name = getattr(self.source, "name", type(self.source).__name__)
        self.process_fn = resolve_process(process_fn)
        self.bad_samples = BadSamples(self.name, on_bad_sample, max_bad_fraction, len(self.source))
        self.cache_dir = cache_dir
        self._lengths: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - what the function makes of it
        return None if index < 0 else self._process(index, lambda: self.source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples of a batch; the rows are gathered at once where the source can."""
        gather = getattr(self.source, "__getitems__", None)
        if gather is None or min(indices, default=-1) < 0:
            return [self[index] for index in indices]
        try:
            rows = gather(list(indices))
        except BadSampleError:  # one of them; which one shows when they are read one by one
            return [self[index] for index in indices]
        return [self._process(index, partial(_same, row)) for index, row in zip(indices, rows, strict=True)]

    def num_tokens(self, index: int) -> int:
        """Tokens of a sample: those of its `input_ids`."""
        if self._lengths is not None:
            return int(self._lengths[index])
        sample = self[index]
        return 0 if sample is None else num_tokens_of(sample, self.name)

    def token_lengths(self) -> NDArray[np.int32]:
        """Tokens of every sample, counted in one pass over all of them; of files, that pass is made only once."""
        if self._lengths is None:
            parts = (identify_rows(self.source), identify_rows(self.process_fn))
            key = None if None in parts else f"{parts}{self.bad_samples.policy}"
            self._lengths = count_lengths(self, self.name, key, self.cache_dir)
        return self._lengths

    @property
    def knows_lengths(self) -> bool:
        """Whether the samples were counted."""
        return self._lengths is not None

    def where(self, index: int) -> str:
        """The place of a row, for messages."""
        return describe_row(self.source, index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None}  # a worker needs none

    def _process(self, index: int, read: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the function makes of it
        self.bad_samples.count()
        try:
            return process_sample(self.process_fn, read(), lambda: self.where(index))
        except BadSampleError as error:
            self.bad_samples.handle(error)
            return None


def _same(value: Any) -> Any:  # noqa: ANN401 - anything
    return value
