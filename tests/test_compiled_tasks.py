"""Every task through the Trainer with `compile`: few graphs, whole, none made later, and the losses of eager code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from sat_lightning.training import AttentionPlotter, SequenceClassificationTask
from tests.task_examples import TASKS
from tests.training_examples import make_trainer

NUM_EPOCHS = 2


class Graphs(L.Callback):
    """The loss of every batch, and how many graphs there were behind each and behind each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.numbers: list[int] = []
        self.rates: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.numbers.append(counters["stats"]["unique_graphs"])

    def on_train_epoch_end(self, trainer, module) -> None:
        self.rates.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")})


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fit(name: str, folder: Path, is_checkpointed: bool, compile: Any) -> tuple[Graphs, Any]:
    """Train on ragged batches, validate, train on; pictures and answers change the model in between."""
    L.seed_everything(0, verbose=False)
    example = TASKS[name]
    task = example.make({"num_layers": 1, "checkpoint_activations": is_checkpointed}, compile=compile)
    graphs = Graphs()
    pictures = [AttentionPlotter()] if issubclass(example.kind, SequenceClassificationTask) else []
    trainer = make_trainer(
        -1, max_epochs=NUM_EPOCHS, callbacks=[graphs, *pictures], default_root_dir=folder, num_sanity_val_steps=0
    )
    trainer.fit(task, example.load(example.rows(16, 0, is_even=False)), example.val_loader())
    return graphs, task


def check(name: str, folder: Path, is_checkpointed: bool, **options: Any) -> None:
    expected, _ = fit(name, folder, False, False)
    assert counters["stats"]["unique_graphs"] == 0
    found, task = fit(name, folder, is_checkpointed, options)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for one, other in zip(found.rates, expected.rates, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert not counters["graph_break"] and not counters["recompiles"]
    # The first length is compiled as such, the second one as any length.
    assert 1 <= found.numbers[0] and found.numbers[3] <= 2 * found.numbers[0], found.numbers
    steps = len(found.numbers) // NUM_EPOCHS
    assert len(set(found.numbers[steps:])) == 1, found.numbers


#: The rest is slow.
QUICK = {("text", True), ("image", False)}
CASES = [
    pytest.param(name, is_checkpointed, marks=[] if (name, is_checkpointed) in QUICK else pytest.mark.slow)
    for name in TASKS
    for is_checkpointed in (False, True)
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "is_checkpointed"), CASES)
def test_a_task_is_compiled_whole_and_once(name: str, is_checkpointed: bool, tmp_path: Path) -> None:
    check(name, tmp_path, is_checkpointed, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_the_real_code_generator_learns_the_same(name: str, is_checkpointed: bool, tmp_path: Path) -> None:
    check(name, tmp_path, is_checkpointed, fullgraph=True)
