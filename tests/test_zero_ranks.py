"""ZeRO runs that go on with more or fewer ranks: weights, moments, the order of the data and the losses go on too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from sat_lightning import SATDataModule
from sat_lightning.training import DataOptions
from sat_lightning.training.zero_shards import ShardFiles
from tests.processes import launch
from tests.test_zero import assert_same
from tests.training_examples import make_model, make_task, make_trainer
from tests.zero_cases import OPTIM, Case, make_strategy

NUM_STEPS, SAVED_AT, GLOBAL_BATCH_SIZE, NUM_ROWS = 7, 3, 6, 30
#: The parts of stages 1 and 2 cross the borders of parameters; those of stage 3 end in padding.
CASES = [Case("zero_1"), Case("zero_3", "bf16-mixed")]


class Numbered(Dataset):
    """Rows that begin with their number and count on from it."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (index + torch.arange(9)) % 61
        return {"input_ids": ids[:-1], "target_ids": ids[1:]}


class Watch(L.Callback):
    """What this rank saw, the mean loss of all, and checkpoints: at the start, at `SAVED_AT`, at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "start.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["input_ids"][:, 0].tolist())
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone().float())))
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.folder / "saved.ckpt")

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "end.ckpt")


def run(case: Case, num_ranks: int, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train with the same batches on any number of ranks."""
    L.seed_everything(0, verbose=False)
    options = DataOptions(seed=5)
    data = SATDataModule(Numbered(), 8, GLOBAL_BATCH_SIZE // num_ranks, validation=0, options=options)
    watch = Watch(folder)
    trainer = make_trainer(
        NUM_STEPS, devices=num_ranks, strategy=make_strategy(case), precision=case.precision, callbacks=[watch],
        gradient_clip_val=0.5, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    task = make_task(lambda: make_model(vocab_size=61, inner_hidden_size=50), optim=OPTIM)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return {"rows": watch.rows, "losses": watch.losses, "global_step": trainer.global_step}


def main(jobs: Path) -> None:
    """One rank of `run_in_ranks`."""
    told = json.loads(jobs.read_text())
    found = [
        run(Case(**case), told["num_ranks"], Path(folder), resume and Path(resume))
        for case, folder, resume in told["jobs"]
    ]
    jobs.with_suffix(f".{os.environ.get('LOCAL_RANK', 0)}").write_text(json.dumps(found))


def run_in_ranks(num_ranks: int, folder: Path, source: Path | None = None) -> list[dict[str, Any]]:
    """Make all runs in as many processes; with `source`, resume those that are there."""
    jobs = [(vars(case), str(folder / str(case)), source and str(source / str(case) / "saved.ckpt")) for case in CASES]
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps({"num_ranks": num_ranks, "jobs": jobs}))
    launch("-m", "tests.test_zero_ranks", str(folder / "jobs.json"))
    ranks = [json.loads((folder / f"jobs.{rank}").read_text()) for rank in range(num_ranks)]
    return [merge(list(runs)) for runs in zip(*ranks, strict=True)]


def merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of each step over all ranks."""
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    rows = [sorted(row for batch in step for row in batch) for step in zip(*(r["rows"] for r in ranks), strict=True)]
    return ranks[0] | {"rows": rows}


def check(case: Case, unbroken: dict[str, Any], resumed: dict[str, Any], saved: Path, start: Path) -> None:
    """Nothing was lost on the way from `saved` to `start`, and the run goes on as it would have."""
    assert_same(start, saved)
    one, other = (load_file(path / "model.safetensors") for path in (start, saved))
    assert one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())
    assert resumed["global_step"] == unbroken["global_step"] == NUM_STEPS
    assert resumed["rows"] == unbroken["rows"][SAVED_AT:] and len(resumed["rows"]) == NUM_STEPS - SAVED_AT
    rel = 2e-2 if case.precision == "bf16-mixed" else 2e-5
    assert resumed["losses"] == pytest.approx(unbroken["losses"][SAVED_AT:], rel=rel)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks") / "three"
    return folder, run_in_ranks(3, folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_one_rank_goes_on_where_three_were(three: Any, tmp_path: Path, number: int) -> None:
    (folder, unbroken), case = three, CASES[number]
    saved = folder / str(case) / "saved.ckpt"
    assert sorted({row for rows in unbroken[number]["rows"][:5] for row in rows}) == list(range(NUM_ROWS))
    assert len(ShardFiles(saved).names) and len(list(saved.glob("zero-*-of-00003.safetensors"))) == 3
    resumed = merge([run(case, 1, tmp_path, saved)])
    check(case, unbroken[number], resumed, saved, tmp_path / "start.ckpt")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_two_and_three_ranks_go_on_for_each_other(three: Any, tmp_path: Path, before: int, after: int) -> None:
    source, unbroken = three if before == 3 else (tmp_path / "two", run_in_ranks(2, tmp_path / "two"))
    resumed = run_in_ranks(after, tmp_path / "after", source)
    for number, case in enumerate(CASES):
        saved, start = source / str(case) / "saved.ckpt", tmp_path / "after" / str(case) / "start.ckpt"
        check(case, unbroken[number], resumed[number], saved, start)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
