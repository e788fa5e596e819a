"""Runs many cases in the same two processes: `python -m tests.guard_worker CASES RESULTS`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from sat_lightning.errors import NonFiniteError
from sat_lightning.training import SATDeepSpeedStrategy, SkipNonFinite, ZeroOptions
from sat_lightning.training.deepspeed import load_deepspeed
from tests.guard_examples import StateAtEnd, Stranger, differing, fit, make_batches, make_guarded_task


def half_arguments(name: str) -> dict[str, Any]:
    """The Trainer's for fp16 with a loss scale of 256 that doubles after three good steps.

    Lightning and DeepSpeed take 16-mixed for GPUs alone: torch computes in it on any CPU, if slowly.
    """
    if not name.startswith("zero"):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        return {"strategy": name, "plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    load_deepspeed("cpu").accelerator.get_accelerator().is_fp16_supported = lambda: True
    options = ZeroOptions(initial_scale_power=8, loss_scale_window=3, hysteresis=1)
    return {"strategy": SATDeepSpeedStrategy(int(name[5]), options=options), "precision": "16-mixed"}


def run_case(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Train with batches that are bad on one rank, and without them, and compare what is left."""
    bad, dropped, num_batches = case["bad"], case["dropped"], case["num_batches"]
    name, is_half = case["strategy"], case["precision"] == "16-mixed"
    states, counts, steps = [], [], []
    for is_seen in (True, False):
        batches = make_batches(num_batches, bad if rank == case.get("bad_rank", 1) else (), case["what"], rank)
        if not is_seen:
            batches = [batch for number, batch in enumerate(batches) if number not in dropped]
        guard, at_end = SkipNonFinite(max_fraction=0.9), StateAtEnd()
        trainer = fit(
            Stranger(has_spare="unused" in name) if case["module"] == "stranger" else make_guarded_task(),
            batches,
            folder,
            callbacks=[guard, at_end],
            devices=2,
            **half_arguments(name) if is_half else {"strategy": name, "precision": case["precision"]},
            accumulate_grad_batches=case["accumulate"],
            gradient_clip_val=0.5,
            use_distributed_sampler=False,
        )
        states.append(at_end.state)
        counts.append(guard.num_skipped)
        steps.append(trainer.global_step)
    is_finite = all(value.isfinite().all() for value in states[0].values() if hasattr(value, "isfinite"))
    scales = [state["loss_scale"] for state in states]
    found = {"differing": differing(*states), "counts": counts, "steps": steps, "is_finite": bool(is_finite)}
    return found | {"scales": scales}


def run_to_the_end(case: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Train until too much is bad on one rank, and tell what each rank says."""
    batches = make_batches(6, (1, 2) if rank == 1 else (), case["what"], rank)
    guard = SkipNonFinite(max_consecutive=2, diagnose=True)
    try:
        fit(
            Stranger(),
            batches,
            folder / str(rank),
            callbacks=guard,
            devices=2,
            strategy=case["strategy"],
            use_distributed_sampler=False,
        )
    except NonFiniteError as error:
        return {"said": str(error), "files": sorted(path.name for path in (folder / str(rank)).glob("*"))}
    return {"said": ""}


def main(cases: Path, results: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {}
    for case in json.loads(cases.read_text()):
        try:
            run = run_to_the_end if case["name"].startswith("end") else run_case
            found[case["name"]] = run(case, rank, results.parent)
        except Exception:  # the others are still worth running
            found[case["name"]] = {"error": traceback.format_exc()}
    results.with_suffix(f".{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
