"""Exact means over batches of unequal weight, over ranks too."""

from collections.abc import Iterable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from sat_lightning.training.finite import sum_over_ranks


class WeightedMeans:
    """Means by name, kept as sums on the device: adding costs no synchronisation, reading one all-reduce.

    A batch of weight 0 adds nothing, even if its value is NaN (the mean over no targets).
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._agreed: list[str] = []  # names that the ranks averaged the last time

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """Add one batch.

        Args:
            values: scalars, means over the batch, by name.
            weight: scalar, how much the batch counts, for example its number of targets.
        """
        for name, value in values.items():
            # float64 so that sums over millions of targets stay exact; Apple's devices have none.
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            count = weight.to(value.device, dtype)
            total = torch.where(count > 0, value.detach().to(dtype) * count, 0.0)
            old_total, old_count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + total, old_count + count)

    @classmethod
    def union(cls, parts: Iterable["WeightedMeans"]) -> "WeightedMeans":
        """Put the batches of several together.

        Args:
            parts: left as they are.

        Returns:
            The means over all of them.
        """
        whole = cls()
        for part in parts:
            for name, (total, count) in part._sums.items():
                old_total, old_count = whole._sums.get(name, (0.0, 0.0))
                whole._sums[name] = (old_total + total, old_count + count)
        return whole

    def pop(self, strategy: Strategy) -> dict[str, Tensor]:
        """Return the means over all ranks, and forget everything.

        Args:
            strategy: of the trainer; every rank has to call this.

        Returns:
            A float32 scalar for each name; NaN where nothing had weight.
        """
        sums, self._sums = self._sums, {}
        # Ranks may have seen different names, or no batch at all: rank 0 says what is averaged, when that changes.
        is_alone = getattr(strategy, "world_size", 1) == 1
        self._agreed = list(sums) if is_alone else self._agreed
        totals, is_new = self._add_up(sums, strategy, strategy.is_global_zero and list(sums) != self._agreed)
        if not is_alone and is_new:
            self._agreed = strategy.broadcast(list(sums))
            totals, _ = self._add_up(sums, strategy, False)
        values, counts = totals.view(-1, 2).unbind(1)
        return dict(zip(self._agreed, (values / counts).float(), strict=True))

    def _add_up(
        self, sums: dict[str, tuple[Tensor, Tensor]], strategy: Strategy, is_new: bool
    ) -> tuple[Tensor, Tensor]:
        """Add up, over all ranks, sums and weights of the names agreed on, and whether these are to be others now."""
        device = strategy.root_device
        nothing = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        parts = [part.to(device) for name in self._agreed for part in sums.get(name, (nothing, nothing))]
        whole = sum_over_ranks(torch.stack([*parts, torch.full_like(nothing, float(is_new))]), strategy)
        return whole[:-1], whole[-1]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the sums and weights so far, by name; they are never changed in place."""
        return {name: list(sums) for name, sums in self._sums.items()}

    def load_state_dict(self, state_dict: dict[str, list[Tensor]]) -> None:
        """Go on from sums that were saved.

        Args:
            state_dict: what `state_dict` gave.
        """
        self._sums = {name: (total, count) for name, (total, count) in state_dict.items()}
