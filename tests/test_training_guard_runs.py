"""A guarded run of ours: which samples were left out, exact resume around them, and why a run ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as callbacks_of_lightning
from torch import Tensor, nn

from sat_lightning.errors import NonFiniteError
from sat_lightning.training import DataOptions, SATDataModule, SkipNonFinite
from tests.guard_examples import (
    GuardedTask,
    Poison,
    Stranger,
    differing,
    fit,
    make_batches,
    make_guarded_task,
    state_of,
)
from tests.training_examples import make_trainer

NUM_ROWS, LENGTH = 40, 8
BAD_TOKEN = 16


class MarkedTask(GuardedTask):
    """Its loss is NaN where a row holds the bad token, and it notes the rows that it was trained on."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.trained: list[int] = []

    def forward_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        is_bad = (batch["input_ids"] == BAD_TOKEN).any()
        self.latest = (batch["input_ids"][:, 0] * 16 + batch["input_ids"][:, 1]).tolist()
        x = torch.where(is_bad, float("nan"), 0.0)
        return super().forward_step({**batch, "x": x, "mark": torch.zeros(1), "score": torch.ones(1)})

    def on_before_backward(self, loss: Tensor) -> None:
        super().on_before_backward(loss)
        self.trained += self.latest


def make_rows(bad: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Rows whose first two tokens tell their number; the bad ones hold the bad token."""
    rows = []
    for number in range(NUM_ROWS):
        ids = torch.tensor([number // 16, number % 16, *range(LENGTH - 1)])
        ids[-2] = BAD_TOKEN if number in bad else 3
        rows.append({"input_ids": ids[:-1], "target_ids": ids[1:]})
    return rows


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def make_run(folder: Path, bad: tuple[int, ...], max_steps: int, **arguments: Any) -> tuple[Any, Any, Any, Any]:
    L.seed_everything(1, verbose=False)
    task = make_guarded_task(MarkedTask)
    data = SATDataModule(Rows(make_rows(bad)), LENGTH, batch_size=2, validation=0, options=DataOptions(seed=5))
    guard = SkipNonFinite(max_fraction=0.5)
    trainer = make_trainer(
        max_steps, callbacks=guard, default_root_dir=folder, accumulate_grad_batches=3, max_epochs=9, **arguments
    )
    return trainer, task, data, guard


def test_the_samples_of_a_left_out_batch_are_written_down(tmp_path: Path) -> None:
    trainer, task, data, guard = make_run(tmp_path, (7, 30), 6)
    trainer.fit(task, data)
    lines = [json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    rows = [row for line in lines for source in line["samples"].values() for row in source]
    assert guard.num_skipped == len(lines) == 2 and len(rows) == 4 and {7, 30} <= set(rows)
    assert sorted(rows + task.trained) == sorted(range(NUM_ROWS))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_a_resumed_run_neither_loses_nor_repeats_a_good_sample(num_steps: int, tmp_path: Path) -> None:
    bad, total = (3, 11, 12, 25, 33), 9
    trainer, whole, data, guard = make_run(tmp_path, bad, total)
    trainer.fit(whole, data)
    expected, num_skipped = state_of(trainer), guard.num_skipped

    trainer, first, data, _ = make_run(tmp_path, bad, num_steps)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    trainer, second, data, guard = make_run(tmp_path, bad, total)
    trainer.fit(second, data, ckpt_path=tmp_path / "kept.ckpt", weights_only=False)
    assert first.trained + second.trained == whole.trained
    assert guard.num_skipped == num_skipped
    found = {**state_of(trainer), "random": expected["random"]}
    assert differing(expected, found) == []


class SaveAfter(L.Callback):
    """Saves after a batch, wherever its window stands, and ends the run."""

    def __init__(self, path: Path, batch_idx: int) -> None:
        self.path, self.batch_idx = path, batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("batch_idx", range(10))
def test_a_window_that_was_begun_is_begun_anew(batch_idx: int, tmp_path: Path) -> None:
    bad, total = (3, 11, 12, 25, 33), 5
    trainer, whole, data, guard = make_run(tmp_path, bad, total)
    trainer.fit(whole, data)
    expected, num_skipped = state_of(trainer), guard.num_skipped

    trainer, first, data, _ = make_run(tmp_path, bad, total)
    trainer.callbacks.append(SaveAfter(tmp_path / "kept.ckpt", batch_idx))
    trainer.fit(first, data)
    num_steps = torch.load(tmp_path / "kept.ckpt", weights_only=False)["global_step"]
    trainer, second, data, guard = make_run(tmp_path, bad, total)
    trainer.fit(second, data, ckpt_path=tmp_path / "kept.ckpt", weights_only=False)
    assert whole.trained[: num_steps * 6] + second.trained == whole.trained
    assert guard.num_skipped == num_skipped
    found = {**state_of(trainer), "random": expected["random"]}
    assert differing(expected, found) == []


def test_a_run_that_had_no_guard_can_be_resumed_with_one(tmp_path: Path) -> None:
    trainer, whole, data, _ = make_run(tmp_path, (33,), 5)
    trainer.fit(whole, data)
    expected = state_of(trainer)

    trainer, first, data, guard = make_run(tmp_path, (33,), 5)
    trainer.callbacks[trainer.callbacks.index(guard)] = SaveAfter(tmp_path / "kept.ckpt", 4)
    trainer.fit(first, data)
    trainer, second, data, guard = make_run(tmp_path, (33,), 5)
    trainer.fit(second, data, ckpt_path=tmp_path / "kept.ckpt", weights_only=False)
    assert first.trained[:6] + second.trained == whole.trained and guard.num_skipped == 1
    assert differing(expected, {**state_of(trainer), "random": expected["random"]}) == []


def test_callbacks_of_lightning_run_beside_the_guard(tmp_path: Path) -> None:
    batches, states = make_batches(9, (0, 4, 8)), []
    for rows in (batches, [batch for number, batch in enumerate(batches) if number not in (0, 4, 8)]):
        callbacks = [
            callbacks_of_lightning.GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}),
            callbacks_of_lightning.LearningRateMonitor(),
            callbacks_of_lightning.EarlyStopping("loss_epoch", patience=9, check_finite=True),
            callbacks_of_lightning.ModelCheckpoint(tmp_path / str(len(rows)), every_n_train_steps=2, save_top_k=-1),
            callbacks_of_lightning.ThroughputMonitor(batch_size_fn=lambda batch: 6, window_size=4),
            SkipNonFinite(max_fraction=0.5),
        ]
        logger = L.pytorch.loggers.CSVLogger(tmp_path, name=None, version="")
        arguments = {"logger": logger, "log_every_n_steps": 4, "max_epochs": 4, "enable_checkpointing": True}
        trainer = fit(Stranger(), rows, tmp_path, callbacks=callbacks, **arguments)
        states.append(state_of(trainer))
    assert differing(*states) == []
    steps = [sorted(int(path.stem.split("step=")[1]) for path in (tmp_path / name).iterdir()) for name in ("9", "6")]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 10, 12, 14][: len(steps[0])] and trainer.global_step == 6 + 2 + 3 + 3


class Culprit(nn.Module):
    """Its root of a negative number is NaN."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - 100).sqrt()


def diagnose(module: L.LightningModule, folder: Path, batches: list[Any], **arguments: Any) -> str:
    with pytest.raises(NonFiniteError) as caught:
        fit(module, batches, folder, callbacks=SkipNonFinite(1, max_fraction=0.5, diagnose=True), **arguments)
    assert "log" not in module.__dict__ and not any(part._forward_hooks for part in module.modules())
    return str(caught.value)


def test_the_first_module_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Broken(Stranger):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(self.first, Culprit())

    said = diagnose(Broken(), tmp_path, make_batches(1))
    assert said.startswith(
        "SkipNonFinite: 1 batches in a row were left out (max_consecutive=1), the last one at epoch 0"
    )
    assert (
        "rank 0: The first tensor that is not finite is the output of first.1 (Culprit) (shape [6, 8], float32, "
        "48 NaN, 0 infinite); its inputs were finite." in said
    )


def test_what_a_training_step_computes_itself_is_told_apart(tmp_path: Path) -> None:
    class Broken(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx).log() * float("inf")

    said = diagnose(Broken(), tmp_path, make_batches(1))
    assert "Every module's output is finite: the training step itself made of them what is not." in said


def test_a_mask_of_minus_infinity_is_not_blamed(tmp_path: Path) -> None:
    class Masked(Stranger):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.ReplicationPad1d((0, 1))
            self.culprit = Culprit()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.mask(torch.full((2, 3), float("-inf")))
            return super().training_step(batch, batch_idx) + self.culprit(batch["x"]).sum()

    assert "is the output of culprit (Culprit) (shape [6, 4]" in diagnose(Masked(), tmp_path, make_batches(1))


def test_a_bad_parameter_is_named(tmp_path: Path) -> None:
    module = Stranger()
    with torch.no_grad():
        module.last.bias[0] = float("nan")
    assert "The parameter last.bias was not finite before the batch." in diagnose(module, tmp_path, make_batches(1))


def test_a_bad_gradient_is_followed_back(tmp_path: Path) -> None:
    said = diagnose(Stranger(), tmp_path, make_batches(1, (0,), "gradient"))
    assert "with rank 0: gradient=norm.bias, norm.weight, first.bias and 1 more." in said
    assert (
        "Backwards from the loss, the first gradient that is not finite is that of the output of drop (Dropout) "
        "(shape [6, 8], float32, 48 NaN, 0 infinite); that of the output of last (Linear), which comes after it, is "
        "finite." in said
    )
    assert Poison.__name__ not in said
