"""How long until a checkpoint is a model whose every weight can be read, and how much memory does it take at the most?

Each sample is a fresh process that has imported its library, reads from the page cache, and then sums all weights, so
that whoever only maps the file pays for reading it too. Peak memory is what the process held above what it held before,
mapped pages included. All contestants must end with the same sum. `torch.load` builds no model, only the state dict.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from timing import spread

OURS = {
    "sat_lightning, native": "native",
    "sat_lightning, SAT's format": "sat",
    "sat_lightning, Hugging Face's format": "hf",
}
PEERS = {
    "transformers, from_pretrained": "hf",
    "torch.load": "torch",
    "torch.load, mmap": "torch",
    "torch.load, mmap, and assign to our model": "torch",
}
HIDDEN_SIZE, VOCAB_SIZE = 1024, 16000


def make_config(num_bytes: float) -> Any:
    from sat_lightning import TransformerConfig

    per_layer = 12 * HIDDEN_SIZE**2 * 4
    num_layers = max(1, round((num_bytes - 2 * VOCAB_SIZE * HIDDEN_SIZE * 4) / per_layer))
    sizes = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": 16, "vocab_size": VOCAB_SIZE}
    return TransformerConfig(num_layers=num_layers, max_sequence_length=1024, **sizes)


def write(folder: Path, num_bytes: float) -> int:
    """Write the same model in every format; returns its bytes."""
    from sat_lightning.checkpoint import save_huggingface, save_sat
    from sat_lightning.models import GPT2Model

    model = GPT2Model(make_config(num_bytes))
    model.save_pretrained(folder / "native")
    save_sat(model, folder / "sat")
    save_huggingface(model, folder / "hf")
    torch.save(model.state_dict(), folder / "state.pt")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def make_loader(name: str, folder: Path) -> Callable[[], Any]:
    """Import what a contestant needs; returns what loads."""
    if name == "transformers, from_pretrained":
        import transformers

        return lambda: transformers.GPT2LMHeadModel.from_pretrained(folder / "hf").state_dict()
    if name == "torch.load":
        return lambda: torch.load(folder / "state.pt", weights_only=True)
    if name == "torch.load, mmap":
        return lambda: torch.load(folder / "state.pt", weights_only=True, mmap=True)
    from sat_lightning import AutoModel, TransformerConfig
    from sat_lightning.models import GPT2Model

    if name in OURS:
        return lambda: AutoModel.from_pretrained(folder / OURS[name]).state_dict()
    config = TransformerConfig.from_dict(json.loads((folder / "native" / "model_config.json").read_text()))

    def assign() -> Any:
        with torch.device("meta"):
            model = GPT2Model(config)
        model.load_state_dict(torch.load(folder / "state.pt", weights_only=True, mmap=True), assign=True)
        return model.state_dict()

    return assign


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def load_once(name: str, folder: Path) -> dict[str, float]:
    """Load in this process and return seconds, seconds with the sum, peak bytes, and the sum."""
    torch.set_num_threads(1)
    load = make_loader(name, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start, own = memory("VmRSS"), time.perf_counter(), time.process_time()
    state = load()
    loaded = time.perf_counter() - start
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in state.values())
    seconds = time.perf_counter() - start
    own = time.process_time() - own
    return {"loaded": loaded, "seconds": seconds, "own": own, "peak": memory("VmHWM") - before, "total": total}


def sample(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{name}: {found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def run(folder: Path, arguments: argparse.Namespace) -> str:
    num_bytes = write(folder, arguments.gigabytes * (1 << 30))
    names = [*OURS, *PEERS]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_id in range(arguments.rounds + 1):
        for name in names[round_id % len(names) :] + names[: round_id % len(names)]:
            found = sample(name, folder)
            if round_id:  # the first round fills the page cache
                samples[name].append(found)
    totals = {round(found["total"], 3) for name in names for found in samples[name]}
    if len(totals) != 1:
        raise SystemExit(f"the contestants have read different weights: {totals}")
    clock = "own" if arguments.own_time else "seconds"
    medians = {name: statistics.median(found[clock] for found in samples[name]) for name in names}
    best = min(medians[name] for name in PEERS)
    rows = [
        [
            name,
            spread([found["loaded"] for found in samples[name]], 2),
            spread([found["seconds"] for found in samples[name]], 2),
            spread([found["own"] for found in samples[name]], 2),
            f"{medians[name] / best:.2f}",
            spread([found["peak"] / num_bytes for found in samples[name]], 2),
        ]
        for name in names
    ]
    header = [
        "contestant",
        "returned after s",
        "every weight read after s",
        "CPU s",
        "of the best peer",
        "peak memory / model",
    ]
    import transformers

    return (
        f"\n{num_bytes / (1 << 30):.2f} GiB of fp32 weights; {arguments.rounds} rounds; median [lowest..highest].\n"
        f"{timing.machine('cpu')}; transformers {transformers.__version__}\n\n{timing.table(header, rows)}\n"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-time", action="store_true", help="compare CPU time, on a machine in use")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; default: a temporary folder")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="a small checkpoint, to see that all runs")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load_once(arguments.one, arguments.folder)))
        return
    if arguments.smoke:
        arguments.gigabytes = 0.05
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = run(Path(folder), arguments)
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
