"""What tells two bases apart: SHA-256 over names, types, shapes and bytes of tensors, in the order of the names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def hash_content(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors.

    Args:
        tensors: by name, each whole.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(with_constants(tensors), key=lambda item: item[0]):
        add_tensor(digest, name, tensor, tuple(tensor.shape))
    return digest.hexdigest()


def with_constants(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, and behind one of 4 bits what it cannot be read without, by its name in a state dict.

    Args:
        tensors: parameters, or the like.
    """
    for name, tensor in tensors:
        yield name, tensor
        if (state := getattr(tensor, "quant_state", None)) is not None:
            yield from ((f"{name}.{key}", constant) for key, constant in state.as_dict(packed=True).items())


def add_tensor(digest: Any, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Add the next tensor in the order of the names.

    Args:
        digest: of `hashlib`.
        name: its name.
        tensor: its values.
        shape: its shape, which it may have lost.
    """
    digest.update(f"{name} {tensor.dtype} {list(shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
