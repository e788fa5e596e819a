"""Questions and summaries that every machine with Python has: what its functions do, in their authors' words."""

import ast
import sysconfig
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sat_lightning.data.records import check_index
from sat_lightning.data.sources import register_source
from sat_lightning.errors import DataError

_LONGEST = 400


@register_source("docstrings://", records=True)
class DocstringRecords(Dataset[Any]):
    """Functions and classes of the standard library's own modules, about 3000 rows of four fields.

    `prompt` asks what one does, `answer` is the first line of its docstring and the end of the line; `text` is the rest
    of it (its first 400 characters), and `summary` the same first line. Only docstrings with a rest are rows.

    Args:
        path: a module file, such as `shutil.py`; empty for all modules that are no packages.

    Raises:
        DataError: there are none.
    """

    def __init__(self, path: str = "") -> None:
        self.name = f"docstrings://{path}"
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in sorted(folder.glob(path or "*.py")) if not file.name.startswith("_sysconfigdata")]
        self._rows = [row for file in files for row in _read(file)]
        if not self._rows:
            raise DataError(
                f"{self.name}: no docstrings under {folder}. Use an interpreter installed with its sources, or data of "
                "your own."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        check_index(self, index)
        return self._rows[index]


def _read(file: Path) -> list[dict[str, str]]:
    rows = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            summary, _, rest = doc.partition("\n")
            if rest.strip():
                prompt = f"What does {file.stem}.{node.name} do?\n"
                text = " ".join(rest.split())[:_LONGEST]
                rows.append({"prompt": prompt, "answer": f"{summary}\n", "text": text, "summary": summary})
    return rows
