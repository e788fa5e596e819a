"""Runs many cases in the same two processes, or more, since starting them is what takes long.

`python -m tests.zero_worker JOBS RESULTS [NUM_RANKS]`
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from tests.zero_cases import Case, run_case


def main(jobs: Path, results: Path, num_ranks: int = 2) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    found = {}
    for job in json.loads(jobs.read_text()):
        case = Case(**job["case"])
        try:
            arguments = {key: value for key, value in job.items() if key not in ("name", "case")}
            found[job["name"]] = run_case(case, num_ranks, rank, **arguments)
        except Exception:  # the others are still worth running
            found[job["name"]] = {"error": traceback.format_exc()}
    if rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
