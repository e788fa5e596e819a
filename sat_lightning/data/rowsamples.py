"""Rows of files as samples of their own, rather than text that runs together: opened, and packed if asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.data import Dataset

from sat_lightning.data.documents import PackedDocuments
from sat_lightning.data.entries import WeightedPath
from sat_lightning.data.framing import Frame
from sat_lightning.data.labelled import LabelledChoices, LabelledImage, LabelledText, LabelledWords, Labels
from sat_lightning.data.lengths import token_lengths
from sat_lightning.data.mixed import Rows
from sat_lightning.data.pairs import TokenizePair
from sat_lightning.data.records import identify_rows, open_records
from sat_lightning.data.samples import resolve_process
from sat_lightning.data.sources import SourceOptions
from sat_lightning.data.templated import TokenizeChat, TokenizeForm
from sat_lightning.data.templates import Form, is_chat, read_template
from sat_lightning.data.tokenizer import Tokenizer
from sat_lightning.data.transforms import ProcessedRecords, Tokenize, TooLong
from sat_lightning.errors import DataError

Process = Tokenize | TokenizePair | LabelledText | LabelledImage

_DEFAULT_FIELDS = ["text"]


@dataclass(frozen=True)
class SampleOptions:
    """How a row of a file becomes a sample: its fields tokenized, one after the other, then padded or packed."""

    fields: list[str] = field(default_factory=lambda: [*_DEFAULT_FIELDS])
    """Fields of text of a row, in order. What own data or a `process_fn` gives is tokenized, too, unless it has
    `input_ids` already."""
    learned: list[str] | None = None
    """Those whose tokens are targets, for instance the answer but not the prompt; default all."""
    template: str | None = None
    r"""A form for fields, as `Question: {prompt}\nAnswer: {answer}`; or a chat template for messages, of which the
    assistant's are learned: `chat`, that of the tokenizer's folder, or FILE.jinja. `sat-lightning chat` asks alike."""
    add_end: bool = True
    """Close each sample with the end-of-document id."""
    read: list[str] | None = None
    """Fields that an encoder reads, for `SequenceToSequenceTask`; `fields` are then what the decoder is to write."""
    too_long: Literal["raise", "truncate", "split"] = "raise"
    """What becomes of more tokens than `sequence_length`: an error, their end cut off, or (packed) several pieces."""
    pack: bool = False
    """Put several samples into a row of `sequence_length`; attention does not cross from one to the next."""
    label: str | None = None
    """Field of a row's label: the fields are then framed as a classifier reads them, the label is the only target."""
    labels: list[str] | int | None = None
    """All labels in the order of their numbers, or how many there are."""
    labels_of: Literal["rows", "words"] = "rows"
    """What has a label: a row, or each of the words that its only field holds (a list, or text split at blanks)."""
    choices: list[str] | None = None
    """Fields with a choice each, or one that holds a list of them: `label` says which one goes with `fields`."""
    image: str | None = None
    """Field of an image, which then takes the place of `fields`."""
    image_size: list[int] | None = None
    """Height and width that images are resized to; default as they are."""

    def __post_init__(self) -> None:
        if self.label is None and any((self.labels, self.labels_of == "words", self.choices, self.image)):
            raise DataError("data: samples.label names no field. Set it to the field that holds the label.")
        if self.label is not None and (self.pack or self.learned is not None or self.too_long == "split"):
            raise DataError(
                "data: samples.pack, learned and split are for targets that are text; samples.label has none."
            )
        if self.label is not None:
            Labels(self.label, self.labels)
        if self.too_long == "split" and not self.pack:
            raise DataError("data: samples.too_long is split, which needs samples.pack. Set pack: true, or truncate.")
        if self.read is not None and (self.pack or self.learned is not None):
            raise DataError(
                "data: samples.read makes pairs, which are not packed and learned as a whole. Remove read, or pack and "
                "learned."
            )
        if self.template is not None:
            self._check_template(self.template)

    def _check_template(self, template: str) -> None:
        if self.label is not None or self.read is not None:
            raise DataError("data: samples.template is for one text that is learned. Remove it, or label and read.")
        if not is_chat(template):
            Form(template, self.learned)
        elif self.learned not in (None, ["assistant"]) or len(self.fields) != 1:
            raise DataError(
                f"data: samples.template {template} takes one field, of messages, and of these the assistant's are "
                f"learned; fields is {self.fields} and learned {self.learned}. Leave learned out."
            )


