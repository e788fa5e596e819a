from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ThroughputMonitor, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from sat_lightning.training import (
    EMA,
    OptimConfig,
    RunMonitor,
    SkipNonFinite,
    TrainingProgressBar,
    count_rows,
    count_tokens,
)
from sat_lightning.training.callbacks import monitor as monitor_file
from sat_lightning.training.callbacks import progress as progress_file
from sat_lightning.training.callbacks.monitor import peak_flops, resident_bytes
from sat_lightning.training.runs import is_logging_step, steps_per_epoch, total_steps
from tests.training_examples import counting_loader, counting_rows, make_model, make_task, make_trainer

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """A clock that stands still until it is told to go on, so that no test depends on the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        for file in (monitor_file, progress_file):
            monkeypatch.setattr(file, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class SlowRows(torch.utils.data.Dataset):
    """Every sample takes half a second of the clock to come; `lengths` makes them ragged from batch to batch."""

    def __init__(self, clock: Clock, num_rows: int = 32, seconds: float = 0.5) -> None:
        self.clock, self.rows, self.seconds = clock, counting_rows(num_rows), seconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.clock.now += self.seconds
        length = 16 if index < 16 else 8
        return {name: values[:length] for name, values in self.rows[index].items()}


class Tick(L.Callback):
    """A training step of two seconds, and validation of fifty."""

    def __init__(self, clock: Clock, seconds: float = 2.0) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += self.seconds

    def on_validation_batch_start(self, *_: Any) -> None:
        self.clock.now += 50.0


def logged(folder: Path) -> dict[str, list[float]]:
    """The values of each column, in the order of steps."""
    columns: dict[str, list[float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def fit(tmp_path: Path, *callbacks: L.Callback, loader: Any = None, max_steps: int = 8, **arguments: Any) -> L.Trainer:
    trainer = make_trainer(
        max_steps, callbacks=list(callbacks), logger=CSVLogger(tmp_path, name=None, version=""), **arguments
    )
    trainer.fit(make_task(make_model(num_layers=1)), loader or counting_loader(), counting_loader(8))
    return trainer


def test_rates_are_over_the_steps_since_the_last_log(tmp_path: Path, clock: Clock) -> None:
    loader = DataLoader(SlowRows(clock), batch_size=4)  # two seconds to load, two to train
    fit(tmp_path, Tick(clock), RunMonitor(), loader=loader, log_every_n_steps=2, val_check_interval=4)
    columns = logged(tmp_path)
    assert columns["train/device/samples_per_sec"] == pytest.approx([1, 1, 1, 1])
    assert columns["train/device/items_per_sec"] == pytest.approx([16, 16, 8, 8])
    assert columns["train/device/batches_per_sec"] == pytest.approx([1 / 4] * 4)
    assert columns["train/device/data_wait_fraction"] == pytest.approx([1 / 2] * 4)
    assert columns["train/time"] == pytest.approx([8, 16, 24, 32])  # not the 50 seconds of each validation
    assert columns["train/samples"] == [8, 16, 24, 32] and columns["train/lengths"] == [128, 256, 320, 384]
    per_batch = [
        flops / rate
        for flops, rate in zip(*(columns[f"train/device/{n}_per_sec"] for n in ("flops", "batches")), strict=True)
    ]
    assert per_batch[0] == pytest.approx(per_batch[1]) and per_batch[2] < per_batch[1] / 2
    assert all(0.05 < gib < 100 for gib in columns["train/host/memory_gib"])
    assert "train/device/mfu" not in columns and "train/device/memory_gib" not in columns  # of a CPU


def test_names_are_lightnings(tmp_path: Path) -> None:
    theirs = ThroughputMonitor(batch_size_fn=count_rows, length_fn=count_tokens, window_size=2)
    fit(tmp_path / "theirs", theirs, log_every_n_steps=1, max_steps=3)
    fit(tmp_path / "ours", RunMonitor(), log_every_n_steps=1, max_steps=3)
    names = [{n for n in logged(tmp_path / who) if n.startswith("train/")} for who in ("theirs", "ours")]
    assert names[1] - names[0] == {"train/device/data_wait_fraction", "train/host/memory_gib"}
    assert names[0] <= names[1]


def test_utilisation_is_what_was_done_of_what_could_be(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, Tick(clock), RunMonitor(available_flops=1e9), log_every_n_steps=4)
    columns = logged(tmp_path)
    assert columns["train/device/mfu"] == pytest.approx([rate / 1e9 for rate in columns["train/device/flops_per_sec"]])


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.5e12),
        ("NVIDIA H200", "16-true", 989.5e12),
        ("NVIDIA H200 NVL", "bf16-true", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA A100-SXM4-80GB", "64-true", 9.7e12),
        ("A chip of tomorrow", "bf16-mixed", None),
    ],
)
def test_peaks_are_those_of_dense_matrices(
    name: str, precision: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda *_: True)
    assert peak_flops(torch.device("cuda"), precision) == expected
    assert peak_flops(torch.device("cpu"), precision) is None


def test_half_of_it_through_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), "32-true") == 989.5e12 / 2


def test_the_users_profiler_still_hears_everything(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    trainer = fit(tmp_path, RunMonitor(), max_steps=2, profiler=profiler)
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 2
    assert not {"_on_before_fetch", "_on_after_fetch"} & set(vars(trainer.fit_loop.epoch_loop))  # left as it was


def test_a_strangers_module_has_rates_too(tmp_path: Path) -> None:
    class Stranger(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(17, 3)

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.table(batch["input_ids"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    logger = CSVLogger(tmp_path, name=None, version="")
    make_trainer(4, logger=logger, callbacks=RunMonitor(), log_every_n_steps=2).fit(Stranger(), counting_loader())
    columns = logged(tmp_path)
    assert len(columns["train/device/items_per_sec"]) == 2 and "train/device/flops_per_sec" not in columns


def test_resident_memory_follows_what_is_held() -> None:
    before = resident_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert resident_bytes() - before > 0.5 * held.numel()


class Endless(IterableDataset):
    """Rows of no known number."""

    def __init__(self, num_rows: int | None = None) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        index = 0
        while self.num_rows is None or index < self.num_rows:
            yield counting_rows(1)[0]
            index += 1


class Watch(L.Callback):
    """Keeps what the bar says is left, after each batch."""

    def __init__(self, bar: TrainingProgressBar) -> None:
        self.bar = bar
        self.said: list[float | None] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.said.append(self.bar.train_progress_bar.seconds_left)


def watch(clock: Clock, loader: Any, ckpt_path: Any = None, **arguments: Any) -> tuple[list[float | None], L.Trainer]:
    bar = TrainingProgressBar(refresh_rate=1)
    watcher = Watch(bar)
    trainer = make_trainer(
        **{"max_steps": -1, **arguments}, callbacks=[Tick(clock), bar, watcher], enable_progress_bar=True
    )
    trainer.fit(
        make_task(make_model(num_layers=1), optim=OptimConfig(schedule="constant")), loader, ckpt_path=ckpt_path
    )
    return watcher.said, trainer


def test_time_left_counts_batches_of_two_seconds(clock: Clock, tmp_path: Path) -> None:
    said, _ = watch(clock, counting_loader(), max_steps=5)
    assert said == [8, 6, 4, 2, 0]
    said, _ = watch(clock, counting_loader(), max_steps=3, accumulate_grad_batches=4)
    assert said[3::4] == [16, 8, 0] and len(said) == 12
    said, trainer = watch(clock, counting_loader(24), max_epochs=2)  # of 3 batches
    assert said == [10, 8, 6, 4, 2, 0]
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    said, _ = watch(clock, counting_loader(24), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert said == [4, 2, 0]
    said, _ = watch(clock, counting_loader(24), max_epochs=2, accumulate_grad_batches=2)
    assert said[1::3] == [12, 4] and said[2::3] == [
        8,
        0,
    ]  # the last window of an epoch is half a window, told as a whole


def test_time_left_of_data_without_a_length(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(Endless(), batch_size=2)
    assert watch(clock, loader, max_steps=4)[0] == [6, 4, 2, 0]
    said, _ = watch(clock, DataLoader(Endless(6), batch_size=2), max_epochs=3)
    # The first epoch shows how long they are.
    assert said == [None, None, None, 10, 8, 6, 4, 2, 0]
    assert watch(clock, loader, max_epochs=2, limit_train_batches=3)[0] == [10, 8, 6, 4, 2, 0]
    monkeypatch.setattr(Timer, "time_remaining", lambda *_: 5.0)
    assert watch(clock, loader, max_steps=4, max_time="00:00:10:00")[0] == [5, 4, 2, 0]
    assert watch(clock, DataLoader(Endless(6), batch_size=2), max_epochs=1, max_time="00:00:10:00")[0] == [5, 5, 5]


def test_bar_prints_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    watch(clock, counting_loader(), max_steps=50)
    assert "<01:36, " in capsys.readouterr().out  # 48 batches of two seconds


def test_steps_of_a_run() -> None:
    def steps(loader: Any, **arguments: Any) -> tuple[int | None, int | None]:
        trainer = make_trainer(**{"max_steps": -1, **arguments})
        trainer.strategy.connect(make_task(make_model(num_layers=1)))
        trainer._data_connector.attach_data(trainer.lightning_module, train_dataloaders=loader)
        return steps_per_epoch(trainer), total_steps(trainer)

    assert steps(counting_loader(), max_epochs=3) == (8, 24)
    assert steps(counting_loader(), max_epochs=3, accumulate_grad_batches=3) == (3, 9)
    assert steps(counting_loader(), max_epochs=3, max_steps=5) == (8, 5)
    assert steps(counting_loader(), max_epochs=-1, max_steps=30) == (8, 30)
    assert steps(DataLoader(Endless()), max_epochs=3) == (None, None)
    assert steps(DataLoader(Endless()), max_epochs=3, limit_train_batches=7) == (7, 21)
    scheduler = GradientAccumulationScheduler({0: 8, 1: 2})
    assert steps(counting_loader(), max_epochs=3, callbacks=scheduler) == (1, 1 + 4 + 4)


@pytest.mark.parametrize("num_accumulated", [1, 3])
def test_logging_steps_are_the_trainers_own(num_accumulated: int, tmp_path: Path) -> None:
    """Also where steps of the optimizer were skipped, so that its count lags behind."""
    told, asked = [], []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            if "train_loss" in metrics:
                told.append(step)

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if is_logging_step(trainer):
                asked.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    class Skipping(type(make_task())):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            loop = self.trainer.fit_loop.epoch_loop
            if loop._batches_that_stepped == 1:
                loop.automatic_optimization.optim_progress.optimizer.step.total.completed -= 1

    trainer = make_trainer(
        -1, max_epochs=2, callbacks=Ask(), logger=Logger(tmp_path), accumulate_grad_batches=num_accumulated,
        log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(Skipping(lambda: make_model(num_layers=1)), counting_loader())
    num_windows = 2 * math.ceil(8 / num_accumulated)
    assert trainer.global_step == num_windows - 1
    assert asked == list(range(1, num_windows, 2)) and set(asked) <= set(told)


SCRIPT = """
import sys, torch
from lightning.pytorch.loggers import CSVLogger
from sat_lightning.training import RunMonitor
from tests.training_examples import counting_rows, make_model, make_task, make_trainer
logger = CSVLogger(sys.argv[1], name=None, version="")
trainer = make_trainer(4, devices=2, strategy="ddp", logger=logger, callbacks=RunMonitor(), log_every_n_steps=2)
rows = counting_rows(16)
class Ragged(torch.utils.data.IterableDataset):
    def __iter__(self):
        # Rank 1's batches hold half as many tokens.
        length = 16 if trainer.global_rank == 0 else 8
        yield from ({name: value[:length] for name, value in row.items()} for row in rows)
