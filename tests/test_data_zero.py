"""The data module under DeepSpeed on two real processes: every sample once, batch sizes told, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sat_lightning.data.buckets import Buckets
from sat_lightning.data.mixture import Mixture
from tests.processes import launch

SIZE = 59
BUDGET = {"bucket_size": 16, "max_tokens": 14}

WORKER = """
import json, sys, traceback
import lightning as L
import torch
from torch.utils.data import Dataset
from sat_lightning import SATDataModule
from sat_lightning.data import PadCollate
from sat_lightning.training import DataOptions
from tests.training_examples import make_model, make_task, make_trainer


class Numbers(Dataset):
    # Samples of 1 to 7 tokens, which all are the sample's number.
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def num_tokens(self, index):
        return 1 + index % 7

    def __getitem__(self, index):
        ids = torch.full((self.num_tokens(index),), index)
        return {"input_ids": ids, "target_ids": ids}


class Watch(L.Callback):
    def __init__(self, save_at, folder):
        self.save_at, self.folder = save_at, folder
        self.seen = {"train": [], "validation": []}

    def on_train_start(self, trainer, module):
        self.micro_batch_size = trainer.strategy.model.train_micro_batch_size_per_gpu()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen["train"].append([batch["input_ids"][:, 0].tolist(), trainer.global_step])
        if len(self.seen["train"]) == self.save_at:
            trainer.save_checkpoint(f"{self.folder}/saved.ckpt")

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        kept = batch["target_ids"][:, 0] != -100
        self.seen["validation"] += batch["target_ids"][kept, 0].tolist()


def run(job, folder):
    L.seed_everything(0, verbose=False)
    watch = Watch(job.get("save_at"), folder)
    options = DataOptions(seed=5, collate=PadCollate(), **job["options"])
    data = SATDataModule(Numbers(job["size"]), 8, 3, validation=job.get("validation", 0), options=options)
    trainer = make_trainer(
        -1, max_epochs=2, devices=2, strategy=job["strategy"], callbacks=[watch], num_sanity_val_steps=0,
        accumulate_grad_batches=job.get("accumulate", 1),
    )
    resume = f"{folder}/saved.ckpt" if job.get("resume") else None
    trainer.fit(make_task(lambda: make_model(vocab_size=64)), datamodule=data, ckpt_path=resume)
    names = sorted(name for name in trainer.callback_metrics if name.startswith("val"))
    val = {name: float(trainer.callback_metrics[name]) for name in names}
    return {**watch.seen, "micro_batch_size": watch.micro_batch_size, "val": val}


if __name__ == "__main__":
    jobs, folder = json.loads(sys.argv[1]), sys.argv[2]
    found = []
    for job in jobs:
        try:
            found.append(run(job, folder))
        except Exception:
            found.append({"error": traceback.format_exc()})
    import torch.distributed
    with open(f"{folder}/rank{torch.distributed.get_rank()}.json", "w") as file:
        json.dump(found, file)
"""


def run_in_two_processes(folder: Path, jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each rank found, job by job."""
    (folder / "worker.py").write_text(WORKER)
    launch(str(folder / "worker.py"), json.dumps(jobs), str(folder), timeout=900)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert not [job["error"] for job in ranks[0] if "error" in job]
    return [list(job) for job in zip(*ranks, strict=True)]


def ids_of(ranks: list[dict[str, Any]]) -> list[int]:
    return [i for step in zip(*(rank["train"] for rank in ranks), strict=True) for batch, _ in step for i in batch]


@pytest.mark.timeout(1000)
def test_zero_trains_on_every_sample_once_and_resumes(tmp_path: Path) -> None:
    by_tokens = {"strategy": "zero_2", "size": SIZE, "options": BUDGET, "accumulate": 3}
    jobs = [
        {"strategy": "zero_3", "size": SIZE, "options": {}, "validation": 0.2},
        by_tokens | {"save_at": 5},
        by_tokens | {"resume": True},
    ]
    plain, whole, resumed = run_in_two_processes(tmp_path, jobs)
    assert [rank["micro_batch_size"] for job in (plain, whole, resumed) for rank in job] == [3] * 6
    train = ids_of(plain)
    held_out = {one for rank in plain for one in rank["validation"]}
    half = len(train) // 2
    assert sorted([*train[:half], *held_out]) == list(range(SIZE)) and len(held_out) == 11
    assert sorted(one for rank in plain for one in rank["validation"]) == sorted([*held_out] * 2)
    assert sorted(train[:half]) == sorted(train[half:]) and train[:half] != train[half:]
    assert plain[0]["val"] == plain[1]["val"] and plain[0]["val"]["val_loss"] > 0

    mixture = Mixture([SIZE], seed=5)
    stream = Buckets(mixture, lambda ids: 1 + ids % 7, BUDGET["bucket_size"])
    expected = mixture.ids(stream.positions(np.arange(3 * SIZE))).tolist()
    seen = ids_of(whole)
    assert seen == expected[: len(seen)] and len(seen) >= 2 * SIZE - 15
    assert sorted(seen[:SIZE]) == list(range(SIZE))
    assert len({len(batch) for batch, _ in whole[0]["train"]}) > 2
    assert [step for _, step in whole[0]["train"][:6]] == [0, 0, 1, 1, 1, 2]
    # Saved in the middle of a window: the third batch ended the last one.
    assert resumed[0]["train"] == whole[0]["train"][3:] and resumed[1]["train"] == whole[1]["train"][3:]
