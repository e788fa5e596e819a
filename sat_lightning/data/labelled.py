"""Rows with labels -> samples: texts of a class, words with one each, choices of which one is right, images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sat_lightning.data.framing import Frame
from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.data.samples import BadSampleError
from sat_lightning.errors import DataError, nearest

Sample = dict[str, Tensor]


class Labels:
    """The labels there are, each a name, its number the place in the list.

    Args:
        field: of a row, that holds the label: a name, or a number as an integer or as text.
        names: all of them, in order; or how many there are, which are then called 0, 1, 2, ...

    Raises:
        DataError: there are less than two, or one twice.
    """

    def __init__(self, field: str, names: Sequence[str] | int | None) -> None:
        if names is None:
            raise DataError(
                f"data: samples.label is '{field}', and samples.labels does not say which labels there are. Set it to "
                "their names in order, as [negative, positive], or to their number."
            )
        self.field = field
        self.names = [str(name) for name in (range(names) if isinstance(names, int) else names)]
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise DataError(f"data: samples.labels is {names}. Give at least two labels, each once.")
        self._numbers = {name: number for number, name in enumerate(self.names)}
        # Where names are numbers, as of stars 1 to 5, a number is a name and never a place.
        self._takes_places = not any(name.isdecimal() for name in self.names)

    def of(self, row: Mapping[str, Any]) -> int:
        """Return the number of a row's label.

        Args:
            row: the row.

        Raises:
            BadSampleError: it has none, or an unknown one.
        """
        return self.number(take(row, self.field, "samples.label"))

    def number(self, label: Any) -> int:  # noqa: ANN401 - whatever a file holds
        """Return the number of a label.

        Args:
            label: its name, or its number.

        Raises:
            BadSampleError: it is unknown.
        """
        text = str(label).strip()
        if text in self._numbers:
            return self._numbers[text]
        if self._takes_places and text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise BadSampleError(
            f"label {label!r} in field '{self.field}' is none of the {len(self.names)} labels "
            f"({', '.join(self.names[:8])}{', ...' if len(self.names) > 8 else ''}).{nearest(text, self.names)} Mend "
            "the row, or samples.labels."
        )


class LabelledText:
    """Frame the texts of a row: `input_ids` and `token_mask` `[n]`, the number of its label as `target_ids` `[]`.

    A pair of texts for a tokenizer with tokens to frame them gives `token_type_ids` `[n]`, too.

    Args:
        frame: tokenizes.
        fields: of the texts, in order.
        labels: of rows.
    """

    def __init__(self, frame: Frame, fields: Sequence[str], labels: Labels) -> None:
        self.frame, self.fields, self.labels = frame, list(fields), labels

    def __call__(self, row: Mapping[str, Any]) -> Sample:
        """Make a sample of a row.

        Raises:
            BadSampleError: a field is missing or wrong, or the row is too long.
        """
        ids, types = self.frame([take_text(row, field) for field in self.fields])
        sample = _tokens(ids) | {"target_ids": torch.tensor(self.labels.of(row))}
        if len(self.fields) > 1 and self.frame.tells_texts_apart:
            sample["token_type_ids"] = torch.from_numpy(types)
        return sample

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return repr((type(self).__name__, self.frame.fingerprint(), self.fields))


class LabelledWords(LabelledText):
    """Frame the words of a row, each with a label: `input_ids`, `token_mask` and `target_ids` `[n]`.

    The field, the only one, and that of the labels hold lists of equal length, or text split at blanks. The first
    token of a word has its label as target; its other tokens, and what frames the words, -100.
    """

    def __call__(self, row: Mapping[str, Any]) -> Sample:
        """Make a sample of a row.

        Raises:
            BadSampleError: a field is missing or wrong, or the row is too long.
        """
        words, given = _split(row, self.fields[0]), _split(row, self.labels.field)
        if len(words) != len(given):
            raise BadSampleError(f"{len(words)} words in '{self.fields[0]}' and {len(given)} labels. Mend the row.")
        # A blank before every word but the first is what byte-level tokenizers were trained on; others ignore it.
        pieces = self.frame.tokenizer.encode_batch([f" {word}" if place else word for place, word in enumerate(words)])
        targets = [np.full(len(ids), IGNORED_TARGET, dtype=np.int64) for ids in pieces]
        for target, label in zip(targets, given, strict=True):
            target[:1] = self.labels.number(label)
        ids, _ = self.frame.join([pieces])
        inner = np.concatenate([*targets, np.empty(0, dtype=np.int64)])[: len(ids) - 2]
        target_ids = np.pad(inner, 1, constant_values=IGNORED_TARGET)
        return _tokens(ids) | {"target_ids": torch.from_numpy(target_ids)}


class LabelledChoices(LabelledText):
    """Frame a row's texts once with each choice: `input_ids` and `token_mask` `[choices, n]`, the right one's number.

    Args:
        frame: tokenizes.
        fields: of the texts before a choice, in order.
        labels: one for each choice.
        choices: a field for each choice, or the one that holds a list of them.
    """

    def __init__(self, frame: Frame, fields: Sequence[str], labels: Labels, choices: Sequence[str]) -> None:
        super().__init__(frame, fields, labels)
        self.choices = list(choices)

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return f"{super().fingerprint()} {self.choices}"

    def __call__(self, row: Mapping[str, Any]) -> Sample:
        """Make a sample of a row.

        Raises:
            BadSampleError: a field is missing or wrong, there are too few choices, or the row is too long.
        """
        texts = [take_text(row, field) for field in self.fields]
        if len(self.choices) == 1:
            choices = take(row, self.choices[0], "samples.choices")
        else:
            choices = [take_text(row, field) for field in self.choices]
        if not isinstance(choices, list) or len(choices) != len(self.labels.names):
            found = len(choices) if isinstance(choices, list) else type(choices).__name__
            raise BadSampleError(f"{found} choices, and samples.labels has {len(self.labels.names)}. Mend the row.")
        framed = [self.frame([*texts, str(choice)]) for choice in choices]
        width = max(len(own) for own, _ in framed)
        ids, types = (
            np.stack([np.pad(part, (0, width - len(part))) for part in parts]) for parts in zip(*framed, strict=True)
        )
        mask = np.stack([np.arange(width) < len(own) for own, _ in framed])
        sample = {"input_ids": ids, "token_mask": mask}
        if self.frame.tells_texts_apart:
            sample["token_type_ids"] = types
        target = {"target_ids": torch.tensor(self.labels.of(row))}
        return {name: torch.from_numpy(value) for name, value in sample.items()} | target


class LabelledImage:
    """Scale the image of a row: `image` float `[channels, h, w]`, its pixels -1 to 1, and `target_ids` `[]`.

    Args:
        field: that holds an array uint8 `[h, w]` or `[h, w, channels]`.
        labels: of rows.
        size: height and width to resize to, without keeping the proportions; default as it is.
    """

    def __init__(self, field: str, labels: Labels, size: Sequence[int] | None = None) -> None:
        self.field, self.labels, self.size = field, labels, None if size is None else tuple(size)

    def __call__(self, row: Mapping[str, Any]) -> Sample:
        """Make a sample of a row.

        Raises:
            BadSampleError: a field is missing, or holds no image.
        """
        pixels = np.asarray(take(row, self.field, "samples.image"))
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise BadSampleError(
                f"field '{self.field}' holds {pixels.dtype} {list(pixels.shape)}, not an image: uint8 [height, width] "
                "or [height, width, channels]. Name another in samples.image."
            )
        image = torch.tensor(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).float() / 127.5 - 1.0
        if self.size is not None and image.shape[1:] != self.size:
            image = F.interpolate(image[None], self.size, mode="bilinear", antialias=True, align_corners=False)[0]
        return {"image": image.contiguous(), "target_ids": torch.tensor(self.labels.of(row))}

    def fingerprint(self) -> str:
        """What identifies the samples made."""
        return repr((type(self).__name__, self.field, self.size, self.labels.names))


def take(row: Mapping[str, Any], field: str, option: str) -> Any:  # noqa: ANN401 - whatever a file holds
    """Take a field out of a row.

    Args:
        row: the row.
        field: its name.
        option: the setting that names it, for messages.

    Returns:
        What it holds.

    Raises:
        BadSampleError: there is no such field.
    """
    if field not in row:
        raise BadSampleError(
            f"no field '{field}'; fields there: {', '.join(sorted(row)) or 'none'}.{nearest(field, row)} Name another "
            f"in {option}."
        )
    return row[field]


def take_text(row: Mapping[str, Any], field: str) -> str:
    """Take a text out of a row.

    Args:
        row: the row.
        field: its name.

    Returns:
        The text.

    Raises:
        BadSampleError: there is no such field, or it holds something else.
    """
    text = take(row, field, "samples.fields")
    if not isinstance(text, str):
        raise BadSampleError(f"field '{field}' holds {type(text).__name__}, not text. Name another in samples.fields.")
    return text


def _tokens(ids: NDArray[np.int64]) -> Sample:
    return {"input_ids": torch.from_numpy(ids), "token_mask": torch.ones(len(ids), dtype=torch.bool)}


def _split(row: Mapping[str, Any], field: str) -> list[Any]:
    value = take(row, field, "samples.fields or samples.label")
    return value.split() if isinstance(value, str) else list(value)
