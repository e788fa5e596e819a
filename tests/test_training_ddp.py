"""Two processes train as one: through the real command line, since Lightning starts the second by repeating it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import RECIPE

ROOT = Path(__file__).resolve().parents[1]


def read_metric(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(150)))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    metrics, runs = [], []
    for num_processes, batch_size in ((1, 8), (2, 4)):
        words = ["--trainer.devices", str(num_processes), "--data.batch_size", str(batch_size)]
        words += ["--trainer.max_steps", "4", "--trainer.logger.version", str(num_processes)]
        words += ["--trainer.strategy", "ddp"] if num_processes > 1 else []
        command = [sys.executable, "-m", "sat_lightning", "fit", "--config", "tiny.yaml", *words]
        runs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
        metrics.append(tmp_path / "runs" / "tiny" / f"version_{num_processes}" / "metrics.csv")
    for run in runs:
        _, said = run.communicate(timeout=150)
        assert run.returncode == 0, said
    for name, num_values in (("train_loss", 4), ("val_loss", 2), ("val_bits_per_byte", 2)):
        alone, together = (read_metric(path, name) for path in metrics)
        assert len(alone) == num_values
        assert together == pytest.approx(alone, rel=2e-5), name
