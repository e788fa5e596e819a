"""Who sees which row: a keyed permutation, and the order of evaluation over ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DistributedSampler

PADDING_ROW = -1
"""The index a rank is handed when the rows do not divide by the ranks: a row of which every target is ignored."""

# Six rounds mix halves of a thousand values and more; small halves have few round functions and need more of them to
# give every order of a handful of rows the same chance (chi-squared over all orders of 3 to 6 rows).
_NUM_ROUNDS = 6
_NUM_ROUNDS_SMALL = 24
_SMALL_LENGTH = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(value: Any) -> Any:  # noqa: ANN401 - a Python int or an array of uint64
    """The finalizer of splitmix64: every input bit moves every output bit."""
    if isinstance(value, int):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Fold integers (a seed, an epoch, a source's number) into one 64-bit key.

    Args:
        *parts: integers of any size and sign; their order matters.

    Returns:
        A key for `permute`.
    """
    key = 0
    for part in parts:
        key = _mix((key + _GOLDEN + (part & _MASK)) & _MASK)
    return key


def derive_keys(key: int, parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Fold one more integer each into a key: `derive_key(a, b, c)` for many `c` is `derive_keys(derive_key(a, b), c)`.

    Args:
        key: what `derive_key` made of the integers before.
        parts: the last integers.

    Returns:
        Keys for `permute`, of the shape of `parts`.
    """
    return np.asarray(_mix(parts.astype(np.uint64) + np.uint64((key + _GOLDEN) & _MASK)))


def _encipher(
    values: NDArray[np.uint64], left_size: int, right_size: int, keys: np.uint64 | NDArray[np.uint64], num_rounds: int
) -> NDArray[np.uint64]:
    """One pass of the generalized Feistel network over `range(left_size * right_size)`."""
    sizes = (np.uint64(left_size), np.uint64(right_size))
    right, left = np.divmod(values, sizes[0])
    halves = [left, right]
    with np.errstate(over="ignore"):
        for number in range(num_rounds):
            changed = number % 2
            # The half that is not changed decides the step, so the round can be undone: it is a bijection.
            keys = keys + np.uint64(_GOLDEN)
            step = _mix(halves[1 - changed] + _mix(keys)) % sizes[changed]
            halves[changed] += step
            halves[changed] -= np.where(halves[changed] >= sizes[changed], sizes[changed], np.uint64(0))
    return halves[1] * sizes[0] + halves[0]


def permute(index: ArrayLike, length: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Send positions through a keyed permutation of `range(length)`, in O(1) time and memory per position.

    A generalized Feistel network over two nearly equal factors whose product just covers `length`; what falls
    outside walks its cycle until it is inside. Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002), methods 2 and 3.

    Args:
        index: positions, each in `range(length)`, any shape.
        length: size of the permuted range, 1 up to 2**62.
        key: which permutation, see `derive_key`; or one for each position, of the shape of `index`.

    Returns:
        The permuted positions, int64, of the shape of `index`.

    Raises:
        ValueError: a position lies outside `range(length)`.
    """
    positions = np.asarray(index, dtype=np.int64).ravel()
    if positions.size and (positions.min() < 0 or positions.max() >= length):
        raise ValueError(f"permute: positions {positions.min()} to {positions.max()} are not all in range({length}).")
    root = int(np.ceil(np.sqrt(length)))
    sizes = (root, -(-length // root))
    num_rounds = _NUM_ROUNDS_SMALL if length < _SMALL_LENGTH else _NUM_ROUNDS
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64).ravel(), positions.shape if np.ndim(key) else (1,))
    values = _encipher(positions.astype(np.uint64), *sizes, keys, num_rounds)
    while (outside := np.flatnonzero(values >= np.uint64(length))).size:
        own_keys = keys[outside] if keys.size > 1 else keys
        values[outside] = _encipher(values[outside], *sizes, own_keys, num_rounds)
    return values.astype(np.int64).reshape(np.shape(index))


class ShardedOrder(DistributedSampler):
    """Rows as they lie, dealt round-robin to the ranks, none lost and none repeated: short ranks get `PADDING_ROW`.

    It is a `DistributedSampler` so that trainers see that it shards by itself and do not wrap it a second time.

    Args:
        length: number of rows.
        num_replicas: number of ranks.
        rank: this process, from 0.
    """

    def __init__(self, length: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        for row in range(self.rank, self.total_size, self.num_replicas):
            yield row if row < self.length else PADDING_ROW
