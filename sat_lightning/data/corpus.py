"""What to train on and what to measure on: paths and datasets in, the rows of every split out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sat_lightning.data import machine as _machine  # noqa: F401 - registers its sources
from sat_lightning.data.mixed import MixedRows, Rows, mean_tokens
from sat_lightning.data.mixture import Mixture, Share, Stop
from sat_lightning.data.packing import PackedTokens
from sat_lightning.data.preparation import prepare_store
from sat_lightning.data.sources import SourceOptions, open_source
from sat_lightning.data.split import RowSpans, split_rows, split_spans
from sat_lightning.data.store import TokenStore
from sat_lightning.data.tokenizer import Tokenizer
from sat_lightning.errors import DataError, nearest

Where = str | list[str] | Dataset[Any]


@dataclass(frozen=True)
class WeightedPath:
    """One source of a mixture, and how much of it; at most one of the three shares, see `Share`."""

    path: str | list[str] = ""
    """A file, folder, glob, scheme, or several of them."""
    name: str | None = None
    """What logs and messages call it; default the path's last part."""
    weight: float | None = None
    """Scales the source's size: an epoch holds this many times its samples."""
    probability: float | None = None
    """Its fraction of the samples."""
    tokens: float | None = None
    """Its fraction of the tokens, relative to the other sources' `tokens`."""
    dataset: Dataset[Any] | None = None
    """In the place of a path: a map-style dataset that gives ready samples."""

    @property
    def where(self) -> Where:
        """The dataset or the path."""
        return self.path if self.dataset is None else self.dataset


def list_sources(path: Where | Sequence[str | WeightedPath | Mapping[str, Any] | Dataset[Any]]) -> list[WeightedPath]:
    """Read what was given as training data: one source, or a mixture of several.

    Args:
        path: a path or dataset; a list of paths, which are one source; or a list with at least one `WeightedPath` (or
            a mapping with its fields, or a dataset) in it, of which every entry is a source.

    Returns:
        The sources, each with a name of its own.

    Raises:
        DataError: a mapping has a field that `WeightedPath` has not.
    """
    if isinstance(path, (str, Dataset)) or all(isinstance(entry, str) for entry in path):
        sources = [_read_entry(path)]
    else:
        sources = [_read_entry(entry) for entry in path]
    names: list[str] = []
    for source in sources:
        name = source.name or _name(source.where)
        others = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{others + 1}" if others else name)
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def named_paths(held_out: float | str | dict[str, str] | None) -> dict[str, str]:
    """List the paths of their own that validation or test have.

    Args:
        held_out: a fraction, a path, or several by name.

    Returns:
        Paths by name, which is empty for the only one; none for a fraction.
    """
    if isinstance(held_out, str):
        return {"": held_out}
    return held_out if isinstance(held_out, dict) else {}


def _read_entry(entry: Any) -> WeightedPath:
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(WeightedPath)]
        for key in entry:
            if key not in known:
                raise DataError(
                    f"data: a source of path has no field '{key}', only {', '.join(known)}.{nearest(str(key), known)}"
                )
        for key in ("weight", "probability", "tokens"):
            if not isinstance(entry.get(key), (int, float, type(None))):
                raise DataError(f"data: {key} of a source of path is {entry[key]!r}. Give a number above 0.")
        entry = WeightedPath(**entry)
    elif isinstance(entry, Dataset):
        entry = WeightedPath(dataset=entry)
    elif not isinstance(entry, WeightedPath):
        entry = WeightedPath(entry)
    if entry.dataset is None and not entry.path:
        raise DataError(f"data: a source has no path: {entry}. Say where its data is.")
    return entry


def _name(path: Where) -> str:
    if isinstance(path, str):
        return Path(path.removesuffix("://").rstrip("/")).stem or path
    return _name(path[0]) if isinstance(path, list) else str(getattr(path, "name", type(path).__name__))


