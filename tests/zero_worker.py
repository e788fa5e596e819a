"""Runs many cases in the same two processes, or more: `python -m tests.zero_worker JOBS NUM_RANKS RESULTS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.processes import run_each
from tests.zero_cases import Case, run_case


def main(jobs: Path, num_ranks: int, results: Path) -> None:
    by_name = {job.pop("name"): job for job in json.loads(jobs.read_text())}
    rank = int(os.environ.get("LOCAL_RANK", 0))

    def run(name: str) -> dict[str, Any]:
        job = by_name[name]
        return run_case(Case(**job.pop("case")), num_ranks, rank, **job)

    run_each(by_name, run, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
