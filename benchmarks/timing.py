"""Fair timing of several contestants on a machine that others use too.

Contestants run round by round in one process, the order rotated, so that drift hits all alike; ratios are paired within
a round. A sample during which other processes used the CPU is taken again.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

STAT = Path("/proc/stat")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass
class Samples:
    """Seconds by contestant, one per round, and how many samples were taken again, or kept although disturbed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    redone: int = 0
    disturbed: int = 0

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """How many times the time of `to` is the time of `name`, round by round."""
        return [other / own for own, other in zip(self.seconds[name], self.seconds[to], strict=True)]

    def note(self) -> str:
        kept = sum(map(len, self.seconds.values()))
        return (
            f"{kept} samples kept; {self.redone} taken again because another process used the CPU; "
            f"{self.disturbed} kept although disturbed"
        )


def measure(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    *,
    device: str = "cpu",
    max_redo: int = 6,
    own_time: bool = False,
) -> Samples:
    """Time every contestant once a round.

    Args:
        contestants: what to run, warmed up already.
        rounds: number of rounds.
        device: `cuda` is synchronised around a sample; there the CPU's other users do not matter.
        max_redo: how often a disturbed sample is taken again, at most.
        own_time: count this process's own CPU time instead of the clock on the wall; others hardly disturb it, but it
            means something for one thread only.
    """
    samples = Samples({name: [] for name in contestants})
    names = list(contestants)
    for round_id in range(rounds):
        for name in names[round_id % len(names) :] + names[: round_id % len(names)]:
            run = contestants[name]
            samples.seconds[name].append(_own_sample(run) if own_time else _sample(run, device, max_redo, samples))
    return samples


def _sample(run: Callable[[], object], device: str, max_redo: int, samples: Samples) -> float:
    for attempt in range(max_redo + 1):
        synchronize(device)
        busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - start
        own, busy = time.process_time() - own, busy_seconds() - busy
        # The kernel counts in ticks: two of them are within its error.
        is_disturbed = device == "cpu" and busy - own > 0.03 * seconds + 2 / TICKS_PER_SECOND
        if not is_disturbed:
            return seconds
        if attempt < max_redo:
            samples.redone += 1
            time.sleep(0.2)
    samples.disturbed += 1
    return seconds


def _own_sample(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine (and its host, as steal) have used; 0 where nobody counts."""
    if not STAT.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_SECOND


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul(size: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """Return one large matrix product into ready memory, and its FLOPs: the rate that nothing can beat."""
    left, right, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Format `median [min..max]`."""
    low, middle, high = (scale * x for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str) -> str:
    """Describe where the numbers were measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        models = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
        name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}; Python {platform.python_version()}"
