"""Methods of fine-tuning, split by ZeRO-3 over two real processes, learn as in one.

`python -m tests.test_zero_methods <file>` is one of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning.mixins import NoMixin
from sat_lightning.models import GPT2Model
from sat_lightning.training import OptimConfig, SATDeepSpeedStrategy, ZeroOptions
from tests.families import SIZES
from tests.methods import METHODS
from tests.test_zero_families import NUM_STEPS, RANK_VARIABLES, ROOT, Losses, SquareTask
from tests.training_examples import make_trainer

#: Those whose parameters no module call of their own asks for, and one of each other kind.
NAMES = (
    "prefix",
    "prefix-mlp",
    "prompt",
    "adapter",
    "ffadd",
    "bitfit",
    "layernorm",
    "mlp-head",
    "task-heads",
    "lora",
    "dora",
    "ia3",
)


class Task(SquareTask):
    """Call with what the method needs."""

    call: Any = {}

    def forward_step(self, batch):
        return self._built_model()(batch["input_ids"] * 3 + torch.arange(9), **self.call)[0].float().square().mean()


def build() -> GPT2Model:
    return GPT2Model(GPT2Model.config_class(**(SIZES | {"init_method_std": 0.2})))


def learn(name: str, strategy: Any, num_ranks: int) -> list[float]:
    L.seed_everything(0, verbose=False)
    removed = {"gpt2-final": NoMixin} if METHODS[name].replaces_head else {}
    task, losses = (
        Task(build, {**removed, "tuned": METHODS[name].make}, optim=OptimConfig(learning_rate=1e-2)),
        Losses(),
    )
    task.call = METHODS[name].call
    rows = [{"input_ids": torch.full((9,), seed)} for seed in range(NUM_STEPS)]
    with TemporaryDirectory() as root:
        trainer = make_trainer(
            max_steps=NUM_STEPS, devices=num_ranks, strategy=strategy, use_distributed_sampler=False,
            callbacks=[losses], gradient_clip_val=1.0, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(task, DataLoader(rows, batch_size=1))
    return losses.values


def main(results: Path) -> None:
    found: dict[str, Any] = {}
    for name in NAMES:
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
    command = [sys.executable, "-m", "tests.test_zero_methods", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", NAMES)
def test_zero_3_learns_as_one_process(name, split):
    assert isinstance(split[name], list), split[name]
    assert split[name] == pytest.approx(learn(name, "auto", 1), rel=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
