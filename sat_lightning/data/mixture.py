"""Several sources as one stream of samples, in the proportions asked for: position -> (source, row), and no state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sat_lightning.data.order import derive_key, derive_keys, permute
from sat_lightning.data.schedule import Schedule
from sat_lightning.errors import DataError

Stop = Literal["first_exhausted", "all_exhausted", "never"]


@dataclass(frozen=True)
class Share:
    """How much of a mixture one source is: at most one of the three, none is a weight of 1."""

    weight: float | None = None
    """Scales the source's size: an epoch holds this many times its samples; 0.5 is half of them, each epoch others."""
    probability: float | None = None
    """Its fraction of the samples, whatever its size; if every source has one, they count relative to each other."""
    tokens: float | None = None
    """Its fraction of the tokens, relative to the other sources' `tokens`; every source has to have one."""

    @property
    def kind(self) -> str:
        """Which of the three is given."""
        given = [name for name in ("weight", "probability", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DataError(f"mixture: a source has both {given[0]} and {given[1]}. Keep one of them.")
        return given[0] if given else "weight"

    @property
    def amount(self) -> float:
        """Its value."""
        value: float | None = getattr(self, self.kind)
        return 1.0 if value is None else value


class Mixture:
    """An endless stream of samples of several sources, each in its exact share at every prefix (see `Schedule`).

    Each source is read in a keyed permutation of its own, new in each of its own epochs, which go on across the epochs
    of the mixture: a source of which half is taken shows its other half in the next epoch. What lies at a position
    follows from the position, the sizes, the shares and the seed alone; ranks, workers and batches play no part.

    Args:
        sizes: samples in each source.
        shares: how much of each; by default all of each, once an epoch.
        names: of the sources, for messages.
        stop: where an epoch of the mixture ends: before the first source would repeat a sample, when every source was
            shown whole, or never. Default: with weights alone after `weight * size` samples of each source, else
            `first_exhausted`.
        seed: chooses the permutations.
        block_size: so many consecutive positions are of one source, for batches of one source.
        mean_tokens: tokens per sample of each source; needed for shares by tokens.

    Raises:
        DataError: a source is empty, a share is not a positive number, or there are not as many shares as sources.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[Share] | None = None,
        names: Sequence[str] | None = None,
        stop: Stop | None = None,
        seed: int = 0,
        block_size: int = 1,
        mean_tokens: Sequence[float] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.names = list(names) if names is not None else [f"source {number}" for number in range(len(sizes))]
        self.shares = [Share()] * len(sizes) if shares is None else list(shares)
        self.seed = seed
        self.block_size = block_size
        self.mean_tokens = None if mean_tokens is None else list(mean_tokens)
        _check(self.sizes, self.shares, self.names)
        requested = _sample_shares(self.sizes, self.shares, self.mean_tokens, self.names)
        self.requested = [Fraction(share) for share in requested]
        self._schedule = Schedule(self.requested)
        self._offsets = np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))
        self._keys = [derive_key(seed, source) for source in range(len(sizes))]
        self.epoch_size = self._measure_epoch(stop)

    @property
    def max_deviation(self) -> float:
        """How far, in samples, a source is ever from its share, for a `block_size` of 1."""
        return self._schedule.max_deviation * self.block_size

    def __call__(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find what lies at positions of the stream.

        Args:
            positions: from 0 on, one dimension.

        Returns:
            The source and the row in it, for each position.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(self.sizes) == 1:
            owners, rows = np.zeros_like(positions), positions
        elif self.block_size == 1:
            owners, rows = self._schedule(positions)
        else:
            owners, blocks = self._schedule(positions // self.block_size)
            rows = blocks * self.block_size + positions % self.block_size
        rows = rows.copy()
        for source in np.unique(owners).tolist():
            chosen = np.flatnonzero(owners == source)
            epochs, indices = np.divmod(rows[chosen], self.sizes[source])
            first = epochs[0] if epochs.size else 0
            key = self._keys[source]
            keys = derive_key(self.seed, source, int(first)) if (epochs == first).all() else derive_keys(key, epochs)
            rows[chosen] = permute(indices, self.sizes[source], keys)
        return owners, rows

    def ids(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Find what lies at positions of the stream, the sources' rows numbered through.

        Args:
            positions: from 0 on, one dimension.

        Returns:
            Indices into `MixedRows`.
        """
        owners, rows = self(positions)
        return self._offsets[owners] + rows

    def counts(self, position: int) -> list[int]:
        """Count the samples of each source before a position.

        Args:
            position: of the stream.

        Returns:
            One count for each source.
        """
        blocks, rest = divmod(position, self.block_size)
        counts = [count * self.block_size for count in self._schedule.counts(blocks)]
        if rest:
            counts[int(self._schedule(np.array([blocks]))[0][0])] += rest
        return counts

    def epochs(self, position: int) -> list[float]:
        """Say how often each source was gone through before a position.

        Args:
            position: of the stream.

        Returns:
            Epochs, with fractions, of each source.
        """
        return [count / size for count, size in zip(self.counts(position), self.sizes, strict=True)]

    def _measure_epoch(self, stop: Stop | None) -> int | None:
        block = self.block_size
        if stop is None and all(share.kind == "weight" for share in self.shares):
            size = sum(_exact(share.amount) * size for share, size in zip(self.shares, self.sizes, strict=True))
            return max(1, round(size / block)) * block
        if stop == "never":
            return None
        pairs = list(zip(self.sizes, self.requested, strict=True))
        total = sum(self.requested)
        reach = int(max(size / (share / total) for size, share in pairs)) + 4 * block
        if stop == "all_exhausted":
            return block * _first(
                lambda blocks: all(n >= size for n, size in zip(self.counts(blocks * block), self.sizes, strict=True)),
                2 * reach // block,
            )
        exceeds = _first(
            lambda blocks: any(n > size for n, size in zip(self.counts(blocks * block), self.sizes, strict=True)),
            2 * reach // block,
        )
        return max(1, exceeds - 1) * block


def _check(sizes: list[int], shares: list[Share], names: list[str]) -> None:
    if not sizes:
        raise DataError("mixture: there is no source. Give at least one.")
    if not len(sizes) == len(shares) == len(names):
        raise DataError(
            f"mixture: {len(shares)} shares and {len(names)} names for {len(sizes)} sources. Give each source one."
        )
    for name, size, share in zip(names, sizes, shares, strict=True):
        if size < 1:
            raise DataError(f"mixture: {name} is empty: it has {size} samples. Give it data, or remove it.")
        if not (isfinite(share.amount) and share.amount > 0):
            raise DataError(
                f"mixture: the {share.kind} of {name} is {share.amount}. Give a number above 0, or remove the source."
            )


def _sample_shares(
    sizes: list[int], shares: list[Share], mean_tokens: list[float] | None, names: list[str]
) -> list[Fraction]:
    """What fraction of the samples each source is."""
    kinds = {share.kind for share in shares}
    amounts = [_exact(share.amount) for share in shares]
    if kinds == {"tokens"}:
        if mean_tokens is None:
            raise DataError("mixture: shares by tokens need the mean tokens per sample of each source.")
        for name, mean in zip(names, mean_tokens, strict=True):
            if not mean > 0:
                raise DataError(f"mixture: {name} has {mean:g} tokens in its samples. Give it data, or remove it.")
        amounts = [amount / _exact(mean) for amount, mean in zip(amounts, mean_tokens, strict=True)]
    elif "tokens" in kinds:
        raise DataError("mixture: some sources have tokens and some have not. Give tokens to every source or to none.")
    elif kinds == {"weight"}:
        amounts = [amount * size for amount, size in zip(amounts, sizes, strict=True)]
    elif kinds == {"weight", "probability"}:
        given = sum(amount for amount, share in zip(amounts, shares, strict=True) if share.kind == "probability")
        if given >= 1:
            raise DataError(
                f"mixture: the probabilities given sum to {float(given)}, which leaves nothing for the sources without "
                "one. Give a probability to every source, or lower them to a sum below 1."
            )
        weighted = [0 if s.kind == "probability" else a * n for a, s, n in zip(amounts, shares, sizes, strict=True)]
        rest = Fraction(sum(weighted))
        amounts = [(1 - given) * w / rest if w else a for a, w in zip(amounts, weighted, strict=True)]
    total = sum(amounts)
    return [amount / total for amount in amounts]


def _exact(number: float) -> Fraction:
    """The decimal number that was written: 0.1 is a tenth, not the nearest binary fraction."""
    return Fraction(repr(float(number))) if number == number else Fraction(0)


def _first(holds: Callable[[int], bool], bound: int) -> int:
    """The least number from 1 to a bound for which something holds that stays true once it is."""
    low, high = 0, max(1, bound)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
