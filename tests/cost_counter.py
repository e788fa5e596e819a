"""Counts what a training step makes ranks wait for: collective operations, and reads of tensors by this package."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from sat_lightning.training import finite

OURS = str(Path(finite.__file__).parents[1])
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce", "barrier", "gather")
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class StepCosts(L.Callback):
    """Counts from the start of one batch to the start of another."""

    def __init__(self, first: int = 5, last: int = 15) -> None:
        self.first, self.last = first, last
        self.is_on = False
        self.collectives: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.is_on = True
        if batch_idx == self.last:
            self.is_on = False

    def per_step(self, counts: Counter[str]) -> dict[str, float]:
        return {name: number / (self.last - self.first) for name, number in counts.items()}


@contextmanager
def counting(costs: StepCosts) -> Iterator[StepCosts]:
    """Count inside a `with`; as on a device, where a tensor lies that would have to be waited for."""
    undo: list[tuple[Any, str, Any]] = [(finite, "_lies_on_host", finite._lies_on_host)]
    finite._lies_on_host = lambda number: False

    def replace(owners: list[Any], name: str, counts: Counter[str], is_told: Callable[[str], bool]) -> None:
        original = getattr(owners[0], name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if costs.is_on and is_told(caller.co_filename):
                counts[f"{name} in {Path(caller.co_filename).stem}.{caller.co_name}"] += 1
            return original(*args, **kwargs)

        for owner in owners:
            undo.append((owner, name, original))
            setattr(owner, name, counted)

    for name in COLLECTIVES:
        replace([distributed_c10d, torch.distributed], name, costs.collectives, lambda file: True)
    for name in READS:
        replace([Tensor], name, costs.reads, lambda file: file.startswith(OURS))
    try:
        yield costs
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)
