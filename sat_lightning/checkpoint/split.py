"""Tensors that ZeRO-3 has split over the ranks: what shape they have as a whole, and what this rank holds."""

import torch
from torch import Tensor


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole tensor; where it is split, an empty shell stands here.

    Args:
        tensor: a parameter or a buffer.
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_split(tensor: Tensor) -> bool:
    """Tell whether the ranks hold a piece each.

    Args:
        tensor: a parameter or a buffer.
    """
    return hasattr(tensor, "ds_tensor")


def local_part(tensor: Tensor) -> tuple[int, Tensor]:
    """Return what this rank has of a tensor: where it begins in the flattened whole, and the piece, as a view.

    Args:
        tensor: a parameter or a buffer; contiguous, or split.
    """
    if not is_split(tensor):
        return 0, tensor.detach().reshape(-1)
    piece: Tensor = tensor.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
    start = piece.numel() * torch.distributed.get_rank(tensor.ds_process_group)  # type: ignore[attr-defined]
    return start, piece[: max(0, min(piece.numel(), tensor.ds_numel - start))]  # type: ignore[attr-defined]


def copy_into(tensor: Tensor, whole: Tensor) -> None:
    """Fill a tensor, or this rank's piece of it.

    Args:
        tensor: a parameter or a buffer, changed in place.
        whole: all of its values.
    """
    if is_split(tensor):
        start, piece = local_part(tensor)
        piece.copy_(whole.reshape(-1)[start : start + piece.numel()])
    if not is_split(tensor) or tensor.shape == whole.shape:  # ZeRO-3 keeps small ones whole beside their pieces
        tensor.copy_(whole)
