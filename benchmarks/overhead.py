"""What does a step cost beside the model: in a bare loop, in plain Lightning, and in this package piece by piece?

The model is so small that everything around it shows. Every contestant trains the same model on the same batch with the
same optimizer; a sample is one run, timed from a warm step to its last one, so that building and closing do not count.
With `--zero` two processes train under ZeRO-2 on the CPU; the bare loop is DeepSpeed's own engine then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import timing
import torch
from lightning.pytorch.loggers import CSVLogger
from timing import spread

from sat_lightning import TransformerConfig
from sat_lightning.models import GPT2Model
from sat_lightning.training import (
    EMA,
    LanguageModelingTask,
    OptimConfig,
    RunMonitor,
    SkipNonFinite,
    TrainingProgressBar,
)

SIZES = dict(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=32, max_sequence_length=8)
BARE, MINIMAL = "bare loop", "Lightning, minimal"
ALL = "ours: guard + monitor + logging"
WARM = 20

Run = Callable[[int], float]


def make_model() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(TransformerConfig(**SIZES))


def make_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1].contiguous(), "target_ids": tokens[:, 1:].contiguous()}


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


class Minimal(L.LightningModule):
    """The least that Lightning can be given."""

    def __init__(self, num_logged: int = 0) -> None:
        super().__init__()
        self.model = make_model()
        self.num_logged = num_logged

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch)[0]
        for index in range(self.num_logged):
            self.log(f"loss_{index}", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)


class Batches:
    """One batch many times, from no loader: loading is measured elsewhere."""

    def __init__(self, count: int) -> None:
        self.count, self.batch = count, make_batch()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self.batch] * self.count)


class Stopwatch(L.Callback):
    """Times the steps after the first `WARM` ones."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.start, self.seconds = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM:
            self.start = self.clock()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = self.clock() - self.start


def run_bare(num_steps: int, clock: Callable[[], float]) -> float:
    model, batch = make_model(), make_batch()
    optimizer = make_optimizer(model)
    for step in range(WARM + num_steps):
        if step == WARM:
            start = clock()
        model(**batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock() - start


def run_engine(num_steps: int, clock: Callable[[], float]) -> float:
    import deepspeed

    model, batch = make_model(), make_batch()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=settings)
    for step in range(WARM + num_steps):
        if step == WARM:
            start = clock()
        engine.backward(engine(**batch)[0])
        engine.step()
    return clock() - start


def run_lightning(
    num_steps: int,
    clock: Callable[[], float],
    module: Callable[[], L.LightningModule],
    callbacks: Callable[[], list[L.Callback]] = list,
    is_logged: bool = False,
    has_bar: bool = False,
    is_zero: bool = False,
) -> float:
    stopwatch = Stopwatch(clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2 if is_zero else 1,
            strategy="zero_2" if is_zero else "auto",
            max_epochs=1,
            callbacks=[*callbacks(), stopwatch],
            logger=CSVLogger(folder) if is_logged else False,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=has_bar,
            default_root_dir=folder,
        )
        trainer.fit(module(), Batches(WARM + num_steps))
    return stopwatch.seconds


def make_runs(clock: Callable[[], float], is_zero: bool) -> dict[str, Run]:
    """Return each contestant as a function of the number of steps."""

    def ours() -> L.LightningModule:
        return LanguageModelingTask(make_model(), optim=OptimConfig(learning_rate=1e-4, schedule="constant"))

    def lightning(
        module: Callable[[], L.LightningModule], *callbacks: Callable[[], L.Callback], **settings: Any
    ) -> Run:
        made = lambda: [make() for make in callbacks]  # noqa: E731
        return lambda num_steps: run_lightning(num_steps, clock, module, made, is_zero=is_zero, **settings)

    bare = run_engine if is_zero else run_bare
    return {
        BARE: lambda num_steps: bare(num_steps, clock),
        MINIMAL: lightning(Minimal),
        "Lightning, one self.log a step": lightning(lambda: Minimal(1), is_logged=True),
        "ours, minimal": lightning(ours),
        "ours: logging": lightning(ours, is_logged=True),
        "ours: logging + RunMonitor": lightning(ours, RunMonitor, is_logged=True),
        "ours: logging + SkipNonFinite": lightning(ours, SkipNonFinite, is_logged=True),
        ALL: lightning(ours, SkipNonFinite, RunMonitor, is_logged=True),
        "ours: the same + EMA": lightning(ours, SkipNonFinite, RunMonitor, EMA, is_logged=True),
        "ours: the same + progress bar": lightning(
            ours, SkipNonFinite, RunMonitor, EMA, TrainingProgressBar, is_logged=True, has_bar=True
        ),
    }


def compare(runs: dict[str, Run], rounds: int, num_steps: int) -> timing.Samples:
    """Run every contestant once a round, in an order that rotates."""
    samples = timing.Samples({name: [] for name in runs})
    names = list(runs)
    for round_id in range(rounds):
        for name in names[round_id % len(names) :] + names[: round_id % len(names)]:
            with contextlib.redirect_stdout(io.StringIO()):  # the bar draws, but not here
                samples.seconds[name].append(runs[name](num_steps) / num_steps)
    return samples


def report(samples: timing.Samples, arguments: argparse.Namespace) -> str:
    """Return the table: what a step takes, and what that is more than Lightning and than the bare loop."""

    def more(name: str, than: str) -> str:
        pairs = zip(samples.seconds[name], samples.seconds[than], strict=True)
        return spread([own - other for own, other in pairs], 3, 1e3)

    rows = [
        [name, spread(samples.seconds[name], 3, 1e3), more(name, MINIMAL), more(name, BARE)] for name in samples.seconds
    ]
    ranks = "2 processes, ZeRO-2" if arguments.zero else "1 process"
    lines = [
        f"### Time of a step beside the model, {ranks}, cpu",
        "",
        timing.machine("cpu"),
        f"{SIZES}; logged every 10 steps; {arguments.rounds} rounds of {arguments.steps} steps, "
        + ("CPU time of one process." if arguments.own_time else "time on the clock."),
        "",
        timing.table(
            ["contestant", "step, ms", "more than minimal Lightning, ms, paired", "more than the bare loop"], rows
        ),
        "",
    ]
    return "\n".join(lines)


def start_ranks() -> None:
    """Run this script again as two ranks."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    raise SystemExit(subprocess.run([*command, *sys.argv[1:]], env=environment).returncode)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="timed in a sample")
    parser.add_argument("--zero", action="store_true", help="two processes under ZeRO-2")
    parser.add_argument("--own-time", action="store_true", help="CPU time of one process: for a machine that is busy")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all runs")
    arguments = parser.parse_args()
    if arguments.zero and "RANK" not in os.environ:
        start_ranks()
    if arguments.smoke:
        arguments.rounds, arguments.steps = 1, 10
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    runs = make_runs(time.process_time if arguments.own_time else time.perf_counter, arguments.zero)
    compare(runs, 1, 10)  # warm up: imports and first allocations
    text = report(compare(runs, arguments.rounds, arguments.steps), arguments)
    if os.environ.get("RANK", "0") == "0":
        print(text)
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
