"""Counts the costs of many runs in the same two processes: `python -m tests.cost_worker CASES RESULTS`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from sat_lightning.training import RunMonitor, SkipNonFinite
from tests.cost_counter import StepCosts, counting
from tests.guard_examples import fit, make_batches
from tests.training_examples import make_model, make_task

NUM_BATCHES = 16


class Minimal(L.LightningModule):
    """The least that Lightning can be given, with the parameter groups that a task of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["input_ids"], target_ids=batch["target_ids"])[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [[p for p in self.parameters() if (p.dim() > 1) is is_matrix] for is_matrix in (True, False)]
        return torch.optim.AdamW([{"params": group} for group in groups], 0.01)


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and tell what a step cost."""
    names = ("input_ids", "target_ids")
    batches = [{name: batch[name] for name in names} for batch in make_batches(NUM_BATCHES)]
    callbacks = {"minimal": [], "ours": [], "guarded": [SkipNonFinite(), RunMonitor()]}[case["what"]]
    costs = StepCosts()
    with counting(costs):
        fit(
            Minimal() if case["what"] == "minimal" else make_task(),
            batches,
            folder,
            callbacks=[*callbacks, costs],
            devices=2,
            strategy=case["strategy"],
            precision=case.get("precision", "32-true"),
            accumulate_grad_batches=case.get("accumulate", 1),
            gradient_clip_val=case.get("clip"),
            logger=CSVLogger(folder),
            log_every_n_steps=case.get("log_every", 1000),
            use_distributed_sampler=False,
        )
    return {"collectives": costs.per_step(costs.collectives), "reads": costs.per_step(costs.reads)}


def main(cases: Path, results: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {}
    for case in json.loads(cases.read_text()):
        try:
            found[case["name"]] = run_case(case, results.parent / str(rank))
        except Exception:  # the others are still worth running
            found[case["name"]] = {"error": traceback.format_exc()}
    results.with_suffix(f".{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
