"""A run that is killed and resumed equals, to the last bit, the run that was not: real processes and real signals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, *jobs: dict[str, Any]) -> list[int]:
    """Make runs one after the other, in processes of their own; return their exit codes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = [{**job, "folder": str(folder / job["folder"])} for job in jobs]
    command = [sys.executable, "-m", "tests.resume_runs", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def result(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "result.pt", weights_only=False)


def assert_same(one: Any, other: Any, where: str = "result") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), (where, one, other)
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, f"{where}:\n{one}\n{other}"


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "steps, and the last step of an epoch": ({}, [{"kill_at": 5}, {"kill_at": 12}]),
    "ends of epochs": ({"saver": {}, "max_epochs": 3, "max_steps": -1, "log_every": 3}, [{"kill_at": 17}]),
    "validation, saved before it": (
        {"validate_every": 3, "saver": {"every_n_train_steps": 3}},
        [{"kill_at": 4}, {"kill_at": 8}],
    ),
    "validation, saved after it, with workers": (
        {"validate_every": 4, "num_workers": 2, "saver": {"monitor": "val_loss", "save_top_k": -1}},
        [{"kill_at": 6}, {"kill_at": 11}],
    ),
    "accumulation": (
        {"accumulate": 3, "validate_every": 4, "saver": {"monitor": "val_loss", "save_top_k": -1}, "max_steps": 6},
        [{"kill_at": 6}, {"kill_at": 14}],
    ),
    "while a checkpoint is written": ({"saver": {"every_n_train_steps": 2, "save_last": True}}, [{"kill_writing": 4}]),
    "a stranger's pipeline, between epochs": (
        {"plain": True, "saver": {}, "max_epochs": 3, "max_steps": -1, "validate_every": 1.0},
        [{"kill_at": 13}, {"kill_at": 23}],
    ),
    "signals: in a window, in validation, of another kind": (
        {"accumulate": 2, "validate_every": 5, "max_steps": 8, "ema": True, "saver": {"every_n_train_steps": 3}},
        [{"signal_at": [15, "train", 3]}, {"signal_at": [15, "val", 501]}, {"signal_at": [10, "train", 11]}],
    ),
    "a signal to one of two ranks": (
        {"ranks": 2, "accumulate": 2, "validate_every": 3, "max_steps": 5, "saver": {"none": True}},
        [{"signal_at": [15, "val", 301]}, {"signal_at": [12, "train", 7]}],
    ),
    "a signal to one of two ranks, told with the guard's question": (
        {"ranks": 2, "accumulate": 2, "validate_every": 3, "max_steps": 4, "saver": {"none": True}, "guard": True},
        [{"signal_at": [12, "train", 5]}],
    ),
    "two ranks": ({"ranks": 2, "max_steps": 9, "log_every": 2, "saver": {"every_n_train_steps": 3}}, [{"kill_at": 8}]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """All cases in one process tree, for the imports take longest: each whole, and in parts."""
    folder = tmp_path_factory.mktemp("resume")
    jobs, counts = [], []
    for number, (settings, kills) in enumerate(CASES.values()):
        jobs.append(settings | {"folder": f"{number}/whole"})
        jobs += [settings | {"folder": f"{number}/parts"} | kill for kill in [*kills, {}]]
        counts.append(2 + len(kills))
    codes = iter(run(folder, *jobs))
    return folder, {case: [next(codes) for _ in range(count)] for case, count in zip(CASES, counts, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_killed_run_equals_the_unbroken_one(finished: tuple[Path, dict[str, list[int]]], case: str) -> None:
    folder, codes = finished
    number = list(CASES).index(case)
    first, *killed, last = codes[case]
    said = "".join(path.read_text()[-3000:] for path in sorted((folder / str(number)).glob("*.txt")))
    assert first == last == 0 and all(killed), f"{codes[case]}\n{said}"
    parts, whole = (result(folder / str(number) / name) for name in ("parts", "whole"))
    # Lightning keeps the checkpoints that a run was resumed from, beside those that the unbroken run keeps.
    assert set(parts.pop("files")) >= set(whole.pop("files"))
    assert_same(parts, whole)
    if number == list(CASES).index("signals: in a window, in validation, of another kind"):
        assert killed == [128 + signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGUSR1]


def test_other_number_of_ranks_and_requeueing_by_slurm(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > called\n')
    (tmp_path / "scontrol").chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "localhost"}
    signalled = {"environment": job, "signal_at": [signal.SIGUSR1, "train", 5], "saver": {"every_n_train_steps": 2}}
    codes = run(
        tmp_path,
        {"folder": "ranks", "ranks": 2, "max_steps": 8, "kill_at": 5},
        {"folder": "ranks", "max_steps": 8},
        signalled | {"folder": "slurm"},
    )
    assert codes[0] and codes[1:] == [0, 128 + signal.SIGUSR1]
    said = (tmp_path / "ranks.txt").read_text()
    assert "saved by 2 ranks and 1 resume it. The data goes on where it was" in said
    assert result(tmp_path / "ranks")["counts"][0] == 8
    assert (tmp_path / "called").read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 5 and "exact_resume" in saved


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
def test_soak_of_twenty_kills(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    settings: dict[str, Any] = {
        "num_rows": 44,
        "max_steps": 40,
        "accumulate": draw.choice([1, 3]),
        "validate_every": draw.choice([None, 4]),
        "num_workers": draw.choice([0, 2]),
        "saver": {"every_n_train_steps": draw.choice([1, 2]), "save_last": True},
        "ema": True,
    }
    jobs: list[dict[str, Any]] = [settings | {"folder": "whole"}]
    for number in range(20):
        kill = {"kill_writing": draw.randint(2, 4)} if draw.random() < 0.4 else {"kill_at": 0}
        if "kill_at" in kill:
            kill["kill_at"] = draw.randint(6 * number + 1, 6 * number + 12) * settings["accumulate"] // 3
        jobs.append(settings | {"folder": "parts"} | kill)
    jobs.append(settings | {"folder": "parts"})
    codes = run(tmp_path, *jobs)
    said = (tmp_path / "parts.txt").read_text()[-3000:]
    assert set(codes) <= {0, -9} and codes.count(-9) >= 10, (codes, said)
    parts, whole = (result(tmp_path / name) for name in ("parts", "whole"))
    assert set(parts.pop("files")) >= set(whole.pop("files"))
    assert_same(parts, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero_1", "zero_2", "zero_3"])
def test_killed_zero_run_equals_the_unbroken_one(tmp_path: Path, strategy: str) -> None:
    settings = {"strategy": strategy, "validate_every": 3, "saver": {"every_n_train_steps": 2}}
    kills: list[dict[str, Any]] = [{"kill_at": 5}, {}]
    codes = run(tmp_path, settings | {"folder": "whole"}, *[settings | {"folder": "parts"} | kill for kill in kills])
    assert codes == [0, -9, 0], (tmp_path / "parts.txt").read_text()[-3000:]
    parts, whole = (result(tmp_path / name) for name in ("parts", "whole"))
    assert set(parts.pop("files")) >= set(whole.pop("files"))
    assert_same(parts, whole)
