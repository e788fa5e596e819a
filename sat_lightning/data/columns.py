"""Documents that are the text field of rows: what is read by number can be pretrained on, too."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sat_lightning.data.formats import read_text, take_text
from sat_lightning.data.libraries import ArrowRecords, open_hub
from sat_lightning.data.records import Records, describe_row, open_records
from sat_lightning.data.samples import BadSampleError, BadSamples
from sat_lightning.data.sources import Document, NotTextError, SourceOptions, register_source

_NUM_ROWS = 1024


@register_source(".parquet", ".arrow", ".lmdb", ".tar")
def read_column(path: str, options: SourceOptions) -> Iterator[str]:
    """Read one document per row: its text field.

    Args:
        path: a file that `open_records` opens.
        options: `text_field` names the field; of a tar, that is an extension such as `txt`.

    Yields:
        The texts.

    Raises:
        DataError: the file cannot be read, or a row has no text in that field.
    """
    yield from _texts(_open(path, options), options)


@register_source(".csv", ".tsv")
def read_table(path: str, options: SourceOptions) -> Iterator[Document]:
    """Read one document per row of a table that has the text field as a column; any other is text as it stands.

    Args:
        path: the file.
        options: `text_field` names the column.

    Yields:
        The texts, or pieces of the file.

    Raises:
        DataError: a row cannot be parsed.
    """
    with open(path, "rb") as file:
        names = file.readline().replace(b"\t", b",").split(b",")
    if options.text_field.encode() in (name.strip(b'"\r\n\xef\xbb\xbf') for name in names):
        yield from _texts(_open(path, options), options)
    else:
        yield from read_text(path, options)


@register_source("hf://")
class HubDocuments:
    """The text field of a dataset of the Hugging Face hub.

    Args:
        path: as in `open_hub`.
        options: `text_field` names the column.
    """

    num_bytes = 0

    def __init__(self, path: str, options: SourceOptions) -> None:
        self.name = f"hf://{path}"
        self._path = path
        self._options = options
        self._records: ArrowRecords | None = None

    def __iter__(self) -> Iterator[str]:
        return _texts(self._open(), self._options)

    def fingerprint(self) -> str:
        """Of the dataset's content, as the library knows it, and the field."""
        return f"{self.name}-{self._open().dataset._fingerprint}-{self._options.fingerprint()}"

    def _open(self) -> ArrowRecords:
        if self._records is None:
            self._records = open_hub(self._path, cache_dir=self._options.cache_dir)
        return self._records


def _open(path: str, options: SourceOptions) -> Records:
    return open_records(path, **({} if options.cache_dir is None else {"cache_dir": options.cache_dir}))


def _texts(records: Records, options: SourceOptions) -> Iterator[str]:
    field, bad = options.text_field, BadSamples(records.name, options.on_bad_sample, options.max_bad_fraction)
    for start in range(0, len(records), _NUM_ROWS):
        numbers = range(start, min(start + _NUM_ROWS, len(records)))
        for number, read in zip(numbers, _read(records, numbers), strict=True):
            bad.count()
            row: Any = None
            try:
                row = read()
                text = take_text(row, field, partial(describe_row, records, number))
            except BadSampleError as error:
                if number == 0 and row is not None and field not in row:  # no text, and a folder may hold such a file
                    raise NotTextError(str(error)) from error
                bad.handle(error)
                continue
            yield text


def _read(records: Records, numbers: range) -> list[Callable[[], Any]]:
    """Rows, gathered at once where that can be, or else what reads each."""
    try:
        gather = getattr(records, "__getitems__", None)
        return (
            [partial(_same, row) for row in gather(list(numbers))]
            if gather is not None
            else _one_by_one(records, numbers)
        )
    except BadSampleError:  # one of them
        return _one_by_one(records, numbers)


def _one_by_one(records: Records, numbers: range) -> list[Callable[[], Any]]:
    return [partial(records.__getitem__, number) for number in numbers]


def _same(row: Any) -> Any:  # noqa: ANN401 - a row is what its source holds
    return row
