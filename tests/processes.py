"""Tests whose ranks are real processes: many checks run in the same two, since starting them is what takes long.

The test launches a worker, a module or a script, and the worker's Trainer starts the other rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What a strategy that ran in this process has left in its environment, and would mislead others.
RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}


def launch(*words: str, timeout: float = 1200) -> None:
    """Run Python with these words, wait, and fail with what it said if it failed."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | ours
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def results_of(module: str, folder: Path, *words: str) -> dict[str, Any]:
    """Launch a module that ends in `run_each`, its last word a file for the results; return them."""
    results = folder / "results.json"
    launch("-m", module, *words, str(results))
    return json.loads(results.read_text())


def run_each(names: Iterable[str], run: Callable[[str], Any], results: Path) -> None:
    """Run everything by name, in a process of each rank; rank 0 writes what it found, or the error of each."""
    found = {}
    for name in names:
        try:
            found[name] = run(name)
        except Exception:  # the others are still worth running
            found[name] = {"error": traceback.format_exc()}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        results.write_text(json.dumps(found))
