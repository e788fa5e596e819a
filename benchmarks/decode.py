"""How many tokens a second does a model write, beside transformers and litgpt, and beside what memory allows?

Greedy, from a GPT-2 with the same weights in this project and in transformers, and of the same sizes in litgpt (if it
is installed); see README.md beside this.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import peers
import timing
import torch
from peers import Shape
from timing import Samples, spread
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, LIMIT = "sat_lightning", "reading every weight once"
Writer = Callable[[], Tensor]


def ours(shape: Shape, prompts: Tensor, arguments: argparse.Namespace, **options: object) -> Writer:
    from sat_lightning.generation import generate

    model = peers.sat_lightning(shape)[0].eval().to(arguments.device, DTYPES[arguments.dtype])

    def write() -> Tensor:
        results = generate(model, prompts, max_new_tokens=arguments.new_tokens, **options)
        return torch.tensor([result.tokens for result in results])

    return write


def ours_compiled(shape: Shape, prompts: Tensor, arguments: argparse.Namespace) -> Writer:
    return ours(shape, prompts, arguments, compile=True)


def hugging_face(shape: Shape, prompts: Tensor, arguments: argparse.Namespace, cache: str = "dynamic") -> Writer:
    model = peers.hugging_face_tuned(shape)[0].eval().to(arguments.device, DTYPES[arguments.dtype])
    count = arguments.new_tokens
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    options |= {} if cache == "dynamic" else {"cache_implementation": cache, "disable_compile": True}

    @torch.no_grad()
    def write() -> Tensor:
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return tokens[:, prompts.shape[1] :].cpu()

    return write


def hugging_face_static(shape: Shape, prompts: Tensor, arguments: argparse.Namespace) -> Writer:
    return hugging_face(shape, prompts, arguments, cache="static")


def litgpt(shape: Shape, prompts: Tensor, arguments: argparse.Namespace) -> Writer | None:
    """The same sizes with weights of its own: its positions are rotary."""
    try:
        from litgpt.config import Config
        from litgpt.generate.base import batched_generate_fn, generate
        from litgpt.model import GPT
    except ImportError:
        return None
    config = Config(
        name="gpt", n_layer=shape.num_layers, n_head=shape.num_attention_heads, n_embd=shape.hidden_size,
        vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size, block_size=shape.length, bias=True,
        lm_head_bias=False, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", gelu_approximate="tanh",
        parallel_residual=False, intermediate_size=4 * shape.hidden_size, rotary_percentage=1.0,
    )  # fmt: skip
    model = GPT(config).eval().to(arguments.device, DTYPES[arguments.dtype])
    total = prompts.shape[1] + arguments.new_tokens
    model.set_kv_cache(len(prompts), total, device=arguments.device, dtype=DTYPES[arguments.dtype])

    def write() -> Tensor:
        if len(prompts) == 1:
            tokens = generate(model, prompts[0], total, temperature=0.0, include_prompt=False)
            return tokens[None].cpu()
        how = {"temperature": 0.0, "top_k": None, "top_p": 1.0}
        steps = batched_generate_fn(model, prompts, total, sample_args=how, include_prompt=False, include_eos=True)
        return torch.stack([torch.stack([token.view(()) for token in step]) for step in steps], dim=1).cpu()

    return write


CONTESTANTS: dict[str, Callable[..., Writer | None]] = {
    OURS: ours,
    "sat_lightning, compiled": ours_compiled,
    "transformers, dynamic cache": hugging_face,
    "transformers, static cache": hugging_face_static,
    "litgpt": litgpt,
}
#: Short names for the command line.
ALIASES = dict(zip(("ours", "ours-compiled", "hf", "hf-static", "litgpt"), CONTESTANTS, strict=True))
#: Which need not agree with ours token for token: other positions.
OTHER_MODEL = frozenset(["litgpt"])


def limit(shape: Shape, arguments: argparse.Namespace) -> tuple[Writer, int]:
    """Return a loop that reads all weights once a token and computes next to nothing, and how many bytes that is."""
    numbers = (shape.num_layers * 12 * shape.hidden_size + shape.vocab_size) * shape.hidden_size
    num_bytes = numbers * DTYPES[arguments.dtype].itemsize
    weights = torch.randn(num_bytes // 4, device=arguments.device)

    @torch.no_grad()
    def read() -> Tensor:
        for _ in range(arguments.new_tokens):
            result = weights.amax()
        return result

    return read, num_bytes


def check_equal(written: dict[str, Tensor], arguments: argparse.Namespace) -> None:
    """Refuse contestants with the same weights that write different texts (in bf16 near ties may fall otherwise)."""
    for name, tokens in written.items():
        expected = written.get(OURS, tokens)
        if tokens.shape[1] != arguments.new_tokens:
            raise SystemExit(f"{name} wrote {list(tokens.shape)} tokens, not {arguments.new_tokens}.")
        if arguments.dtype == "fp32" and name not in OTHER_MODEL and not torch.equal(tokens, expected):
            raise SystemExit(f"{name} and {OURS} write different texts.")


def contest(shape: Shape, batch_size: int, prompt_length: int, arguments: argparse.Namespace) -> str:
    """Measure one table."""
    torch.manual_seed(0)
    prompts = torch.randint(0, shape.vocab_size, (batch_size, prompt_length), device=arguments.device)
    built = {name: CONTESTANTS[name](shape, prompts, arguments) for name in map(ALIASES.get, arguments.peers) if name}
    writers = {name: writer for name, writer in built.items() if writer is not None}
    check_equal({name: write() for name, write in writers.items()}, arguments)  # which warms up, too
    read, num_bytes = limit(shape, arguments)
    read()
    samples = timing.measure(
        {**writers, LIMIT: read}, arguments.rounds, device=arguments.device, own_time=arguments.own_time
    )
    return report(samples, batch_size, prompt_length, num_bytes, arguments)


def report(samples: Samples, batch_size: int, prompt_length: int, num_bytes: int, arguments: argparse.Namespace) -> str:
    """Return the table, and the lines above it that say how to read it."""
    count = batch_size * arguments.new_tokens
    others = [name for name in samples.seconds if name != LIMIT and not name.startswith(OURS)]
    fastest = min(others, key=samples.median, default=None)
    rows = []
    for name in samples.seconds:
        ratio = "-" if fastest is None else spread(samples.ratios(name, fastest), 2)
        share = statistics.median(samples.ratios(name, LIMIT))
        rows.append([name, spread([count / x for x in samples.seconds[name]], 0), ratio, f"{share:.2f}"])
    rate = num_bytes * arguments.new_tokens / samples.median(LIMIT) / 1e9
    measured = "CPU time of one thread" if arguments.own_time else samples.note()
    header = ["contestant", "tokens/s, median [min..max]", "speed / fastest peer, paired", "of the read limit"]
    return "\n".join(
        [
            f"### Decoding, {arguments.dtype}, batch {batch_size}, prompt {prompt_length}, {arguments.device}",
            "",
            f"{timing.machine(arguments.device)}",
            f"{arguments.new_tokens} new tokens, greedy; weights of {num_bytes / 1e6:.1f} MB, read at {rate:.1f} GB/s.",
            f"{arguments.rounds} rounds; {measured}; fastest peer: {fastest}.",
            "",
            timing.table(header, rows),
            "",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", nargs="+", type=int, default=[256, 1024], help="prompt and new tokens together")
    parser.add_argument("--new-tokens", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=8)
    quick = [name for name in ALIASES if name != "ours-compiled"]
    parser.add_argument("--peers", nargs="+", choices=ALIASES, default=quick, help="compilation takes a minute or more")
    parser.add_argument("--own-time", action="store_true", help="CPU time of one thread: for a machine that is busy")
    parser.add_argument("--output", type=Path, help="append the tables to this file")
    parser.add_argument("--quick", action="store_true", help="32 new tokens, 3 rounds, context 256")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    found = parser.parse_args(arguments)
    if found.quick:
        found.new_tokens, found.rounds, found.context = 32, 3, [256]
    if found.smoke:
        found.new_tokens, found.context = 8, [16]
    return found


def main() -> None:
    """Run every contest and print its table."""
    arguments = parse()
    if arguments.own_time:
        torch.set_num_threads(1)
    for context in arguments.context:
        shape = Shape(length=context)
        if arguments.smoke:
            shape = Shape(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=64, length=context)
        for batch_size in arguments.batch_sizes:
            text = contest(shape, batch_size, context - arguments.new_tokens, arguments)
            print(text)
            if arguments.output:
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
