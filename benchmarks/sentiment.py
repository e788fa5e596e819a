"""What the contestants of `finetune_sst2.py` have in common: batches, schedule, sizes, the weights to start from."""

from __future__ import annotations

import hashlib
import math
import random
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA, PREFIX_LENGTH, BOTTLENECK, CLASSES = 8, 16, 16, 64, 2
BATCH_SIZE, MAX_LENGTH, MULTIPLE_OF = 32, 64, 8
WARMUP, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 0.1, 0.01, (0.9, 0.999), 1e-8, 1.0
#: Sentences of about one length share a batch: so many batches' worth are sorted at a time.
WINDOW = 8
#: Method -> its learning rate, the same for both libraries.
METHODS = {"full": 5e-5, "lora": 1e-3, "prefix": 1e-2, "adapters": 1e-3, "prefix+lora": 2e-3}

Row = tuple[list[int], int]


@dataclass(frozen=True)
class Job:
    """One run: a method of fine-tuning with a seed; the same for every library."""

    model: Path
    data: Path
    method: str
    seed: int = 0
    epochs: int = 1
    sentences: int | None = None
    device: str = "cpu"
    threads: int | None = None


@dataclass
class Sentences:
    """The ids and the label of each sentence, in the order of training, and of each held-out one.

    Args:
        job: says which.
        encode: gives the ids of a sentence, special ones too, at most `MAX_LENGTH`.
    """

    job: Job
    encode: Callable[[str], list[int]]
    train: list[Row] = field(init=False)
    held_out: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        """Read the files, and draw the order."""
        rows = self._read("train.tsv", self.job.sentences)
        order = random.Random(self.job.seed)
        self.train = [row for _ in range(self.job.epochs) for row in shuffled(rows, order)]
        self.held_out = self._read("dev.tsv", self.job.sentences)
        if not self.train:
            raise SystemExit(f"{self.job.data} has less than {BATCH_SIZE} sentences to train on.")

    def _read(self, name: str, limit: int | None) -> list[Row]:
        """Return the ids and the label of each line; a header is left out."""
        lines = (self.job.data / name).read_text(encoding="utf-8").splitlines()
        rows = [line.rsplit("\t", 1) for line in lines]
        labelled = [row for row in rows if len(row) == 2 and row[1] in ("0", "1")][:limit]
        return [(self.encode(text), int(label)) for text, label in labelled]

    @property
    def tokens(self) -> list[int]:
        """How many tokens each step has, without padding."""
        lengths = [len(ids) for ids, _ in self.train]
        return [sum(lengths[start : start + BATCH_SIZE]) for start in range(0, len(lengths), BATCH_SIZE)]

    @property
    def num_steps(self) -> int:
        return len(self.train) // BATCH_SIZE

    @property
    def warmup_steps(self) -> int:
        return max(1, int(WARMUP * self.num_steps))

    def rate(self, step: int) -> float:
        """Return the fraction of the learning rate that a step has: linear, from the first step to 0 in the last."""
        rise, end = self.warmup_steps, self.num_steps - 1
        return (step + 1) / rise if step < rise else (end - step) / max(1, end - rise)

    def digest(self) -> str:
        """What is equal for equal sentences in equal order."""
        return hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:16]


def shuffled(rows: list[Row], order: random.Random) -> list[Row]:
    """Return the rows of an epoch, `BATCH_SIZE` after `BATCH_SIZE`; what does not fill a batch is left out."""
    rows, size = order.sample(rows, len(rows)), WINDOW * BATCH_SIZE
    windows = [sorted(rows[start : start + size], key=lambda row: len(row[0])) for start in range(0, len(rows), size)]
    batches = [
        window[start : start + BATCH_SIZE]
        for window in windows
        for start in range(0, len(window) - BATCH_SIZE + 1, BATCH_SIZE)
    ]
    return [row for batch in order.sample(batches, len(batches)) for row in batch]


@torch.no_grad()
def draw(job: Job, head: nn.Linear, down: Iterable[Tensor], fill_prefix: Callable[[Tensor], Any], width: int) -> None:
    """Give every library the same start; the distributions are those of PEFT.

    Args:
        job: its seed decides.
        head: the linear of the head.
        down: the first factors of LoRA: layer by layer query, key, value, output.
        fill_prefix: takes a table `[prefix length, width]`: for each layer keys, then values, of all heads.
        width: of the table.
    """
    source = torch.Generator().manual_seed(job.seed)
    nn.init.normal_(head.weight, std=0.005, generator=source)
    nn.init.zeros_(head.bias)
    for factor in down:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=source)
    if job.method == "prefix":
        fill_prefix(torch.empty(PREFIX_LENGTH, width).normal_(generator=source))


def facts(groups: list[dict[str, Any]], sentences: Sentences, device: str) -> dict[str, Any]:
    """Return what a run must have in common with others, and its peak memory until now."""
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = [(sum(p.numel() for p in group["params"]), group["weight_decay"]) for group in groups]
    return {
        "trained": sum(size for size, _ in sizes),
        "decayed": sum(size for size, decay in sizes if decay),
        "data": sentences.digest(),
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else on_host,
    }
