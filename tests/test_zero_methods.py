"""Methods of fine-tuning, split by ZeRO-3 over two real processes, learn as in one.

`python -m tests.test_zero_methods <file>` is one of the processes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_lightning.mixins import NoMixin
from sat_lightning.models import GPT2Model
from sat_lightning.training import OptimConfig
from tests.families import SIZES
from tests.methods import METHODS
from tests.processes import results_of, run_each
from tests.test_zero_families import SquareTask, seeds
from tests.zero_cases import SINGLE, learn

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


def learn_method(name: str, strategy: str) -> list[float]:
    removed = {"gpt2-final": NoMixin} if METHODS[name].replaces_head else {}
    task = Task(build, {**removed, "tuned": METHODS[name].make}, optim=OptimConfig(learning_rate=1e-2))
    task.call = METHODS[name].call
    return learn(task, seeds(), strategy)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return results_of("tests.test_zero_methods", tmp_path_factory.mktemp("split"))


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", NAMES)
def test_zero_3_learns_as_one_process(name, split):
    assert isinstance(split[name], list), split[name]
    assert split[name] == pytest.approx(learn_method(name, SINGLE), rel=1e-4)


if __name__ == "__main__":
    run_each(NAMES, partial(learn_method, strategy="zero_3"), Path(sys.argv[1]))
