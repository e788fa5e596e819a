"""Rewrite the README's support matrix from test results: `python tests/support_matrix.py results.xml`."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"


@dataclass(frozen=True)
class Row:
    """One promise and the tests behind it, as beginnings of test ids."""

    feature: str
    tests: tuple[str, ...]


def read_rows(path: Path = ROOT / "tests" / "support.yaml") -> list[Row]:
    return [Row(row["feature"], tuple(row["tests"])) for row in yaml.safe_load(path.read_text(encoding="utf-8"))]


def read_results(path: Path) -> dict[str, bool]:
    """Return test id -> whether it passed; what was skipped did not."""
    results = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        results[f"{file}::{case.get('name')}"] = len(case.findall("*[@message]")) == 0
    return results


def make_table(rows: list[Row], results: dict[str, bool]) -> str:
    lines = ["| feature | tests | state |", "|---|---|---|"]
    for row in rows:
        outcomes = [passed for name, passed in results.items() if name.startswith(row.tests)]
        state = "works" if outcomes and all(outcomes) else "fails" if outcomes else "not tested"
        lines.append(f"| {row.feature} | {sum(outcomes)} of {len(outcomes)} pass | {state} |")
    return "\n".join(lines)


def table_of(readme: str) -> str:
    return re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", readme, re.DOTALL)[1]


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = make_table(read_rows(), read_results(Path(sys.argv[1])))
    readme.write_text(text.replace(table_of(text), table), encoding="utf-8")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
