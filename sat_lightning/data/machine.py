"""Text that every machine with Python has, for recipes and tests that must not download any."""

import unicodedata
from collections.abc import Iterator
from importlib import import_module

from sat_lightning.data.sources import SourceOptions, register_source
from sat_lightning.errors import DataError

_LINES_PER_DOCUMENT = 64
_NUM_CODE_POINTS = 0x20000


@register_source("pydoc://")
def read_language_reference(path: str, options: SourceOptions) -> Iterator[str]:
    """Give the chapters of the language reference that `help()` shows: prose, half a megabyte.

    Args:
        path: unused.
        options: unused.

    Yields:
        Each chapter.

    Raises:
        DataError: this Python was installed without them.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError("pydoc://: this Python has no pydoc_data. Give a text of your own.") from error
    yield from (topics[name] for name in sorted(topics))


@register_source("unicode://")
def read_unicode_table(path: str, options: SourceOptions) -> Iterator[str]:
    """Give the table of Unicode characters as tab-separated values: code point, category and name, two megabytes.

    Args:
        path: unused.
        options: unused.

    Yields:
        Tables of 64 lines.
    """
    lines: list[str] = []
    for code in range(_NUM_CODE_POINTS):
        if name := unicodedata.name(chr(code), ""):
            lines.append(f"U+{code:04X}\t{unicodedata.category(chr(code))}\t{name}\n")
        if len(lines) == _LINES_PER_DOCUMENT:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)
