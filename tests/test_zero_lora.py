"""LoRA and its kin, split by ZeRO-3 over two real processes, begin and learn as in one.

`python -m tests.test_zero_lora <file>` is one of the processes.
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

from sat_lightning import TransformerConfig
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin
from sat_lightning.models import GPT2Model
from sat_lightning.training import LanguageModelingTask, OptimConfig, SATDeepSpeedStrategy, ZeroOptions
from tests.test_zero_families import RANK_VARIABLES, ROOT, Losses
from tests.training_examples import SIZES, counting_rows, make_trainer

NUM_STEPS = 3
METHODS = {
    "lora": partial(LoraMixin, rank=2, target="layers"),
    "dora": partial(DoraMixin, rank=2),
    "pissa": partial(LoraMixin, rank=2, init="pissa"),
    "ia3": IA3Mixin,
}
DEFAULTS = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2}


def learn(name: str, strategy: Any, num_ranks: int, precision: str = "32-true") -> list[float]:
    L.seed_everything(0, verbose=False)
    build = partial(GPT2Model, TransformerConfig(**SIZES, **DEFAULTS))
    mixins = {"tuned": METHODS[name]} if name in METHODS else {key: METHODS[key] for key in ("dora", "ia3")}
    task = LanguageModelingTask(build, mixins=mixins, optim=OptimConfig(learning_rate=3e-2))
    losses = Losses()
    with TemporaryDirectory() as root:
        trainer = make_trainer(
            max_steps=NUM_STEPS, devices=num_ranks, strategy=strategy, precision=precision, callbacks=[losses],
            use_distributed_sampler=False,  # both ranks see every row, as one process does
            default_root_dir=root,
        )  # fmt: skip
        trainer.fit(task, DataLoader(counting_rows(8), batch_size=2))
    return losses.values


NAMES = [*METHODS, "two at once"]


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
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("split") / "results.json"
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | ours
    command = [sys.executable, "-m", "tests.test_zero_lora", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_learns_as_in_one_process(split: dict[str, Any], name: str) -> None:
    assert isinstance(split[name], list), split[name]
    alone = learn(name, "auto", 1)
    assert split[name] == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0] and torch.isfinite(torch.tensor(alone)).all()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
