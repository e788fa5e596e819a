"""LoRA and its kin, split by ZeRO-3 over two real processes, begin and learn as in one.

`python -m tests.test_zero_lora <file>` is one of the processes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning import TransformerConfig
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin
from sat_lightning.models import GPT2Model
from sat_lightning.training import LanguageModelingTask, OptimConfig
from tests.processes import results_of, run_each
from tests.training_examples import SIZES, counting_rows
from tests.zero_cases import SINGLE, learn

METHODS = {
    "lora": partial(LoraMixin, rank=2, target="layers"),
    "dora": partial(DoraMixin, rank=2),
    "pissa": partial(LoraMixin, rank=2, init="pissa"),
    "ia3": IA3Mixin,
}
NAMES = [*METHODS, "two at once"]
DEFAULTS = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.2}


def learn_method(name: str, strategy: str) -> list[float]:
    build = partial(GPT2Model, TransformerConfig(**SIZES, **DEFAULTS))
    mixins = {"tuned": METHODS[name]} if name in METHODS else {key: METHODS[key] for key in ("dora", "ia3")}
    task = LanguageModelingTask(build, mixins=mixins, optim=OptimConfig(learning_rate=3e-2))
    return learn(task, DataLoader(counting_rows(8), batch_size=2), strategy)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of("tests.test_zero_lora", tmp_path_factory.mktemp("split"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_learns_as_in_one_process(split: dict[str, Any], name: str) -> None:
    assert isinstance(split[name], list), split[name]
    alone = learn_method(name, SINGLE)
    assert split[name] == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0] and torch.isfinite(torch.tensor(alone)).all()


if __name__ == "__main__":
    run_each(NAMES, partial(learn_method, strategy="zero_3"), Path(sys.argv[1]))