trainer.fit(make_task(make_model(num_layers=1)), torch.utils.data.DataLoader(Ragged(), batch_size=2))
"""


@pytest.mark.timeout(600)
def test_two_ranks_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "train.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    columns = logged(tmp_path)
    assert columns["train/lengths"] == [2 * 2 * 12, 4 * 2 * 12]  # of the mean rank
    for name in ("items", "samples", "batches", "flops"):
        both, each = columns[f"train/{name}_per_sec"], columns[f"train/device/{name}_per_sec"]
        assert both == pytest.approx([2 * rate for rate in each])
    assert columns["train/items_per_sec"] == pytest.approx([12 * rate for rate in columns["train/samples_per_sec"]])


class Waits(TorchDispatchMode):
    """Counts how often the host waits for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        (lambda: [], 0),
        (lambda: [RunMonitor(), EMA(), TrainingProgressBar(refresh_rate=100)], 0),
        (lambda: [SkipNonFinite(check_gradients=False), RunMonitor(), EMA()], 1),
        (lambda: [SkipNonFinite(), RunMonitor(), EMA()], 1),
    ],
    ids=["module", "monitors", "guard", "guard of gradients too"],
)
def test_a_step_that_is_not_logged_does_not_wait_for_the_device(callbacks: Any, expected: int, tmp_path: Path) -> None:
    with Waits() as waits:
        counts = []

        class Count(L.Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                counts.append(waits.count)

        fit(tmp_path, *callbacks(), Count(), log_every_n_steps=4, val_check_interval=8, enable_progress_bar=True)
    each = [after - before for before, after in zip(counts, counts[1:], strict=False)]
    assert each[:3] == each[4:7] == [expected] * 3
    assert expected < each[3] < 12  # the fourth is logged


def test_the_counter_of_waits_counts() -> None:
    tensor = torch.ones(2)
    with Waits() as waits:
        tensor.sum().item()
        bool(tensor.sum() > 0)
        float(tensor[0])
    assert waits.count == 3
