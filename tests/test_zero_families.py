"""Every family, split by ZeRO-3 over two real processes, learns as in one: parameters that no module call asks for too.

`python -m tests.test_zero_families <file>` is one of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning import models
from sat_lightning.training import OptimConfig, SATDeepSpeedStrategy, SATLightningModule, ZeroOptions
from tests.families import FAMILIES, SIZES
from tests.training_examples import make_trainer

RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}
ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 3


class SquareTask(SATLightningModule):
    """Make whatever a family returns small; a batch is a seed."""

    family_name = ""

    def forward_step(self, batch):
        seed = int(batch["input_ids"][0, 0])
        return FAMILIES[self.family_name].run(self._built_model(), seed=seed).float().square().mean()


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def build(name: str) -> Any:
    model_class = getattr(models, FAMILIES[name].class_name)
    return model_class(model_class.config_class(**(SIZES | FAMILIES[name].options | {"init_method_std": 0.2})))


def learn(name: str, strategy: Any, num_ranks: int) -> list[float]:
    L.seed_everything(0, verbose=False)
    task, losses = SquareTask(partial(build, name), optim=OptimConfig(learning_rate=1e-2)), Losses()
    task.family_name = name
    rows = [{"input_ids": torch.full((9,), seed)} for seed in range(NUM_STEPS)]
    with TemporaryDirectory() as root:
        trainer = make_trainer(
            max_steps=NUM_STEPS,
            devices=num_ranks,
            strategy=strategy,
            use_distributed_sampler=False,  # both ranks see every row, as one process does
            callbacks=[losses],
            gradient_clip_val=1.0,
            default_root_dir=root,
        )
        trainer.fit(task, DataLoader(rows, batch_size=1))
    return losses.values


def main(results: Path) -> None:
    found: dict[str, Any] = {}
    for name in FAMILIES:
        try:
            found[name] = learn(name, SATDeepSpeedStrategy(3, options=ZeroOptions(persistence_threshold=0)), 2)
        except Exception:  # the others are still worth running
            found[name] = traceback.format_exc()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        results.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    file = tmp_path_factory.mktemp("split") / "results.json"
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | ours
    command = [sys.executable, "-m", "tests.test_zero_families", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_zero_3_learns_as_one_process(name, split):
    assert isinstance(split[name], list), split[name]
    assert split[name] == pytest.approx(learn(name, "auto", 1), rel=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
