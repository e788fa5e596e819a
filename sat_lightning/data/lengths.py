"""How many tokens every row has: known at once where rows are alike, counted once and kept in the cache where not."""

import hashlib
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sat_lightning.data.remote import CacheDir, cached_file
from sat_lightning.errors import DataError

_NUM_ROWS = 1024


def token_lengths(rows: Any) -> NDArray[np.integer[Any]]:  # noqa: ANN401 - Rows, or a user's own
    """Tell the tokens of every row.

    Args:
        rows: a source that says so itself by `token_lengths()`, by its `sequence_length` if all its rows are alike, or
            by `num_tokens(index)`.

    Returns:
        One number for each row.

    Raises:
        DataError: the source does not say.
    """
    own = getattr(rows, "token_lengths", None)
    if callable(own):
        return np.asarray(own())
    if hasattr(rows, "sequence_length"):
        return np.broadcast_to(np.int64(rows.sequence_length), (len(rows),))
    name = getattr(rows, "name", type(rows).__name__)
    if not callable(getattr(rows, "num_tokens", None)):
        raise DataError(
            f"data: {name} does not tell how many tokens a row has, which shares by tokens, bucket_size and max_tokens "
            "need. Give it num_tokens(index) or token_lengths(), or do without them."
        )
    progress = tqdm(range(len(rows)), desc=f"measuring {name}", unit="row", unit_scale=True, disable=None)
    return np.fromiter((rows.num_tokens(row) for row in progress), dtype=np.int64, count=len(rows))


def tells_lengths(rows: Any) -> bool:  # noqa: ANN401 - Rows, or a user's own
    """Say whether the tokens of a row can be told without reading it.

    Args:
        rows: a source.
    """
    known = getattr(rows, "knows_lengths", None)
    if known is not None:
        return bool(known)
    return any(callable(getattr(rows, how, None)) for how in ("token_lengths", "num_tokens")) or hasattr(
        rows, "sequence_length"
    )


def count_lengths(rows: Any, name: str, key: str | None, cache_dir: CacheDir) -> NDArray[np.int32]:  # noqa: ANN401
    """Count the `input_ids` of every row in one pass, or map what an earlier pass left in the cache.

    Args:
        rows: samples by number; None counts as 0 tokens.
        name: what the progress bar calls them.
        key: what identifies the samples; None for those that nothing identifies, which are counted anew.
        cache_dir: where counts are kept.

    Returns:
        One number for each row.
    """
    if key is None:
        counts = np.zeros(len(rows), dtype=np.int32)
        _count(rows, name, lambda start, found: counts.__setitem__(slice(start, start + len(found)), found))
        return counts

    def write(target: BinaryIO) -> None:
        _count(rows, name, lambda start, found: target.write(found.tobytes()))

    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = cached_file("tokens", f"{digest}.lengths", cache_dir, write)
    return np.memmap(file, dtype=np.int32, mode="r").view(np.ndarray)


def num_tokens_of(sample: Any, name: str) -> int:  # noqa: ANN401
    """Count the `input_ids` of a sample; of several choices those of all, with their padding.

    Args:
        sample: with `input_ids`.
        name: of its source, for messages.

    Raises:
        DataError: it has none.
    """
    if "input_ids" not in sample:
        raise DataError(
            f"data: bucket_size, max_tokens and shares by tokens count input_ids, and samples of {name} hold "
            f"{', '.join(sample)}. Do without them."
        )
    ids = sample["input_ids"]
    return prod(ids.shape) if hasattr(ids, "shape") else len(ids)


def _count(rows: Any, name: str, keep: Callable[[int, NDArray[np.int32]], Any]) -> None:  # noqa: ANN401
    gather = getattr(rows, "__getitems__", None)
    with tqdm(total=len(rows), desc=f"measuring {name}", unit="row", unit_scale=True, disable=None) as progress:
        for start in range(0, len(rows), _NUM_ROWS):
            numbers = list(range(start, min(start + _NUM_ROWS, len(rows))))
            samples = gather(numbers) if gather is not None else [rows[number] for number in numbers]
            found = [0 if sample is None else num_tokens_of(sample, name) for sample in samples]
            keep(start, np.array(found, dtype=np.int32))
            progress.update(len(numbers))
