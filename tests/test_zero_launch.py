"""From the command line, by the starters of clusters: torchrun, and SLURM's one process a task."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sat_lightning.cli import main
from tests.test_cli import RECIPE

ROOT = Path(__file__).resolve().parents[1]
CLI = ["-m", "sat_lightning", "fit", "--config", "tiny.yaml", "--trainer.max_steps", "3"]
CLIPPED = ["--trainer.gradient_clip_val", "1.0"]
TWO = ["--trainer.devices", "2", "--data.batch_size", "4", *CLIPPED, "--trainer.logger.version", "2"]
BY_CLASS = """
trainer:
  strategy:
    class_path: SATDeepSpeedStrategy
    init_args:
      stage: 3
      options: {persistence_threshold: 0}
"""
OTHERS = ("SLURM_", "MASTER_", "TORCHELASTIC_")
NOT_OURS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"}


def start(folder: Path, words: list[str], **variables: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_OURS and not k.startswith(OTHERS)}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "SAT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**environment, **variables}, **pipes)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def read_metric(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(150)))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "zero.yaml").write_text(BY_CLASS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    return tmp_path


def wait(runs: list[subprocess.Popen]) -> None:
    for run in runs:
        said, _ = run.communicate(timeout=600)
        assert run.returncode == 0, said


def compare(folder: Path, *words: str) -> None:
    """What runs of two processes wrote to version_2 with this process alone, with twice the batch, in version_1."""
    main([*CLI[2:], *words, "--data.batch_size", "8", *CLIPPED, "--trainer.logger.version", "1"])
    for name, num_values in (("train_loss", 3), ("val_loss", 1), ("grad_norm", 3)):
        alone, found = (read_metric(folder / "runs" / "tiny" / f"version_{n}" / "metrics.csv", name) for n in (1, 2))
        assert len(alone) == num_values
        assert found == pytest.approx(alone, rel=2e-4), name


def check(folder: Path, runs: list[subprocess.Popen]) -> None:
    wait(runs)
    compare(folder)
    (saved,) = (folder / "runs" / "tiny").glob("version_2/checkpoints/*.ckpt")
    assert (saved / "complete").is_file() and len(list(saved.glob("zero-*-of-00002.safetensors"))) == 2


@pytest.mark.timeout(900)
def test_torchrun_starts_two_processes_that_train_as_one(folder: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    check(folder, [start(folder, [*torchrun, *CLI, *TWO, "--trainer.strategy", "zero_2"])])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_starts_two_processes_that_train_as_one(folder: Path) -> None:
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    slurm |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    tasks = [{**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    check(folder, [start(folder, [*CLI, *TWO, "--config", "zero.yaml"], **task) for task in tasks])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "zero_3"])
def test_two_nodes_train_and_resume_as_one(folder: Path, strategy: str) -> None:
    """Each node, a torchrun of its own, has one process; the second half of the run resumes the first."""

    def on_both(*words: str) -> list[subprocess.Popen]:
        nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
        nodes += ["--master-port", free_port()]
        return [start(folder, [*nodes, "--node-rank", str(node), "-m", "sat_lightning", *words]) for node in range(2)]

    steady = ["--model.optim.schedule", "constant"]  # others end with max_steps
    nodes = ["--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", strategy]
    wait(on_both(*CLI[2:], *TWO, *nodes, *steady, "--trainer.max_steps", "2"))
    run = Path("runs/tiny/version_2")
    (saved,) = (folder / run / "checkpoints").glob("*.ckpt")
    assert saved.is_dir() == (strategy == "zero_3")
    assert len(list(saved.glob("zero-*-of-00002.safetensors"))) == 2 * saved.is_dir()
    wait(on_both("fit", "--resume", str(run), "--trainer.max_steps", "3"))
    compare(folder, *steady)
