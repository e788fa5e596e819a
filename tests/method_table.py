"""Rewrite the README's table of pairs of methods: `python -m tests.method_table`.

Every pair is really stacked, in both orders, on a tiny GPT-2: called, trained for a step, and compared. A row is the
method added first, a column the one added second.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_lightning.errors import SatError
from sat_lightning.training.freezing import freeze_base
from tests.families import FAMILIES
from tests.methods import METHODS, stir

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- method table: begin -->", "<!-- method table: end -->"
FAMILY = "gpt2"
LEGEND = (
    "`+` they stack, and the order changes nothing; `o` they stack, and the order matters: what is added later stands "
    "further out and works on what the earlier ones give; a number: refused, for the reason below."
)


@dataclass(frozen=True)
class Stack:
    """What came of adding two methods in one order."""

    logits: torch.Tensor | None = None
    error: str = ""


def stack(first: str, second: str, is_turned: bool = False) -> Stack:
    """Add two methods; either all their parameters get a gradient, or the second is refused and leaves no trace."""
    model = FAMILIES[FAMILY].build(num_layers=1)
    names = ["first", "second"]
    call = {**METHODS[first].call, **METHODS[second].call}
    METHODS[first].add(model, "first")
    try:
        METHODS[second].add(model, "second")
    except SatError as error:
        if "second" in model.mixins or any("second" in chain for chain in model.hook_origins.values()):
            raise AssertionError(f"{second} after {first}: refused, and left something behind") from error
        return Stack(error=_reason(str(error)))
    # The same values whichever comes first.
    order = reversed(names) if is_turned else names
    for name, method in zip(order, (first, second), strict=True):
        stir(model, [name], seed=sorted(METHODS).index(method) + 100 * (first == second and name == names[is_turned]))
    freeze_base(model, names)
    result = FAMILIES[FAMILY].run(model.train(), **call)
    result.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not result.isfinite().all():
        raise AssertionError(f"{second} after {first}: not finite")
    if first != second and any(not silent_is_expected(name, first, second) for name in silent):
        raise AssertionError(f"{second} after {first}: no gradient for {silent}")
    return Stack(result.detach())


def silent_is_expected(name: str, first: str, second: str) -> bool:
    """Beside the heads of tasks, of which a call chooses one, the model's own head has nothing to do."""
    heads = {method for method in (first, second) if METHODS[method].is_head}
    return "task-heads" in heads and not name.startswith(("mixins.first.heads", "mixins.second.heads"))


def _reason(error: str) -> str:
    """Say it of any two."""
    return re.sub(r"'(first|second)'", r"the \1", error.split("\n")[0]).replace("'first -> default'", "the first")


def stack_all() -> dict[tuple[str, str], Stack]:
    return {(first, second): stack(first, second) for first in METHODS for second in METHODS}


def read_cell(found: dict[tuple[str, str], Stack], first: str, second: str) -> str:
    """Return `+`, `o`, or the reason of a refusal."""
    one = found[first, second]
    other = stack(first, second, is_turned=True) if first == second else found[second, first]
    if one.logits is None:
        return one.error
    if other.logits is None or one.logits.shape != other.logits.shape:
        return "o"
    return "+" if torch.allclose(one.logits, other.logits, atol=1e-5, rtol=1e-4) else "o"


def make_table() -> str:
    """Stack everything."""
    found = stack_all()
    reasons: list[str] = []
    lines = [f"| first \\ second | {' | '.join(METHODS)} |", "|" + "---|" * (len(METHODS) + 1)]
    for first in METHODS:
        cells = []
        for second in METHODS:
            cell = read_cell(found, first, second)
            if len(cell) > 1:
                reasons += [cell] if cell not in reasons else []
                cell = str(reasons.index(cell) + 1)
            cells.append(cell)
        lines.append(f"| {first} | {' | '.join(cells)} |")
    return "\n".join([LEGEND, "", *lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def table_of(readme: str) -> str:
    return re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", readme, re.DOTALL)[1]


def main() -> None:
    readme, table = ROOT / "README.md", make_table()
    text = readme.read_text(encoding="utf-8")
    if BEGIN in text:
        readme.write_text(text.replace(table_of(text), table), encoding="utf-8")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