@dataclass(frozen=True)
class SampleReading:
    """How paths become samples; `options` is None where every source makes its own."""

    tokenizer: Tokenizer
    """Turns text into ids."""
    sequence_length: int
    """Tokens of a sample at most, or of a packed row."""
    options: SampleOptions | None
    """How a row becomes a sample."""
    source_options: SourceOptions
    """How files are read."""
    cache_dir: str | None = None
    """Where indices, remote copies and lengths are kept."""

    def open(self, source: WeightedPath) -> Rows:
        """Open a source; nothing is read but what finds its rows.

        Args:
            source: a path, with a `create_dataset` or `process_fn` of its own if it has one.

        Returns:
            Samples by number.
        """
        given = dict(source.options or {})
        options = self.options or SampleOptions()
        if source.dataset is not None:
            records: Any = source.dataset
        elif source.create_dataset is not None:
            records = open_records(source.path, create_dataset=source.create_dataset, **given)
        else:
            cache = {} if self.cache_dir is None else {"cache_dir": self.cache_dir}
            records = open_records(source.path, **{**cache, **given})
        process: Any = resolve_process(source.process_fn)
        if self.options is not None and source.has_own_samples and not hasattr(records, "num_tokens"):
            process = _Completed(process, self._tokenize(options))
        if process is None and source.has_own_samples:
            return records
        return ProcessedRecords(
            records,
            self._tokenize(options) if process is None else process,
            self.source_options.on_bad_sample,
            self.source_options.max_bad_fraction,
            cache_dir=self.cache_dir,
        )

    def pack(self, rows: Rows) -> Rows:
        """Pack the samples of a split, if that is asked for.

        Args:
            rows: samples.

        Returns:
            Rows of several samples, or the samples.
        """
        if self.options is None or not self.options.pack:
            return rows
        return PackedDocuments(rows, self.sequence_length, token_lengths(rows), split=self.options.too_long == "split")

    def _tokenize(self, options: SampleOptions) -> Process:
        if options.label is not None:
            return self._labelled(options, Labels(options.label, options.labels))
        length = None if options.too_long == "split" else self.sequence_length
        too_long: TooLong = "truncate" if options.too_long == "truncate" else "raise"
        rest = (length, too_long, options.add_end)
        if options.template is not None:
            form = read_template(options.template, self.tokenizer, options.learned)
            if isinstance(form, Form):
                return TokenizeForm(self.tokenizer, form, *rest)
            field = "messages" if options.fields == _DEFAULT_FIELDS else options.fields[0]
            return TokenizeChat(self.tokenizer, form, field, *rest)
        written = Tokenize(self.tokenizer, options.fields, options.learned, *rest)
        if options.read is None:
            return written
        # What is read is not closed: `sat-lightning generate` does not close it either.
        return TokenizePair(Tokenize(self.tokenizer, options.read, None, length, too_long, False), written)

    def _labelled(self, options: SampleOptions, labels: Labels) -> Process:
        if options.image is not None:
            return LabelledImage(options.image, labels, options.image_size)
        frame = Frame(self.tokenizer, self.sequence_length, options.too_long == "truncate")
        if options.choices is not None:
            return LabelledChoices(frame, options.fields, labels, options.choices)
        kind = LabelledWords if options.labels_of == "words" else LabelledText
        return kind(frame, options.fields, labels)


class _Completed:
    """What a user's function gives, or their data, tokenized where it still is text."""

    def __init__(self, process_fn: Callable[[Any], Any] | None, tokenize: Process) -> None:
        self.process_fn, self.tokenize = process_fn, tokenize

    def __call__(self, row: Any) -> Any:  # noqa: ANN401 - what a user makes of it
        sample = row if self.process_fn is None else self.process_fn(row)
        is_text = isinstance(sample, Mapping) and "input_ids" not in sample and "target_ids" not in sample
        return self.tokenize(dict(sample)) if is_text else sample

    def fingerprint(self) -> str | None:
        """Identify what comes out, if the user's function can be identified."""
        own = "" if self.process_fn is None else identify_rows(self.process_fn)
        return None if own is None else f"{own} {self.tokenize.fingerprint()}"


def check_rows(dataset: Dataset[Any]) -> Rows:
    """Refuse a dataset that has no rows by number, or none at all.

    Args:
        dataset: a user's own.

    Returns:
        The dataset.

    Raises:
        DataError: it has no length or rows by number, or is empty.
    """
    name = getattr(dataset, "name", type(dataset).__name__)
    if not isinstance(dataset, Rows):
        raise DataError(f"data: {name} has no length or rows by number. Give a map-style dataset, or a path.")
    if len(dataset) == 0:
        raise DataError(f"data: {name} is empty: it has 0 samples. Give it data, or remove it.")
    return dataset


def is_of_samples(sources: Sequence[WeightedPath], options: SampleOptions | None) -> bool:
    """Say whether any source gives samples of different lengths, which a batch has to pad.

    Args:
        sources: what is trained on.
        options: of samples.
    """
    return options is not None or any(source.process_fn is not None for source in sources)
