"""What the strategies are tried on; a family or a method of fine-tuning joins the matrix by a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from sat_lightning.training import LanguageModelingTask
from tests.training_examples import ScaleMixin, counting_rows, make_model, make_task, make_trainer

NUM_STEPS = 4
GLOBAL_BATCH_SIZE = 4
#: An epoch of 7 batches: the window of 3 that ends it is cut short.
NUM_ROWS = 28
CLIP = 0.5

SINGLE = "auto"
STRATEGIES = ("ddp", "zero_0", "zero_1", "zero_2", "zero_3")
PRECISIONS = ("32-true", "bf16-mixed")
ACCUMULATIONS = (1, 3)


def gpt2(**arguments: Any) -> LanguageModelingTask:
    return make_task(make_model, optim={"learning_rate": 1e-2, "betas": (0.9, 0.95)}, **arguments)


def gpt2_with_mixins() -> LanguageModelingTask:
    mixins = {"first": ScaleMixin, "second": ScaleMixin}
    return gpt2(mixins=mixins, trainable=[r"^mixins\.(first|second)\."])


FAMILIES: dict[str, Callable[[], LanguageModelingTask]] = {"gpt2": gpt2, "gpt2_with_mixins": gpt2_with_mixins}


@dataclass(frozen=True)
class Case:
    strategy: str
    precision: str = "32-true"
    accumulate: int = 1
    family: str = "gpt2"

    def __str__(self) -> str:
        return f"{self.strategy}-{self.precision}-x{self.accumulate}-{self.family}"

    def alone(self) -> Case:
        """The same in one process and in fp32: what every other case is held against."""
        return Case(SINGLE, "32-true", self.accumulate, self.family)


MATRIX = [Case(*values) for values in product(STRATEGIES, PRECISIONS, ACCUMULATIONS, FAMILIES)]


class Recorder(L.Callback):
    """Mean loss over the ranks of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone().float())
        self.losses.append(float(loss))


def share_of_rows(rank: int, num_ranks: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a rank, so that all ranks together see the batches that one process sees."""
    rows, share = counting_rows(NUM_ROWS), GLOBAL_BATCH_SIZE // num_ranks
    return [
        row
        for start in range(0, NUM_ROWS, GLOBAL_BATCH_SIZE)
        for row in rows[start + rank * share : start + (rank + 1) * share]
    ]


def make_loader(rank: int, num_ranks: int) -> DataLoader:
    return DataLoader(share_of_rows(rank, num_ranks), batch_size=GLOBAL_BATCH_SIZE // num_ranks)


def make_case_trainer(case: Case, num_ranks: int, **arguments: Any) -> L.Trainer:
    return make_trainer(
        **{"max_steps": NUM_STEPS, "devices": num_ranks, "strategy": case.strategy, "precision": case.precision}
        | {"accumulate_grad_batches": case.accumulate, "gradient_clip_val": CLIP, "use_distributed_sampler": False}
        | arguments
    )


def run_case(case: Case, num_ranks: int, rank: int) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    recorder = Recorder()
    trainer = make_case_trainer(case, num_ranks, callbacks=[recorder])
    task = FAMILIES[case.family]()
    trainer.fit(task, make_loader(rank, num_ranks))
    return {"losses": recorder.losses, "global_step": trainer.global_step}
