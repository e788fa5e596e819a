"""A run that is killed continues as if nothing had happened: real processes, SIGKILL, other numbers of ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sat_lightning.data.buckets import Buckets
from sat_lightning.data.mixture import Mixture

pytestmark = pytest.mark.timeout(700)  # several processes, on a machine that others load too
ROOT = Path(__file__).resolve().parents[1]

RUN = """
import json, os, signal, sys
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset
from sat_lightning.training.datamodule import DataOptions, SATDataModule


class Numbers(Dataset):
    def __init__(self, size, first):
        self.size, self.first, self.name = size, first, f"from {first}"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"id": torch.tensor(self.first + index)}

    def num_tokens(self, index):
        return 1 + index % 7


class Recorder(L.LightningModule):
    def __init__(self, settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.settings = settings

    def training_step(self, batch, batch_idx):
        with open(f"{self.settings['log']}.{self.global_rank}", "a") as file:
            place = [self.trainer.global_step, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready]
            file.write(json.dumps([*place, batch["id"].tolist()]) + "\\n")
        if self.settings["kill_at"] == self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            os.kill(os.getpid(), signal.SIGKILL)
        return (self.weight - batch["id"].double()).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # as schedules do: the loader is built before counters are restored
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


class SaveAfterValidation(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{self.folder}/last.ckpt")


def train(settings):
    path = [{"dataset": Numbers(size, 1000 * n), "probability": p} for n, (size, p) in enumerate(settings["sources"])]
    data = SATDataModule(
        path, batch_size=settings["batch_size"], num_workers=settings["num_workers"], validation=0.0,
        options=DataOptions(seed=5, stop=settings["stop"], **settings["options"]),
    )
    data.val_dataloader = lambda: torch.utils.data.DataLoader(range(2)) if settings["validate_every"] else []
    folder, every = settings["checkpoints"], settings["save_every"]
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    if settings["validate_every"]:
        saver = SaveAfterValidation(folder)
    module = Recorder(settings)
    trainer = L.Trainer(
        accelerator="cpu", devices=settings["ranks"], strategy="ddp_fork" if settings["ranks"] > 1 else "auto",
        max_epochs=settings["epochs"], max_steps=settings["max_steps"], callbacks=[saver], logger=False,
        accumulate_grad_batches=settings["accumulate"], enable_progress_bar=False, enable_model_summary=False,
        val_check_interval=settings["validate_every"], num_sanity_val_steps=0, check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=data, ckpt_path=settings["resume"], weights_only=True)
    if settings["ranks"] == 1:
        Path(settings["log"] + ".weight").write_text(repr(module.weight.item()))


if __name__ == "__main__":
    # Each run is a process of its own; forked, for the imports take longer than the runs.
    for settings in json.loads(sys.argv[1]):
        if not (pid := os.fork()):
            train(settings)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        is_killed = settings["kill_at"] is not None
        assert (status != 0) == is_killed and (status in (0, -9) or settings["ranks"] > 1), (status, settings)
"""
DEFAULTS = {
    "sources": [[37, 0.7], [11, 0.2], [3, 0.1]],
    "batch_size": 3,
    "num_workers": 0,
    "stop": "all_exhausted",
    "save_every": 2,
    "ranks": 1,
    "epochs": 2,
    "max_steps": -1,
    "accumulate": 1,
    "kill_at": None,
    "validate_every": None,
    "options": {},
}
BUDGET = {"bucket_size": 16, "max_tokens": 21}


Step = list  # its number, and the ids of a batch, rank after rank


def run(folder: Path, *jobs: dict[str, object]) -> list[list[Step]]:
    """Run jobs one after the other, each in a process of its own; return what each trained on, batch by batch."""
    (folder / "run.py").write_text(RUN)
    jobs = [
        {**DEFAULTS, "checkpoints": str(folder / "run"), "resume": str(folder / "run" / "last.ckpt"), **job}
        for job in jobs
    ]
    for number, job in enumerate(jobs):
        job["log"] = str(folder / f"log{number}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", json.dumps(jobs)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "not resumable" not in result.stderr
    parts = []
    for job in jobs:
        lines = [Path(f"{job['log']}.{rank}").read_text().splitlines() for rank in range(job["ranks"])]
        batches = zip(*[[json.loads(line) for line in of_rank] for of_rank in lines], strict=True)
        parts.append([[batch[0][0], [i for rank in batch for i in rank[2]]] for batch in batches])
    return parts


def stitch(parts: list[list[Step]]) -> list[Step]:
    """What a chain of killed runs trained on: a part counts as far as the next one does not do it again."""
    done: list[Step] = []
    for part in parts:
        done = [step for step in done if step[0] < part[0][0]] + part
    return done


@pytest.mark.parametrize(
    ("settings", "kills"),
    [
        ({"num_workers": 0}, [5, 9]),
        ({"num_workers": 2, "accumulate": 3, "save_every": 1}, [8, 17]),
        ({"accumulate": 3, "validate_every": 4}, [7, 14]),
        ({"num_workers": 2, "accumulate": 3, "save_every": 1, "options": BUDGET}, [8, 17]),
    ],
    ids=["twice in one epoch", "in a window, with workers", "saved inside a window", "by tokens"],
)
def test_killed_run_continues_as_if_nothing_had_happened(tmp_path: Path, settings: dict, kills: list[int]) -> None:
    parts = [settings | {"kill_at": kill_at} for kill_at in [*kills, None]]
    alone = settings | {"checkpoints": str(tmp_path / "whole"), "resume": None}
    whole, *parts = run(tmp_path, alone, {**parts[0], "resume": None}, *parts[1:])
    assert all(len(part) < len(whole) for part in parts)
    assert stitch(parts) == whole
    # Not only the data: the last weights are the same to the last bit.
    assert (tmp_path / "log3.weight").read_text() == (tmp_path / "log0.weight").read_text()


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 3)], ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_another_number_of_ranks_continues_the_same_order(tmp_path: Path, ranks: tuple[int, int]) -> None:
    before, after = ranks
    settings = {"sources": [[89, 1.0]], "save_every": 1, "batch_size": 2}
    killed, resumed = run(
        tmp_path, settings | {"ranks": before, "kill_at": 6, "resume": None}, settings | {"ranks": after}
    )
    ids = [i for _, batch in stitch([killed, resumed]) for i in batch]
    assert len(killed) == 6 and resumed[0][0] == 5
    data = Mixture([89], seed=5)
    assert ids == data.ids(range(2 * 89)).tolist()
    assert sorted(ids[:89]) == sorted(ids[89:]) == list(range(89))


def test_another_number_of_ranks_cuts_the_same_order_by_tokens(tmp_path: Path) -> None:
    settings = {"sources": [[89, 1.0]], "save_every": 1, "epochs": 1, "options": BUDGET}
    killed, resumed, more = run(
        tmp_path,
        settings | {"ranks": 2, "kill_at": 5, "resume": None},
        settings | {"ranks": 3, "kill_at": 5 + 2},
        settings | {"ranks": 1},
    )
    ids = [i for _, batch in stitch([killed, resumed, more]) for i in batch]
    mixture = Mixture([89], seed=5)
    stream = Buckets(mixture, lambda ids: 1 + ids % 7, BUDGET["bucket_size"])
    assert ids == mixture.ids(stream.positions(np.arange(89))).tolist() and sorted(ids) == list(range(89))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    settings = {
        "num_workers": draw.choice([0, 2]),
        "accumulate": draw.choice([1, 2, 3]),
        "save_every": draw.choice([1, 2]),
        "stop": draw.choice(["first_exhausted", "all_exhausted", None, "never"]),
        "sources": [[37, 0.7], [31, 0.2], [13, 0.1]],
        "options": draw.choice([{}, BUDGET, {"bucket_size": 16}]),
    }
    settings |= {"max_steps": 20, "epochs": -1} if settings["stop"] == "never" or draw.random() < 0.5 else {}
    kills = sorted(draw.sample(range(settings["accumulate"] * settings["save_every"] + 1, 20), 3))
    parts = [settings | {"kill_at": kill_at} for kill_at in [*kills, None]]
    alone = settings | {"checkpoints": str(tmp_path / "whole"), "resume": None}
    whole, *parts = run(tmp_path, alone, {**parts[0], "resume": None}, *parts[1:])
    assert stitch(parts) == whole
