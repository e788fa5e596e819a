"""The benchmarks run, on tiny models; what they measure is not judged here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(text: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_step(dtype, tmp_path):
    output = tmp_path / "table.md"
    text = run("train_step.py", "--rounds", "2", "--dtype", dtype, "--peers", "ours", "plain", "--output", str(output))
    table = rows(text)
    assert list(table) == ["sat_lightning", "plain PyTorch (nanoGPT style)"]
    assert output.read_text().strip() == text.strip()
    for step, tokens, ratio, fraction, memory in table.values():
        assert re.fullmatch(r"\d+\.\d \[\d+\.\d\.\.\d+\.\d\]", step)
        assert float(tokens) > 0 and float(ratio.split()[0]) > 0 and float(fraction) >= 0 and float(memory) >= 0
    assert table["plain PyTorch (nanoGPT style)"][2] == "1.000 [1.000..1.000]"


def test_train_step_of_every_peer():
    """The script itself refuses contestants whose first losses differ."""
    table = rows(run("train_step.py", "--rounds", "1", "--no-memory"))
    assert list(table)[2:] == ["transformers, tuned", "transformers, default"]
    assert {row[-1] for row in table.values()} == {"-"}


def test_hook_overhead():
    table = rows(run("hook_overhead.py", "--rounds", "3"))
    assert list(table) == ["no hooks", "hook table, no mixin", "5 wrapping mixins"]
    assert table["no hooks"][2] == "0.000 %"


def test_data_loading():
    """The script itself refuses contestants that read different samples."""
    table = rows(run("data_loading.py", "--rounds", "2"))
    kinds = [name.partition(": ")[0] for name in table]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [2, 2, 3, 4, 1]
    for name, (rate, ratio, prepared) in table.items():
        assert re.fullmatch(r"\d+ \[\d+\.\.\d+\]", rate) and float(prepared) >= 0
        assert (ratio == "1") == name.endswith((": ours", ": ours, by URL"))


def test_data_index():
    table = rows(run("data_index.py", "--rounds", "1"))
    assert list(table) == [
        "ours, three sources",
        "ours, one source",
        "torch WeightedRandomSampler",
        "datasets.interleave_datasets",
        "SAT's way",
    ]
    for name in ("ours, three sources", "ours, one source"):
        size, rate, start, resume, memory = table[name]
        assert size == "1e6" and float(rate.split()[0]) > 0 and float(memory) < 50
        assert float(start.split()[0]) < 50 and float(resume.split()[0]) < 50
    assert table["torch WeightedRandomSampler"][3] == "draws all again"


def test_decode():
    """The script itself refuses contestants that write different texts."""
    text = run("decode.py", "--rounds", "1", "--batch-sizes", "2", "--peers", "ours", "hf")
    table = rows(text)
    assert list(table) == ["sat_lightning", "transformers, dynamic cache", "reading every weight once"]
    for speed, ratio, share in table.values():
        assert float(speed.split()[0]) > 0 and float(ratio.split()[0]) > 0 and float(share) >= 0


@pytest.mark.slow  # a process for each contestant and round
def test_loading():
    """The script itself refuses contestants that read different weights."""
    table = rows(run("loading.py", "--rounds", "1"))
    assert len(table) == 7 and list(table)[0] == "sat_lightning, native"
    assert all(float(row[4].split()[0]) > 0.5 for row in table.values())


OVERHEAD = [
    "bare loop",
    "Lightning, minimal",
    "Lightning, one self.log a step",
    "ours, minimal",
    "ours: logging",
    "ours: logging + RunMonitor",
    "ours: logging + SkipNonFinite",
    "ours: guard + monitor + logging",
    "ours: the same + EMA",
    "ours: the same + progress bar",
]


@pytest.mark.parametrize(
    "words", [["--own-time"], pytest.param(["--zero"], marks=pytest.mark.slow)], ids=["alone", "zero"]
)
@pytest.mark.timeout(600)
def test_overhead(words, tmp_path):
    output = tmp_path / "table.md"
    table = rows(run("overhead.py", *words, "--output", str(output)))
    assert list(table) == OVERHEAD and output.read_text().count("### ") == 1
    assert all(float(step.split()[0]) > 0 for step, *_ in table.values())
    assert table["bare loop"][2] == table["Lightning, minimal"][1] == "0.000 [0.000..0.000]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_memory_falls_as_theory_says():
    text = run("zero_memory.py")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "zero_" in line]
    assert len(lines) == 8
    for _, _, *cells in lines:
        for cell in cells:
            measured, theory = (float(number) for number in cell.strip(")").split(" ("))
            assert measured == pytest.approx(theory, rel=0.02)


def test_lora_step():
    """The script itself refuses contestants whose first losses differ."""
    table = rows(run("lora_step.py", "--rounds", "1"))
    assert [name.partition(",")[0] for name in table] == ["sat_lightning", "sat_lightning", *["transformers"] * 2]
    trained = [int(row[0]) for row in table.values()]
    assert trained[0] == trained[2] == trained[3] < trained[1]
