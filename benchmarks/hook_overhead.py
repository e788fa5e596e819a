"""What does it cost that every seam may be overridden?

The dispatch is Python between the operators: its time depends on the number of layers, not on the size of tensors. So
it is measured where nothing hides it, on a model of the same depth and tiny width, and set against the step of the real
width, in CPU time of one thread. Compared are the model, the same modules called directly without any hook or keyword,
and the model with mixins that wrap every seam and only pass on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from peers import PEERS, Shape
from timing import spread
from torch import Tensor

from sat_lightning import BaseMixin, non_conflict
from sat_lightning.hooks import SEAMS
from sat_lightning.models import GPT2Model
from sat_lightning.nn.attention_fn import attention_fn_default
from sat_lightning.nn.head import project

TINY = Shape(hidden_size=12, num_attention_heads=6, vocab_size=16, length=4, batch_size=1)
SMOKE = Shape(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, length=16, batch_size=2)
NUM_MIXINS = 5
#: Steps of the tiny model in one sample.
REPEAT = 20
#: Those the GPT-2 forward passes through.
WRAPPED = [seam for seam in SEAMS if seam not in ("cross_attention_forward", "routing_forward", "final_forward")]

Run = Callable[[], Tensor]


def _pass_on(seam: str) -> Callable[..., Any]:
    def hook(self: BaseMixin, *args: Any, old_impl: Callable[..., Any], **kw: Any) -> Any:
        return old_impl(*args, **kw)

    hook.__name__ = seam
    return non_conflict(hook)


PassOnMixin = type("PassOnMixin", (BaseMixin,), {seam: _pass_on(seam) for seam in WRAPPED})


def direct_loss(model: GPT2Model, input_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Call the model's own modules and functions one after the other: the same operators, no hook in between."""
    backbone = model.transformer
    position_ids = torch.arange(input_ids.shape[1])[None]
    x = backbone.word_embeddings(input_ids) + backbone.position_embeddings(position_ids)
    causal = x.new_ones(1, 1)
    for layer in backbone.layers:
        attention, mlp = layer.attention, layer.mlp
        shape = (*x.shape[:2], attention.num_attention_heads, -1)
        mixed = attention.query_key_value(layer.input_layernorm(x))
        query, key, value = (part.view(shape).transpose(1, 2) for part in mixed.split(attention.sizes, -1))
        context = attention_fn_default(query, key, value, causal, causal_mask=causal)
        x = x + attention.dense(context.transpose(1, 2).flatten(2))
        inner = mlp.activation_func(mlp.dense_h_to_4h(layer.post_attention_layernorm(x)))
        x = x + mlp.dense_4h_to_h(inner)
    x = backbone.final_layernorm(x)
    return project(x, model.get_mixin("gpt2-final").lm_head.weight, target_ids=target_ids)


def build(shape: Shape, num_mixins: int, is_direct: bool = False) -> Run:
    """Return a step without the optimizer: forward and backward."""
    torch.manual_seed(0)
    model: Any = PEERS["sat_lightning"](shape)[0]
    for index in range(num_mixins):
        model.add_mixin(f"pass-on-{index}", PassOnMixin())
    tokens = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.length + 1))
    input_ids, target_ids = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Tensor:
        if is_direct:
            loss = direct_loss(model, input_ids, target_ids)
        else:
            loss = model(input_ids, target_ids=target_ids)[0]
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.detach()

    return step


def compare(shape: Shape, rounds: int, repeat: int) -> timing.Samples:
    """Time the three variants at one shape; a sample is `repeat` steps."""
    runs = {
        "no hooks": build(shape, 0, is_direct=True),
        "hook table, no mixin": build(shape, 0),
        f"{NUM_MIXINS} wrapping mixins": build(shape, NUM_MIXINS),
    }
    losses = [run() for run in runs.values()]
    if not all(torch.equal(loss, losses[0]) for loss in losses):
        raise SystemExit(f"The variants do not compute the same loss: {losses}")

    def repeated(run: Run) -> Callable[[], None]:
        def sample() -> None:
            for _ in range(repeat):
                run()

        return sample

    contestants = {name: repeated(run) for name, run in runs.items()}
    for run in contestants.values():
        run()
    samples = timing.measure(contestants, rounds, own_time=True)
    for name, seconds in samples.seconds.items():
        samples.seconds[name] = [x / repeat for x in seconds]
    return samples


def report(tiny: timing.Samples, real: timing.Samples, shape: Shape, rounds: tuple[int, int]) -> str:
    """Return the table: absolute cost where it can be seen, and its share of a real step."""
    base, *_ = names = list(tiny.seconds)
    step = real.median(base)
    rows = []
    for name in names:
        extra = [own - other for own, other in zip(tiny.seconds[name], tiny.seconds[base], strict=True)]
        share = f"{100 * sorted(extra)[len(extra) // 2] / step:.3f} %"
        rows.append(
            [name, spread(tiny.seconds[name], 0, 1e6), spread(extra, 0, 1e6), share]
            + [spread(real.seconds[name], 1, 1e3), spread([1 / x for x in real.ratios(name, base)], 3)]
        )
    header = ["variant", "tiny step, us", "more than without hooks, us, paired", "of a real step"]
    header += ["real step, ms", "real step, ratio, paired"]
    return "\n".join(
        [
            "### Cost of the hook table, fp32, eager, cpu (forward and backward, no optimizer)",
            "",
            timing.machine("cpu"),
            f"Tiny: {TINY}; real: {shape}. The mixins wrap {len(WRAPPED)} seams each: {', '.join(WRAPPED)}.",
            f"CPU time of one thread; tiny: {rounds[0]} rounds of {REPEAT} steps, real: {rounds[1]} rounds.",
            "",
            timing.table(header, rows),
            "",
        ]
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of the tiny model; the real one runs a third of them")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument(
        "--smoke", action="store_true", help="a small model in place of the real one, to see that all runs"
    )
    arguments = parser.parse_args()
    shape = SMOKE if arguments.smoke else Shape()
    rounds = (arguments.rounds, max(2, arguments.rounds // 3))
    torch.set_num_threads(1)
    tiny = compare(TINY, rounds[0], repeat=REPEAT)
    real = compare(shape, rounds[1], repeat=1)
    text = report(tiny, real, shape, rounds)
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
