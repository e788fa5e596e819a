"""Changes of layout between our tensors and those of Hugging Face, each with its exact inverse (see `model.keymap`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Sizes = Callable[[Any], Sequence[int]]
"""Reads sizes from the family's configuration."""


class Transform(Protocol):
    """A change of layout of the tensors of one rule, and its exact inverse."""

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Turn their tensors of a group into ours."""

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Turn our tensors of a group into theirs."""


@dataclass(frozen=True)
class Same:
    """The tensors as they are, one for one."""

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Return them."""
        return list(tensors)

    to_hf = from_hf


@dataclass(frozen=True)
class Transpose:
    """Two axes exchanged in every tensor that has them (the bias beside a transposed weight stays)."""

    dim0: int = 0
    dim1: int = 1

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Exchange the axes."""
        return [t.transpose(self.dim0, self.dim1) if t.dim() > max(self.dim0, self.dim1) else t for t in tensors]

    to_hf = from_hf


@dataclass(frozen=True)
class Fused:
    """Several of theirs, one of ours: joined along an axis.

    Args:
        sizes: how much of the axis each of theirs has, in order.
        dim: the axis.
    """

    sizes: Sizes
    dim: int = 0

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Join."""
        return [torch.cat(list(tensors), dim=self.dim)]

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Split."""
        return list(tensors[0].split(list(self.sizes(config)), dim=self.dim))


@dataclass(frozen=True)
class Stacked:
    """Several of theirs, one of ours: as entries of a new axis (and `Inverse(Stacked())` the other way round)."""

    dim: int = 0

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Stack."""
        return [torch.stack(list(tensors), dim=self.dim)]

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Take apart."""
        return list(tensors[0].unbind(self.dim))


@dataclass(frozen=True)
class Copies:
    """One of theirs, several names of ours for the same tensor."""

    count: int = 2

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Give each name the tensor."""
        return [tensors[0]] * self.count

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Take the first; who writes checks that the others are equal."""
        return [tensors[0]]


@dataclass(frozen=True)
class Squeeze:
    """Theirs has an axis of size 1 that ours lacks (`[1, P, h]` and `[P, h]`).

    Args:
        *dims: the axes in theirs, ascending: removed from the last to the first.
    """

    dims: tuple[int, ...]

    def __init__(self, *dims: int) -> None:
        object.__setattr__(self, "dims", dims or (0,))

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Remove the axes."""
        return [t.reshape([size for dim, size in enumerate(t.shape) if dim not in self.dims]) for t in tensors]

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Put them back."""
        result = []
        for tensor in tensors:
            for dim in self.dims:
                tensor = tensor.unsqueeze(dim)
            result.append(tensor)
        return result


@dataclass(frozen=True)
class Reordered:
    """The entries of an axis in another order.

    Args:
        order: for each entry of ours, which of theirs it is.
        dim: the axis.
    """

    order: Callable[[Any], Tensor]
    dim: int = 0

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Reorder."""
        order = self.order(config)
        return [tensor.index_select(self.dim, order) for tensor in tensors]

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Restore the order."""
        order = torch.argsort(self.order(config))
        return [tensor.index_select(self.dim, order) for tensor in tensors]


def rotary_halves_from_pairs(num_heads: int, head_size: int, rotary_dim: int | None = None) -> Tensor:
    """Return the order of rows that turns rotated neighbours (2j, 2j+1) into rotated halves (j, j + dim/2).

    For `Reordered`, where theirs interleaves and ours does not; `Inverse(Reordered(...))` where it is the other way.

    Args:
        num_heads: heads of the projection.
        head_size: rows of a head.
        rotary_dim: rows of a head that are rotated, from the first. Default: all.

    Returns:
        `[num_heads * head_size]` row numbers.
    """
    dim = head_size if rotary_dim is None else rotary_dim
    one = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2), torch.arange(dim, head_size)])
    return (torch.arange(num_heads)[:, None] * head_size + one).flatten()


def blocks_from_heads(num_heads: int, head_size: int, num_blocks: int = 3) -> Tensor:
    """Return the order of rows that turns `[q0 k0 v0 q1 k1 v1 ...]` into `[all q, all k, all v]`, for `Reordered`."""
    rows = torch.arange(num_heads * num_blocks * head_size)
    return rows.view(num_heads, num_blocks, head_size).transpose(0, 1).flatten()


@dataclass(frozen=True)
class Inverse:
    """A transform read backwards: `Inverse(Fused(...))` is one of theirs, several of ours."""

    transform: Transform

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Undo the inner transform."""
        return self.transform.to_hf(tensors, config)

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Do the inner transform."""
        return self.transform.from_hf(tensors, config)


@dataclass(frozen=True)
class Chain:
    """Transforms one after the other, in the order from theirs to ours."""

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform) -> None:
        object.__setattr__(self, "transforms", transforms)

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Apply all."""
        for transform in self.transforms:
            tensors = transform.from_hf(tensors, config)
        return list(tensors)

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Undo all, the last first."""
        for transform in reversed(self.transforms):
            tensors = transform.to_hf(tensors, config)
        return list(tensors)


@dataclass(frozen=True)
class Each:
    """A transform for each tensor of a group: `Each(Reordered(q), Reordered(k), Same())`."""

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform) -> None:
        object.__setattr__(self, "transforms", transforms)

    def from_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Apply to each its own."""
        return [t.from_hf([x], config)[0] for t, x in zip(self.transforms, tensors, strict=True)]

    def to_hf(self, tensors: Sequence[Tensor], config: Any) -> list[Tensor]:
        """Undo each its own."""
        return [t.to_hf([x], config)[0] for t, x in zip(self.transforms, tensors, strict=True)]
