"""How fast is one training step (forward, backward, fused AdamW), and how much memory does it take?

The same GPT-2 with the same weights in this project, in plain PyTorch and in transformers; see README.md beside this.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import timing
import torch
from peers import ALIASES, PEERS, Loss, Shape
from timing import Samples, spread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}
SMOKE = Shape(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, length=16, batch_size=2)
REFERENCE = ALIASES["plain"]
#: Dense bf16 TFLOP/s by the maker's data sheet.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}

Step = Callable[[], torch.Tensor]


def build(peer: str, shape: Shape, arguments: argparse.Namespace) -> Step:
    """Return a function that runs one step of a peer and returns its loss."""
    torch.manual_seed(0)
    model, loss = PEERS[peer](shape)
    model.to(arguments.device, DTYPES[arguments.dtype])
    return make_step(loss, list(model.parameters()), shape, arguments)


def make_step(loss: Loss, trained: list[torch.nn.Parameter], shape: Shape, arguments: argparse.Namespace) -> Step:
    """Return a function that runs one step of AdamW over these parameters, and returns the loss before it."""
    if arguments.compile:
        loss = torch.compile(loss)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.manual_seed(1)  # the contestants have drawn differently much
    tokens = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.length + 1), device=arguments.device)
    input_ids, target_ids = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    is_amp = arguments.dtype == "amp"

    def step() -> torch.Tensor:
        with torch.autocast(arguments.device, torch.bfloat16) if is_amp else nullcontext():
            value = loss(input_ids, target_ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def first_losses(steps: dict[str, Step], shape: Shape, dtype: str) -> dict[str, float]:
    """Run a first step of each; they start from the same weights, so they must agree."""
    losses = {name: step().item() for name, step in steps.items()}
    tolerance = 1e-3 if dtype == "fp32" else 0.06
    if (
        max(losses.values()) - min(losses.values()) > tolerance
        or abs(min(losses.values()) - math.log(shape.vocab_size)) > 1
    ):
        raise SystemExit(f"The contestants do not compute the same loss: {losses}")
    return losses


def peak_memory(peer: str, arguments: argparse.Namespace) -> float:
    """Return the MiB that steps add to the model, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", peer, "--device", arguments.device, "--dtype", arguments.dtype]
    command += ["--compile"] * arguments.compile + ["--smoke"] * arguments.smoke
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"Measuring the memory of {peer} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])["peak_mib"]


def print_own_memory(shape: Shape, arguments: argparse.Namespace) -> None:
    """Run three steps of one contestant, and print the highest memory over that of the built model as JSON."""
    step = build(arguments.memory_of, shape, arguments)
    if arguments.compile:  # the compiler's own memory is not the step's
        step()
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    for _ in range(3):
        step()
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else _status("VmHWM")
    print(json.dumps({"peak_mib": (peak - before) / 2**20}))


def _reset_peak() -> float:
    """Let the kernel forget the highest memory so far; return the memory in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return _status("VmRSS")


def _status(name: str) -> float:
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024.0


def report(
    samples: Samples, memory: dict[str, float], shape: Shape, rate: list[float], arguments: argparse.Namespace
) -> str:
    """Return the table, and the lines above it that say how to read it."""
    best_rate = max(rate)
    header = ["contestant", "step ms, median [min..max]", "tokens/s", f"speed / {REFERENCE}, paired", "of matmul rate"]
    peak = _peak_flops(arguments)
    header += ["MFU"] * bool(peak) + ["peak MiB over the model"]
    rows = []
    for name in (name for name in samples.seconds if name != "matmul"):
        seconds = samples.median(name)
        row = [name, spread(samples.seconds[name], 1, 1e3), f"{shape.num_tokens / seconds:.0f}"]
        row += [spread(samples.ratios(name, REFERENCE), 3)] if REFERENCE in samples.seconds else ["-"]
        row += [f"{shape.flops / seconds / best_rate:.2f}"] + ([f"{shape.flops / seconds / peak:.3f}"] if peak else [])
        rows.append([*row, f"{memory[name]:.0f}" if name in memory else "-"])
    mode = "compiled" if arguments.compile else "eager"
    return "\n".join(
        [
            f"### Training step, {arguments.dtype}, {mode}, {arguments.device}",
            "",
            f"{timing.machine(arguments.device)}",
            f"{shape}: {shape.flops / 1e9:.1f} GFLOP a step; large-matmul rate {spread(rate, 0, 1e-9)} GFLOP/s, "
            f"fractions are of the best.",
            f"{arguments.rounds} rounds; " + ("CPU time of one thread" if arguments.own_time else samples.note()) + ".",
            "",
            timing.table(header, rows),
            "",
        ]
    )


def _peak_flops(arguments: argparse.Namespace) -> float:
    if arguments.device != "cuda" or arguments.dtype == "fp32":
        return 0.0
    return next((x * 1e12 for name, x in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), 0.0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="amp: fp32 weights, bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--peers", nargs="+", choices=ALIASES, default=list(ALIASES))
    parser.add_argument("--own-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory column out")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--memory-of", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the contest and print its table."""
    arguments = parse()
    shape = SMOKE if arguments.smoke else Shape()
    if arguments.own_time:
        torch.set_num_threads(1)
    if arguments.memory_of:
        print_own_memory(shape, arguments)
        return
    peers = [ALIASES[alias] for alias in arguments.peers]
    memory = {} if arguments.no_memory else {peer: peak_memory(peer, arguments) for peer in peers}
    steps = {peer: build(peer, shape, arguments) for peer in peers}
    first_losses(steps, shape, arguments.dtype)
    size = 128 if arguments.smoke else 2048 if arguments.device == "cpu" else 8192
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    product, flops = timing.matmul(size, dtype, arguments.device)
    contestants: dict[str, Callable[[], object]] = {**steps, "matmul": product}
    for run in contestants.values():  # warm up: first steps allocate, and compile
        for _ in range(2):
            run()
    samples = timing.measure(contestants, arguments.rounds, device=arguments.device, own_time=arguments.own_time)
    rate = [flops / seconds for seconds in samples.seconds["matmul"]]
    text = report(samples, memory, shape, rate, arguments)
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
