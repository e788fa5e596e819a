"""Every family, split by ZeRO-3 over two real processes, learns as in one: parameters that no module call asks for too.

`python -m tests.test_zero_families <file>` is one of the processes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning import models
from sat_lightning.training import OptimConfig, SATLightningModule
from tests.families import FAMILIES, SIZES
from tests.processes import results_of, run_each
from tests.zero_cases import SINGLE, learn


class SquareTask(SATLightningModule):
    """Make whatever a family returns small; a batch is a seed."""

    family_name = ""

    def forward_step(self, batch):
        seed = int(batch["input_ids"][0, 0])
        return FAMILIES[self.family_name].run(self._built_model(), seed=seed).float().square().mean()


def build(name: str) -> Any:
    model_class = getattr(models, FAMILIES[name].class_name)
    return model_class(model_class.config_class(**(SIZES | FAMILIES[name].options | {"init_method_std": 0.2})))


def seeds() -> DataLoader:
    return DataLoader([{"input_ids": torch.full((9,), seed)} for seed in range(3)], batch_size=1)


def learn_family(name: str, strategy: str) -> list[float]:
    task = SquareTask(partial(build, name), optim=OptimConfig(learning_rate=1e-2))
    task.family_name = name
    return learn(task, seeds(), strategy)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return results_of("tests.test_zero_families", tmp_path_factory.mktemp("split"))


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_zero_3_learns_as_one_process(name, split):
    assert isinstance(split[name], list), split[name]
    assert split[name] == pytest.approx(learn_family(name, SINGLE), rel=1e-4)


if __name__ == "__main__":
    run_each(FAMILIES, partial(learn_family, strategy="zero_3"), Path(sys.argv[1]))
