"""Runs many cases in the same two processes, since starting them is what takes long: `python -m tests.zero_worker`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from tests.zero_cases import Case, run_case


def main(cases: Path, results: Path) -> None:
    rank, num_ranks = int(os.environ.get("LOCAL_RANK", 0)), 2
    found = {}
    for values in json.loads(cases.read_text()):
        case = Case(**values)
        try:
            found[str(case)] = run_case(case, num_ranks, rank)
        except Exception:  # the others are still worth running
            found[str(case)] = {"error": traceback.format_exc()}
    if rank == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
