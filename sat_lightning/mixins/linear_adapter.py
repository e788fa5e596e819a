"""What is learnt about one linear, and what every kind of it needs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.mixins.places import Place, Slot

Kept = tuple[Tensor, Tensor | None]


class Adapter(nn.Module):
    """What is learnt about one linear.

    Args:
        place: the linear.
        slots: its adapted rows.
    """

    def __init__(self, place: Place, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.place_name, self.slots, self.is_table = place.name, tuple(slots), isinstance(place.module, nn.Embedding)
        self.in_features, self.out_features = place.in_features, place.out_features

    @abstractmethod
    def merged(self, weight: Tensor, bias: Tensor | None, scale: float) -> Kept:
        """Return the weight `[out, in]` and the bias that do in fp32 what base and adapter do."""

    def reset(self, module: nn.Module) -> None:
        """Set initial values that depend on the trained base."""


def learned(place: Place, *shape: int) -> nn.Parameter:
    """Return an empty parameter on the device of a linear; never below fp32, unless that is torch's default."""
    weight: Any = place.module.weight
    is_wide = weight.dtype in (torch.float32, torch.float64)
    dtype = weight.dtype if is_wide else torch.get_default_dtype()
    return nn.Parameter(torch.empty(*shape, device=weight.device, dtype=dtype))


@contextmanager
def whole(*parameters: Any) -> Iterator[None]:  # noqa: ANN401
    """Have parameters whole that ZeRO-3 has split over the ranks, to read and to fill; every rank must come here."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    for parameter in split:
        parameter.all_gather()
    try:
        yield
    finally:
        for parameter in split:
            parameter.partition(has_been_updated=True)


def rows_of(kw: Mapping[str, Any], own: int | None, name: str, x: Tensor) -> Tensor | None:
    """Return 1 for the samples of a batch that a method is for, 0 for others, to be multiplied with `x`-like tensors.

    Args:
        kw: keywords of the hook; `adapter_ids` `[b]` may be among them, a tensor or numbers.
        own: number of the method.
        name: what it adapts, for messages.
        x: what that reads.

    Returns:
        As many axes as `x`; None where samples are not told apart.

    Raises:
        ConfigError: where samples cannot be told apart.
        InputError: if they are not as many as the numbers.
    """
    if kw.get("adapter_ids") is None:
        return None
    if own is None:
        raise ConfigError(f"{name}: its method has no number. Its class's own added_to has to call super().added_to.")
    adapter_ids = torch.as_tensor(kw["adapter_ids"], device=x.device)
    if x.dim() < 3:
        raise ConfigError(
            f"adapter_ids tells samples apart, and {name} reads {list(x.shape)}, without an axis of "
            "samples (tokens of an expert have none). Leave such linears out of target."
        )
    unpadding, num_rows = kw.get("unpadding"), x.shape[0]
    is_unpadded = unpadding is not None and x.shape[:2] == (1, len(unpadding.token_indices))
    if is_unpadded:
        num_rows = unpadding.batch_size
    if adapter_ids.shape != (num_rows,):
        raise InputError(
            f"adapter_ids has the shape {list(adapter_ids.shape)}, and {name} reads {list(x.shape)}: "
            f"give one number for each of the {num_rows} samples."
        )
    if is_unpadded:
        return (adapter_ids[unpadding.token_indices // unpadding.length] == own)[None, :, None]
    return (adapter_ids == own).view(-1, *[1] * (x.dim() - 1))


def of_own_rows(change: Tensor, kw: Mapping[str, Any], own: int | None, name: str) -> Tensor:
    """Return what a method adds, `[b, s, c]`, with 0 for the samples that it is not for; see `rows_of`."""
    rows = rows_of(kw, own, name, change)
    return change if rows is None else change * rows


def check_patterns(patterns: Mapping[str, Any], used: set[str], option: str) -> None:
    """Refuse patterns that no adapted linear matched."""
    if unused := [text for text in patterns if text not in used]:
        raise ConfigError(f"{option}: '{unused[0]}' matches no linear that `target` chose.")