@dataclass(frozen=True)
class Reading:
    """How paths become rows."""

    tokenizer: Tokenizer
    """Turns text into ids."""
    sequence_length: int
    """Tokens per row."""
    options: SourceOptions
    """How files are read."""
    cache_dir: str | None
    """Where prepared tokens are kept."""

    def open_store(self, path: str | list[str]) -> TokenStore:
        """Open the tokens of a path, and prepare them first if need be.

        Args:
            path: text or tokens.

        Returns:
            The store.
        """
        return prepare_store(open_source(path, self.options), self.tokenizer, self.cache_dir)

    def open_splits(self, path: Where, fractions: dict[str, float], seed: int) -> dict[str, Rows]:
        """Open a source and divide it.

        Args:
            path: text, tokens or a dataset.
            fractions: of `validation` and `test`.
            seed: chooses what is held out.

        Returns:
            The rows of `train`, and of the splits that were asked for.

        Raises:
            DataError: the source is empty, or too short for a row.
        """
        if isinstance(path, Dataset):
            return self._split_dataset(path, fractions, seed)
        store = self.open_store(path)
        spans = split_spans(store, **fractions, seed=seed)
        return {
            name: self._pack(store, name, ranges, keep_incomplete=name != "train")
            for name, ranges in spans.items()
            if ranges
        }

    def open_all(
        self, sources: Sequence[WeightedPath], own: dict[str, dict[str, str]], fractions: dict[str, float], seed: int
    ) -> dict[str, dict[str, Rows]]:
        """Open every split of everything.

        Args:
            sources: what to train on, and to hold fractions out of.
            own: paths of their own for `validation` and `test`, by name.
            fractions: of `validation` and `test`.
            seed: chooses what is held out.

        Returns:
            For each split there is its rows by name.
        """
        splits: dict[str, dict[str, Rows]] = {"train": {}}
        for source in sources:
            for split, rows in self.open_splits(source.where, fractions, seed).items():
                splits.setdefault(split, {})[str(source.name)] = rows
        for split, paths in own.items():
            if paths:
                splits[split] = {name: self.open_whole(path, split) for name, path in paths.items()}
        return splits

    def open_whole(self, path: Where, split: str) -> Rows:
        """Open a source of its own for a split.

        Args:
            path: text, tokens or a dataset.
            split: what it is for.

        Returns:
            All its rows.
        """
        if isinstance(path, Dataset):
            return self._split_dataset(path, {}, 0)["train"]
        store = self.open_store(path)
        return self._pack(store, split, [(0, len(store))], keep_incomplete=True)

    def _split_dataset(self, dataset: Dataset[Any], fractions: dict[str, float], seed: int) -> dict[str, Rows]:
        name = getattr(dataset, "name", type(dataset).__name__)
        if not isinstance(dataset, Rows):
            raise DataError(f"data: {name} has no length or rows by number. Give a map-style dataset, or a path.")
        if len(dataset) == 0:
            raise DataError(f"data: {name} is empty: it has 0 samples. Give it data, or remove it.")
        if not any(fractions.values()):
            return {"train": dataset}
        spans = split_rows(dataset, **fractions, seed=seed)
        return {name: RowSpans(dataset, ranges) for name, ranges in spans.items() if ranges}

    def _pack(self, store: TokenStore, split: str, spans: list[tuple[int, int]], keep_incomplete: bool) -> PackedTokens:
        rows = PackedTokens(store, self.sequence_length, spans, keep_incomplete)
        if len(rows) == 0:
            raise DataError(
                f"data: the {split} split of {store.name} has {rows.num_tokens} tokens, too few for one row "
                f"of sequence_length={self.sequence_length}, which takes {self.sequence_length + 1}. Give more "
                "text, or lower sequence_length."
            )
        return rows


def mix(sources: Sequence[WeightedPath], rows: MixedRows, stop: Stop | None, seed: int, block_size: int = 1) -> Mixture:
    """Make the mixture of opened sources.

    Args:
        sources: names and shares.
        rows: what they hold.
        stop: where an epoch ends.
        seed: of the orders.
        block_size: consecutive samples of one source.

    Returns:
        The mixture.
    """
    shares = [Share(source.weight, source.probability, source.tokens) for source in sources]
    is_by_tokens = all(share.kind == "tokens" for share in shares)
    return Mixture(
        [len(source) for source in rows.sources],
        shares,
        [source.name or "" for source in sources],
        stop,
        seed,
        block_size,
        [mean_tokens(source) for source in rows.sources] if is_by_tokens else None,
    )


def mean_bytes_per_token(named_rows: Mapping[str, Rows], name: str | None = None) -> float | None:
    """Return the bytes of text that a token stands for.

    Args:
        named_rows: sources or sets of a split.
        name: one of them; default all together.

    Returns:
        The mean over their tokens; None if one of them does not tell.
    """
    num_tokens, num_bytes = 0, 0.0
    for rows in named_rows.values() if name is None else [named_rows[name]]:
        if not isinstance(rows, PackedTokens) or rows.store.bytes_per_token is None:
            return None
        if len(named_rows) == 1 or name is not None:
            return rows.store.bytes_per_token
        num_tokens += rows.num_tokens
        num_bytes += rows.num_tokens * rows.store.bytes_per_token
    return num_bytes / num_tokens
