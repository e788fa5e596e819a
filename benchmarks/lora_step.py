"""How fast is one step of LoRA (forward, backward, fused AdamW over the adapter) beside transformers with PEFT?

The same GPT-2 with the same weights; rank 8 on the projections of attention. See README.md beside this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import peers
import timing
import torch
from peers import Loss, Shape
from torch import nn
from train_step import DTYPES, SMOKE, Step, first_losses, make_step

RANK, ALPHA = 8, 16
REFERENCE = "transformers, tuned, with PEFT"


def ours(shape: Shape, target: str) -> tuple[nn.Module, Loss]:
    from sat_lightning.mixins import LoraMixin

    model, loss = peers.sat_lightning(shape)
    lora = LoraMixin(model.config, rank=RANK, alpha=ALPHA, target=target)
    model.add_mixin("lora", lora)
    model.requires_grad_(False)
    lora.requires_grad_(True)
    return model, loss


def with_peft(shape: Shape, build: Callable[[Shape], tuple[nn.Module, Loss]]) -> tuple[nn.Module, Loss]:
    from peft import LoraConfig, get_peft_model

    model, loss = build(shape)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["c_attn", "attn.c_proj"], lora_dropout=0.0, fan_in_fan_out=True
    )
    get_peft_model(model, config)  # changes the model in place: `loss` calls it as it is
    return model, loss


CONTESTANTS: dict[str, Callable[[Shape], tuple[nn.Module, Loss]]] = {
    "sat_lightning, q, k, v as one": lambda shape: ours(shape, r"attention\.(query_key_value|dense)$"),
    "sat_lightning, q, k, v apart": lambda shape: ours(shape, r"attention\.(query_key_value|dense)"),
    REFERENCE: lambda shape: with_peft(shape, peers.hugging_face_tuned),
    "transformers, default, with PEFT": lambda shape: with_peft(shape, peers.hugging_face),
}


def build(name: str, shape: Shape, arguments: argparse.Namespace) -> tuple[Step, int]:
    """Return a function that runs one step and returns its loss, and how many parameters it trains."""
    torch.manual_seed(0)
    model, loss = CONTESTANTS[name](shape)
    model.to(arguments.device, DTYPES[arguments.dtype]).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return make_step(loss, trained, shape, arguments), sum(parameter.numel() for parameter in trained)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="amp: fp32 weights, bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--own-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the contest and print its table."""
    arguments = parse()
    shape = SMOKE if arguments.smoke else Shape()
    if arguments.own_time:
        torch.set_num_threads(1)
    built = {name: build(name, shape, arguments) for name in CONTESTANTS}
    steps = {name: step for name, (step, _) in built.items()}
    first_losses(steps, shape, arguments.dtype)
    for step in steps.values():
        step()
    samples = timing.measure(steps, arguments.rounds, device=arguments.device, own_time=arguments.own_time)
    header = ["contestant", "trained", "step ms, median [min..max]", "tokens/s", f"speed / {REFERENCE}, paired"]
    rows = [
        [
            name, str(built[name][1]), timing.spread(samples.seconds[name], 1, 1e3),
            f"{shape.num_tokens / samples.median(name):.0f}", timing.spread(samples.ratios(name, REFERENCE), 3),
        ]
        for name in steps
    ]  # fmt: skip
    mode = "compiled" if arguments.compile else "eager"
    note = "CPU time of one thread" if arguments.own_time else samples.note()
    text = "\n".join([
        f"### LoRA step, rank {RANK}, {arguments.dtype}, {mode}, {arguments.device}", "",
        timing.machine(arguments.device), f"{shape}; {arguments.rounds} rounds; {note}.", "",
        timing.table(header, rows), "",
    ])  # fmt: skip
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
