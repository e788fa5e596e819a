"""How fast is it known which sample comes next, how much memory does that take, and how long does it take to resume?

Three sources of 70, 20 and 10 % of all samples are mixed 0.5 / 0.3 / 0.2. Contestants run in a process of their own, on
one thread, in CPU time of that process. No sample is read: this is what a sampler costs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timing import machine, spread, table

SIZES = [10**6, 10**9, 10**12]
PROBABILITIES = (0.5, 0.3, 0.2)
BATCH_SIZE = 8
RESUME_STEP = 10**9


class Contestant(NamedTuple):
    """One way to mix; `make` builds what iterates over indices, from a step on if it can."""

    name: str
    make: Callable[[int, int], Iterator[int]]
    limit: int
    why: str
    needs: str = ""
    can_resume: bool = False


def parts(size: int) -> list[int]:
    return [size * 7 // 10, size // 5, size // 10]


def ours(size: int, step: int) -> Iterator[int]:
    from sat_lightning.data.batches import Place, ShardedBatches
    from sat_lightning.data.mixture import Mixture, Share

    shares = [Share(probability=probability) for probability in PROBABILITIES]
    batches = ShardedBatches(Mixture(parts(size), shares, stop="never"), BATCH_SIZE)
    batches.start_at(Place(0, step * BATCH_SIZE), 10**9)
    return (index for batch in batches for index in batch)


def ours_one_source(size: int, step: int) -> Iterator[int]:
    from sat_lightning.data.batches import Place, ShardedBatches
    from sat_lightning.data.mixture import Mixture

    batches = ShardedBatches(Mixture([size]), BATCH_SIZE)
    batches.start_at(Place(*divmod(step * BATCH_SIZE, size)), 10**9)
    return (index for batch in batches for index in batch)


def torch_weighted(size: int, step: int) -> Iterator[int]:
    import torch
    from torch.utils.data import WeightedRandomSampler

    weights = torch.cat(
        [torch.full((part,), p / part, dtype=torch.double) for part, p in zip(parts(size), PROBABILITIES, strict=True)]
    )
    return iter(WeightedRandomSampler(weights, size))


def hugging_face(size: int, step: int) -> Iterator[int]:
    import datasets

    starts = [0, *accumulate(parts(size))]
    sources = [
        datasets.Dataset.from_dict({"index": np.arange(start, start + part)}).shuffle(seed=0)
        for start, part in zip(starts, parts(size), strict=False)
    ]
    mixed = datasets.interleave_datasets(sources, probabilities=list(PROBABILITIES), seed=0)
    return (index for rows in mixed.iter(1000) for index in rows["index"])


def sat_style(size: int, step: int) -> Iterator[int]:
    """SAT's way: each index seeds a generator of its own, which draws a source and a row, with replacement."""
    cumulative = list(accumulate(PROBABILITIES))
    lengths, starts = parts(size), [0, *accumulate(parts(size))]
    for index in range(step * BATCH_SIZE, 10**15):
        seeds = random.Random(index)
        draw = np.random.RandomState([seeds.randint(0, 2**32 - 1) for _ in range(16)])
        source = bisect(cumulative, draw.rand() * cumulative[-1])
        yield starts[source] + int(draw.randint(lengths[source]))


CONTESTANTS = [
    Contestant("ours, three sources", ours, 10**12, "", can_resume=True),
    Contestant("ours, one source", ours_one_source, 10**12, "", can_resume=True),
    Contestant("torch WeightedRandomSampler", torch_weighted, 10**6, "refused: more than 2**24 weights"),
    Contestant("datasets.interleave_datasets", hugging_face, 10**6, "not run: it lists all indices", "datasets"),
    Contestant("SAT's way", sat_style, 10**12, "", can_resume=True),
]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(contestant: Contestant, size: int, num_indices: int, rounds: int) -> dict[str, list[float]]:
    """Time one contestant in this process."""
    # The libraries' own memory and imports are not in the numbers.
    list(islice(contestant.make(1000, 0), 100))
    before = peak_megabytes()
    results: dict[str, list[float]] = {"start": [], "rate": [], "resume": []}
    for _ in range(rounds):
        start = time.process_time()
        indices = contestant.make(size, 0)
        first = next(indices)
        results["start"].append(time.process_time() - start)
        taken = sum(1 for _ in islice(indices, num_indices))
        # What lists everything at the start pays for its indices there.
        results["rate"].append((taken + 1) / (time.process_time() - start))
        if not 0 <= first < size:
            raise SystemExit(f"{contestant.name}: index {first} of {size}")
        if contestant.can_resume:
            start = time.process_time()
            next(contestant.make(size, RESUME_STEP))
            results["resume"].append(time.process_time() - start)
    results["memory"] = [peak_megabytes() - before]
    return results


def measure_alone(contestant: Contestant, size: int, num_indices: int, rounds: int) -> dict[str, list[float]]:
    """Time one contestant in a process of its own."""
    arguments = ["--only", contestant.name, "--size", str(size), "--indices", str(num_indices), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"{contestant.name}: {found.stderr}")
    results: dict[str, list[float]] = json.loads(found.stdout.splitlines()[-1])
    return results


def row(contestant: Contestant, size: int, num_indices: int, rounds: int, is_smoke: bool) -> list[str]:
    """Measure a contestant and describe it."""
    head = [contestant.name, f"1e{len(str(size)) - 1}"]
    if contestant.needs and find_spec(contestant.needs) is None:
        return [*head, f"{contestant.needs} is not installed", "-", "-", "-"]
    if size > contestant.limit:
        return [*head, contestant.why, "-", "-", "-"]
    results = (measure if is_smoke else measure_alone)(contestant, size, num_indices, rounds)
    resume = spread(results["resume"], 2, 1e3) if results["resume"] else "draws all again"
    memory = f"{results['memory'][0]:.1f}"
    return [*head, spread(results["rate"], 3, 1e-6), spread(results["start"], 2, 1e3), resume, memory]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--indices", type=int, default=10**6, help="taken in each round")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="a few indices, to see that all runs")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        contestant = next(contestant for contestant in CONTESTANTS if contestant.name == arguments.only)
        print(json.dumps(measure(contestant, arguments.size, arguments.indices, arguments.rounds)))
        return
    num_indices = 1000 if arguments.smoke else arguments.indices
    sizes = SIZES[:1] if arguments.smoke else SIZES
    # SAT's way is slow enough that a tenth of the indices tells its rate.
    rows = [
        row(one, size, num_indices // 10 if one.make is sat_style else num_indices, arguments.rounds, arguments.smoke)
        for one in CONTESTANTS
        for size in sizes
    ]
    header = ["contestant", "samples", "million indices/s", "start, ms", f"resume at step {RESUME_STEP:.0e}, ms"]
    header += ["memory, MB"]
    text = "\n".join(
        [
            "### Which sample comes next",
            "",
            machine("cpu"),
            f"Three sources mixed {PROBABILITIES}; batches of {BATCH_SIZE}; {num_indices} indices a round,",
            f"{arguments.rounds} rounds, CPU time of one thread, start included in the rate; median [min..max].",
            "",
            table(header, rows),
            "",
        ]
    )
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
