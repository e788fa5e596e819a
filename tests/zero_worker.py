"""Runs many cases in the same two processes, since starting them is what takes long: `python -m tests.zero_worker`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from tests.zero_cases import Case, run_case


def main(jobs: Path, results: Path) -> None:
    rank, num_ranks = int(os.environ.get("LOCAL_RANK", 0)), 2
    found = {}
    for job in json.loads(jobs.read_text()):
        case = Case(**job["case"])
        try:
            found[job["name"]] = run_case(case, num_ranks, rank, job.get("folder"), job.get("resume"))
        except Exception:  # the others are still worth running
            found[job["name"]] = {"error": traceback.format_exc()}
    if rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
