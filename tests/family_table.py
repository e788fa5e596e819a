"""Rewrite the README's table of families: `python -m tests.family_table`.

Lines of code are counted alike on both sides: no blank line, no comment, no docstring. Of a family's file count its
classes and what they use; the tables of names (`key_maps`, and what only they use) do not. The differences are measured
now: recorded cases are run again, and the tests of parity, in this process.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import statistics
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_lightning.model.registry import registered_models
from sat_lightning.models import import_families

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- family table: begin -->", "<!-- family table: end -->"
HEADER = "| family | classes | lines | Hugging Face's file: lines | difference to SAT | difference to Hugging Face |"
_QUIET = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Row:
    """One file of `sat_lightning/models`."""

    family: str
    file: str
    classes: tuple[type[Any], ...]
    lines: int

    @property
    def begin(self) -> str:
        """What is known without running anything."""
        names = ", ".join(f"`{cls.__name__}`" for cls in self.classes)
        return f"| [{self.family}]({self.file}) | {names} | {self.lines} |"


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _QUIET:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return found


def family_lines(text: str, class_names: set[str]) -> int:
    """Count the code of some classes of a module and of what they use, without their `key_maps`."""
    statements = {name: node for node in ast.parse(text).body for name in _defined(node)}
    kept, left_out, todo = set(), set(), list(class_names)
    while todo:
        node = statements.get(todo.pop())
        if node is None or node in kept:
            continue
        kept.add(node)
        parts = [node]
        if isinstance(node, ast.ClassDef):
            tables = [part for part in node.body if "key_maps" in _defined(part)]
            left_out |= {line for part in tables for line in range(part.lineno, part.end_lineno + 1)}
            parts = [*node.bases, *node.keywords, *node.decorator_list, *node.body]
            parts = [part for part in parts if part not in tables]
        todo += [name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)]
        todo += re.findall(r"\w+", " ".join(_annotations(node)))
    lines = {line for node in kept for line in range(_first_line(node), node.end_lineno + 1)}
    return len(lines & code_lines(text) - left_out)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _annotations(node: ast.stmt) -> Iterator[str]:
    """Annotations that are strings, whose names `ast` does not see."""
    for part in ast.walk(node):
        for field in ("annotation", "returns"):
            if isinstance(value := getattr(part, field, None), ast.Constant) and isinstance(value.value, str):
                yield value.value


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def read_rows() -> list[Row]:
    """Every family with its classes, in the order of file names."""
    import_families()
    found = defaultdict(list)
    for cls in registered_models().values():
        if cls.__module__.startswith("sat_lightning.models."):
            found[cls.__module__.rpartition(".")[2]].append(cls)
        elif cls.__name__ == "EncoderDecoderModel":  # registered by its family, and at home among the bases
            found["encoder_decoder"].append(cls)
    rows = []
    for family, classes in sorted(found.items()):
        file = Path(inspect.getsourcefile(classes[0]))
        lines = family_lines(file.read_text(encoding="utf-8"), {cls.__name__ for cls in classes})
        rows.append(Row(family, file.relative_to(ROOT).as_posix(), tuple(classes), lines))
    return rows


def their_files(row: Row) -> dict[str, int]:
    """Hugging Face's modeling files that the family's key maps speak of, and their lines of code."""
    import transformers

    found = {}
    for cls in row.classes:
        for architecture in (name for key_map in cls.key_maps for name in key_map.architectures):
            file = Path(inspect.getsourcefile(getattr(transformers, architecture)))
            found[file.stem] = len(code_lines(file.read_text(encoding="utf-8")))
    return found


def measure_cases() -> dict[str, list[float]]:
    """Class -> the largest difference of each recorded case."""
    from tests.golden_cases import Case, case_names

    found = defaultdict(list)

    class MeasuredCase(Case):
        largest = 0.0

        def compare(self, got, key):
            super().compare(got, key)
            self.largest = max(self.largest, (got - self.tensors[key]).abs().max().item())

    for name in case_names():
        case = MeasuredCase(name)
        case.check()
        found[case.record["model_class"]].append(case.largest)
    return found


def measure_parity() -> dict[tuple[str, str], float]:
    """(our class, theirs) -> the largest difference of fp32 outputs, from the tests of parity."""
    import pytest

    from tests import hf_parity

    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "hf_parity" in file.read_text()]
    if pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files]):
        raise SystemExit("tests of parity fail: see above")
    return hf_parity.MEASURED


def make_table() -> str:
    """Count and measure everything."""
    cases, parity, lines = measure_cases(), measure_parity(), [HEADER, "|" + "---|" * 6]
    rows = read_rows()
    for row in rows:
        names = {cls.__name__ for cls in row.classes}
        theirs = [f"`{name}`: {count}" for name, count in their_files(row).items()]
        ours = [difference for name in names for difference in cases.get(name, ())]
        other = {name: difference for (own, name), difference in parity.items() if own in names}
        lines.append(
            f"{row.begin} {'<br>'.join(theirs) or 'not in transformers'} | {_say(ours, 'recorded case')} | "
            f"{_say(list(other.values()), 'class', 'classes')} |"
        )
    lines += ["", f"Median: {statistics.median(row.lines for row in rows):g} lines."]
    return "\n".join(lines)


def _say(differences: list[float], one: str, many: str = "") -> str:
    if not differences:
        return "-"
    return f"{max(differences):.0e} ({len(differences)} {one if len(differences) == 1 else many or one + 's'})"


def table_of(readme: str) -> str:
    return re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", readme, re.DOTALL)[1]


def main() -> None:
    readme = ROOT / "README.md"
    table = make_table()
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(table_of(text), table), encoding="utf-8")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
