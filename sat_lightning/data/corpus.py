"""What to train on and what to measure on: paths and datasets in, the rows of every split out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from sat_lightning.data import machine as _machine  # noqa: F401 - registers its sources
from sat_lightning.data.entries import WeightedPath
from sat_lightning.data.lengths import token_lengths
from sat_lightning.data.mixed import MixedRows, Rows, mean_tokens
from sat_lightning.data.mixture import Mixture, Share, Stop
from sat_lightning.data.packing import PackedTokens
from sat_lightning.data.preparation import prepare_store
from sat_lightning.data.rowsamples import SampleOptions, SampleReading, check_rows
from sat_lightning.data.sources import SourceOptions, open_source
from sat_lightning.data.split import RowSpans, split_rows, split_spans
from sat_lightning.data.store import TokenStore
from sat_lightning.data.tokenizer import Tokenizer
from sat_lightning.errors import DataError, nearest


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

    samples: SampleOptions | None = None
    """How rows become samples of their own; None where text runs together."""

    def prepare(self, source: WeightedPath, needs_lengths: bool = False) -> None:
        """Do in one process what later ones find in the cache: tokens, indices, copies of remote files, lengths.

        Args:
            source: what is going to be opened.
            needs_lengths: the tokens of every sample are going to be asked for.
        """
        if not self._is_of_samples(source):
            self.open_store(source)
        elif source.dataset is None:
            rows = self._of_samples.open(source)
            if needs_lengths or (self.samples is not None and self.samples.pack):
                token_lengths(rows)

    def open_store(self, source: WeightedPath) -> TokenStore:
        """Open the tokens of a path, and prepare them first if need be.

        Args:
            source: text or tokens; its `options` go before those of all.

        Returns:
            The store.

        Raises:
            DataError: an option is unknown.
        """
        given, known = dict(source.options or {}), [field.name for field in fields(SourceOptions)]
        for key in given:
            if key not in known:
                raise DataError(
                    f"data: options of {source.name or source.path} has no '{key}', only {', '.join(known)}."
                    f"{nearest(key, known)}"
                )
        options = replace(self.options, **given)
        return prepare_store(open_source(source.path, options), self.tokenizer, self.cache_dir)

    def open_splits(self, source: WeightedPath, fractions: dict[str, float], seed: int) -> dict[str, Rows]:
        """Open a source and divide it.

        Args:
            source: text, tokens or samples.
            fractions: of `validation` and `test`.
            seed: chooses what is held out.

        Returns:
            The rows of `train`, and of the splits that were asked for.

        Raises:
            DataError: the source is empty, or too short for a row.
        """
        if self._is_of_samples(source):
            rows = check_rows(self._of_samples.open(source))  # type: ignore[arg-type]
            spans = split_rows(rows, **fractions, seed=seed) if any(fractions.values()) else None
            parts = (
                {"train": rows} if spans is None else {name: RowSpans(rows, own) for name, own in spans.items() if own}
            )
            return {name: self._of_samples.pack(part) for name, part in parts.items()}
        store = self.open_store(source)
        spans = split_spans(store, **fractions, seed=seed)
        return {
            name: self._pack(store, name, ranges, keep_incomplete=name != "train")
            for name, ranges in spans.items()
            if ranges
        }

    def open_all(
        self,
        sources: Sequence[WeightedPath],
        own: dict[str, dict[str, WeightedPath]],
        fractions: dict[str, float],
        seed: int,
    ) -> dict[str, dict[str, Rows]]:
        """Open every split of everything.

        Args:
            sources: what to train on, and to hold fractions out of.
            own: sources of their own for `validation` and `test`, by name.
            fractions: of `validation` and `test`.
            seed: chooses what is held out.

        Returns:
            For each split there is its rows by name.
        """
        splits: dict[str, dict[str, Rows]] = {"train": {}}
        for source in sources:
            for split, rows in self.open_splits(source, fractions, seed).items():
                splits.setdefault(split, {})[str(source.name)] = rows
        for split, sources_of_split in own.items():
            if sources_of_split:
                splits[split] = {name: self.open_whole(source, split) for name, source in sources_of_split.items()}
        return splits

    def open_whole(self, source: WeightedPath, split: str) -> Rows:
        """Open a source of its own for a split.

        Args:
            source: text, tokens or samples.
            split: what it is for.

        Returns:
            All its rows.
        """
        if self._is_of_samples(source):
            return self.open_splits(source, {}, 0)["train"]
        store = self.open_store(source)
        return self._pack(store, split, [(0, len(store))], keep_incomplete=True)

    def _is_of_samples(self, source: WeightedPath) -> bool:
        return self.samples is not None or source.has_own_samples

    @property
    def _of_samples(self) -> SampleReading:
        return SampleReading(self.tokenizer, self.sequence_length, self.samples, self.options, self.cache_dir)

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
