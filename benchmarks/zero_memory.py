"""What does each ZeRO stage leave on a rank, on 1, 2 and 4 of them, beside what theory says?

Bytes are counted from the tensors that live after a step, on the rank that has most: weights, and what the optimizer
keeps (an fp32 copy of the weights where they are bf16, and two moments). They do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from sat_lightning import TransformerConfig
from sat_lightning.models import GPT2Model
from sat_lightning.training import LanguageModelingTask, SATDeepSpeedStrategy, ZeroOptions
from sat_lightning.training.zero_state import find_fragments

STAGES = (0, 1, 2, 3)
LENGTH = 32


class Count(L.Callback):
    """Bytes on this rank, after a step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.num_parameters = 0

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        parameters = list(pl_module.parameters())
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        # Under ZeRO-3 a parameter's own tensor is empty but where it was small enough to stay whole.
        weights = sum(_size(getattr(p, "ds_tensor", p)) for p in parameters)
        flats = {id(f.flat): f for f in find_fragments(trainer.model)}
        own = {id(parameter) for parameter in parameters}
        masters = sum(_size(f.flat) for key, f in flats.items() if key not in own)
        moments = sum(_size(v) for f in flats.values() for v in f.state.values() if torch.is_tensor(v) and v.dim())
        self.bytes = [weights, masters + moments]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measure(num_ranks: int, is_smoke: bool) -> dict[str, list[int]]:
    """Run one step in each stage; every rank calls this."""
    sizes = dict(num_layers=2, hidden_size=64) if is_smoke else dict(num_layers=6, hidden_size=384)
    config = TransformerConfig(**sizes, num_attention_heads=2, vocab_size=4096, max_sequence_length=LENGTH)
    ids = torch.randint(0, 4096, (LENGTH + 1,))
    rows = [{"input_ids": ids[:-1], "target_ids": ids[1:]}] * (2 * num_ranks)
    found = {}
    for stage in STAGES:
        count = Count()
        with tempfile.TemporaryDirectory() as root:
            trainer = L.Trainer(
                accelerator="cpu", devices=num_ranks, precision="bf16-mixed", max_steps=1, callbacks=[count],
                strategy=SATDeepSpeedStrategy(stage, options=ZeroOptions(persistence_threshold=0)), logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=root,
            )  # fmt: skip
            trainer.fit(LanguageModelingTask(lambda: GPT2Model(config)), DataLoader(rows, batch_size=1))
        most = count.bytes
        if num_ranks > 1:
            everywhere: list[Any] = [None] * num_ranks
            torch.distributed.all_gather_object(everywhere, count.bytes)
            most = [max(values) for values in zip(*everywhere, strict=True)]
        found[str(stage)] = [*most, count.num_parameters]
    return found


def theory(stage: int, num_ranks: int) -> tuple[float, float]:
    """Bytes a parameter: of weights, and of the optimizer."""
    return 2 / (num_ranks if stage == 3 else 1), 12 / (num_ranks if stage else 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on 1 and 2 ranks")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--worker", nargs=2, metavar=("RANKS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        found = measure(int(options.worker[0]), options.smoke)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            Path(options.worker[1]).write_text(json.dumps(found))
        return
    lines = ["| stage | ranks | weights, bytes a parameter (theory) | optimizer, bytes a parameter (theory) |"]
    lines += ["| --- | --- | --- | --- |"]
    num_parameters, measured = 0, {}
    for num_ranks in (1, 2) if options.smoke else (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            smoke = ["--smoke"] if options.smoke else []
            subprocess.run([sys.executable, __file__, *smoke, "--worker", str(num_ranks), str(file)], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            measured[num_ranks] = json.loads(file.read_text())
    for stage in STAGES:
        for num_ranks, found in measured.items():
            weights, optimizer, num_parameters = found[str(stage)]
            expected = theory(stage, num_ranks)
            cells = [f"{got / num_parameters:.2f} ({wanted:.2f})" for got, wanted in
                     zip((weights, optimizer), expected, strict=True)]  # fmt: skip
            lines.append(f"| zero_{stage} | {num_ranks} | {cells[0]} | {cells[1]} |")
    text = "\n".join([*lines, "", f"A GPT-2 of {num_parameters:,} parameters, bf16-mixed; the rank that has most."])
    print(text)
    if options.output:
        with options.output.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
