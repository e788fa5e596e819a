"""Trains with `EMA` under every strategy in the same two processes: `python -m tests.ema_worker FOLDER quick`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sat_lightning.training import EMA, SATDeepSpeedStrategy, ZeroOptions
from sat_lightning.training.consolidation import save_consolidated
from sat_lightning.training.deepspeed import load_deepspeed
from tests.zero_cases import FAMILIES, Case, make_case_trainer, make_loader

NUM_RANKS, NUM_STEPS, SAVED_AT, DECAY = 2, 4, 2, 0.8
CASES = {
    "quick": [
        Case("ddp", "32-true", 1, "gpt2_with_mixins"),
        Case("zero_0", "bf16-mixed", 1, "gpt2"),
        Case("zero_2", "bf16-mixed", 1, "gpt2"),
        Case("zero_3", "bf16-mixed", 1, "gpt2"),
    ],
    "slow": [
        Case("zero_1", "32-true", 2, "gpt2"),
        Case("zero_2", "32-true", 1, "gpt2_with_mixins"),
        Case("zero_3", "32-true", 2, "gpt2_with_mixins"),
    ],
}

Weights = dict[str, torch.Tensor]


def whole_weights(module: L.LightningModule, *, precise: bool = False) -> Weights:
    """Copy the trained weights as the forward uses them, or as the optimizer keeps them; DeepSpeed gathers."""
    deepspeed = load_deepspeed("cpu")
    optimizer = getattr(module.trainer.strategy.model, "optimizer", None)
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    masters = {id(used): kept for pair in groups for used, kept in zip(*pair, strict=True)}  # stage 0 in bf16
    found = {}
    for name, parameter in module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = deepspeed.utils.safe_get_full_fp32_param(parameter) if precise else None
        if precise and id(parameter) in masters:
            kept = masters[id(parameter)]
        if kept is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                kept = parameter.detach().clone()
        found[name] = kept.detach().clone()
    return found


class Witness(L.Callback):
    """Averages by the formula, and the weights before, in and after evaluation."""

    def __init__(self) -> None:
        self.averages: Weights = {}
        self.steps = 0
        self.before: tuple[Weights, Weights] = ({}, {})
        self.during: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.averages = whole_weights(pl_module, precise=True)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step != self.steps:
            self.steps = trainer.global_step
            decay = min(DECAY, (1 + self.steps) / (10 + self.steps))
            for name, weight in whole_weights(pl_module, precise=True).items():
                self.averages[name] = decay * self.averages[name].float() + (1 - decay) * weight.float()
        self.before = whole_weights(pl_module), whole_weights(pl_module, precise=True)

    def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
        used = whole_weights(pl_module)
        rounded = {name: self.averages[name].to(weight.dtype) for name, weight in used.items()}
        self.during.append(distance(used, rounded))
        if trainer.state.fn == "fit":
            assert distance(used, self.before[0]) > 1e-5


class Evaluator(L.Callback):
    """Looks at the weights after `EMA` has put them back; listed behind it."""

    def __init__(self, witness: Witness) -> None:
        self.witness = witness
        self.is_put_back: list[bool] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        used, kept = self.witness.before
        is_kept = trainer.state.fn != "fit" or same(kept, whole_weights(pl_module, precise=True))
        self.is_put_back.append(is_kept and same(used, whole_weights(pl_module)))


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return max(float((a[name].cpu().float() - b[name].cpu().float()).abs().max()) for name in a)


def train(case: Case, rank: int, callbacks: list[L.Callback], steps: int = NUM_STEPS, **arguments: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    settings: dict[str, Any] = dict(max_steps=steps, num_sanity_val_steps=0, val_check_interval=2)
    if case.strategy == "zero_3" and case.family == "gpt2":  # by default, parameters so small are not split
        settings["strategy"] = SATDeepSpeedStrategy(stage=3, options=ZeroOptions(persistence_threshold=100))
    trainer = make_case_trainer(case, NUM_RANKS, callbacks=callbacks, **settings)
    task = FAMILIES[case.family]()
    has_validation = any(isinstance(callback, Evaluator) for callback in callbacks)
    validation = make_loader(rank, NUM_RANKS) if has_validation else None
    trainer.fit(task, make_loader(rank, NUM_RANKS), validation, **arguments)
    return trainer


class Export(L.Callback):
    """Takes what a run leaves while its strategy still stands: the average, the weights, a checkpoint."""

    def __init__(self, ema: EMA | None, checkpoint: Path | None = None) -> None:
        self.ema, self.checkpoint = ema, checkpoint
        self.averages: Weights = {}
        self.weights: Weights = {}
        self.averages_at_start: Weights = {}

    def on_train_start(self, trainer, pl_module) -> None:
        if self.ema is not None:
            self.averages_at_start = self.ema.ema_state_dict(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self.weights = whole_weights(pl_module, precise=True)
        if self.ema is not None:
            self.averages = self.ema.ema_state_dict(trainer)
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)
            save_consolidated(trainer, self.checkpoint.with_suffix(".model"))


def run_case(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    ema, witness = EMA(decay=DECAY), Witness()
    evaluator, export = Evaluator(witness), Export(ema)
    trainer = train(case, rank, [witness, ema, evaluator, export])
    found = {
        "num_updates": ema.num_updates,
        "elements": sum(average.numel() for average in ema._averages),
        "all_elements": sum(value.numel() for value in witness.averages.values()),
        "is_put_back": evaluator.is_put_back,
    }
    trainer.validate(trainer.lightning_module, make_loader(rank, NUM_RANKS), verbose=False)
    found["while_evaluating"] = max(witness.during)
    found["num_evaluated"] = len(witness.during)

    if case.precision == "bf16-mixed":
        plain = Export(None)
        train(case, rank, [plain])
        found["trains_alike"] = same(plain.weights, export.weights)

    checkpoint = folder / f"{case}.ckpt"
    first, second = EMA(decay=DECAY), EMA(decay=DECAY)
    saved, resumed = Export(first, checkpoint), Export(second)
    at_save = Witness()
    train(case, rank, [first, at_save, saved], steps=SAVED_AT)
    train(case, rank, [second, resumed], ckpt_path=checkpoint)
    if case.strategy in ("zero_2", "zero_3"):  # evaluated from a checkpoint alone, where no optimizer has weights
        fresh, third = Witness(), EMA()
        fresh.averages = at_save.averages
        trainer = make_case_trainer(case, NUM_RANKS, callbacks=[fresh, third])
        trainer.validate(FAMILIES[case.family](), make_loader(rank, NUM_RANKS), ckpt_path=checkpoint, verbose=False)
        found["from_checkpoint"] = [third.num_updates, max(fresh.during)]
    found["resumed_updates"] = second.num_updates
    found["resumes_exactly"] = same(resumed.averages_at_start, saved.averages)
    found["moves_on"] = rank > 0 or distance(resumed.averages, saved.averages) > 1e-6
    if rank == 0:
        found["export"] = distance(export.averages, witness.averages)
        found["dtypes"] = sorted({str(value.dtype) for value in export.averages.values()})
        torch.save(saved.averages, folder / f"{case}.averages.pt")
        torch.save({name: value.cpu() for name, value in saved.weights.items()}, folder / f"{case}.weights.pt")
    else:
        found["others_are_empty"] = not export.averages
    return found


def main(folder: Path, cases: list[Case]) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    results = {}
    for case in cases:
        try:
            results[str(case)] = run_case(case, rank, folder)
        except Exception:  # the others are still worth running
            results[str(case)] = {"error": traceback.format_exc()}
    (folder / f"results_{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES[sys.argv[2]])
