"""The laws of the house, read from the syntax trees: layers, imports, budgets, and what a forward may not do.

Each rule takes the parsed sources and yields one line for each violation; planted violations test the rules themselves.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sat_lightning"
LAYERS = "errors config hooks nn model mixins models checkpoint|generation|data training __init__ cli __main__"
RANKS = {layer: rank for rank, layers in enumerate(LAYERS.split()) for layer in layers.split("|")}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
FORWARD_LAYERS = {"nn", "model", "mixins", "models"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FORWARD_LINES, MAX_CONSTRUCTOR_PARAMETERS = 300, 50, 30, 8
VALUE_READING_METHODS = {"all", "any", "max", "min", "sum", "equal", "allclose", "isnan", "isfinite", "is_nonzero"}
MACHINE_PATH = re.compile(r"(?<![\w.}/-])/(?:work|home|root|Users|tmp|opt|mnt)/\w")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the repository, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return self.path.split("/")[1].removesuffix(".py")


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name."""

    target: str
    line: int
    is_lazy: bool
    is_typing_only: bool

    @property
    def layer(self) -> str | None:
        head, _, rest = self.target.partition(".")
        if head != PACKAGE or rest == "__version__":
            return None
        return rest.split(".")[0] if rest.split(".")[0] in RANKS else "__init__"


def read_sources(root: Path) -> list[Source]:
    sources = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        sources.append(Source(path.relative_to(root).as_posix(), text, ast.parse(text)))
    return sources


def imported_names(node: ast.AST, source: Source) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        folder = source.path.split("/")[: -node.level] if node.level else []
        module = ".".join([*folder, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names] if module == PACKAGE else [module]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "importlib.import_module",
        "import_module",
        "__import__",
    }:
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def find_imports(source: Source) -> Iterator[Import]:
    def visit(node: ast.AST, is_lazy: bool, is_typing_only: bool) -> Iterator[Import]:
        for name in imported_names(node, source):
            yield Import(name, node.lineno, is_lazy, is_typing_only)
        is_typing_test = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            is_guarded = is_typing_test and child in node.body
            yield from visit(child, is_lazy or isinstance(node, Function), is_typing_only or is_guarded)

    return visit(source.tree, False, False)


def layers_import_only_downward(sources: list[Source]) -> Iterator[str]:
    """Law 1; an import that only a type checker sees is free."""
    for source in sources:
        if source.layer not in RANKS:
            yield f"{source.path}:1: {source.layer!r} has no place among the layers of law 1"
            continue
        for found in find_imports(source):
            is_own_or_foreign = found.layer in (None, source.layer)
            if not (is_own_or_foreign or found.is_typing_only or RANKS[source.layer] > RANKS[found.layer]):
                yield f"{source.path}:{found.line}: {source.layer} imports {found.target}, which is not below it"


def only_training_and_cli_import_lightning(sources: list[Source]) -> Iterator[str]:
    """Law 2, first half."""
    for source in sources:
        for found in find_imports(source):
            if found.target.split(".")[0] in LIGHTNING and source.layer not in {"training", "cli", "__main__"}:
                yield f"{source.path}:{found.line}: only training/ and cli.py import lightning"


def one_file_imports_deepspeed_lazily(sources: list[Source]) -> Iterator[str]:
    """Law 2, second half."""
    files = set()
    for source in sources:
        for found in (found for found in find_imports(source) if found.target.split(".")[0] == "deepspeed"):
            files.add(source.path)
            if not (found.is_lazy or found.is_typing_only):
                yield f"{source.path}:{found.line}: deepspeed is imported at module level; import it where it is used"
    if len(files) > 1:
        yield f"{', '.join(sorted(files))}: more than one file imports deepspeed"


def budgets_hold(sources: list[Source]) -> Iterator[str]:
    """Law 7; a docstring counts, as it does for the reader."""
    for source in sources:
        if (num_lines := len(source.text.splitlines())) > MAX_FILE_LINES:
            yield f"{source.path}:1: {num_lines} lines, a file has at most {MAX_FILE_LINES}"
        for node in (node for node in ast.walk(source.tree) if isinstance(node, Function)):
            limit = MAX_FORWARD_LINES if node.name == "forward" else MAX_FUNCTION_LINES
            if (num_lines := node.end_lineno - node.lineno + 1) > limit:
                yield f"{source.path}:{node.lineno}: {node.name} has {num_lines} lines of at most {limit}"
            names = {argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
            num_parameters = len(names - {"self", "config"})
            if node.name == "__init__" and num_parameters > MAX_CONSTRUCTOR_PARAMETERS:
                limit = MAX_CONSTRUCTOR_PARAMETERS
                yield f"{source.path}:{node.lineno}: a constructor with {num_parameters} parameters of at most {limit}"


def forwards_read_no_tensor(sources: list[Source]) -> Iterator[str]:
    """Law 4: no value leaves a tensor, neither by itself nor to decide a branch."""
    for source in (source for source in sources if source.layer in FORWARD_LAYERS):
        for node in ast.walk(source.tree):
            if method_called(node) in {"item", "tolist"}:
                yield f"{source.path}:{node.lineno}: .{method_called(node)}() reads a tensor on the host"
            tests = node.ifs if isinstance(node, ast.comprehension) else [getattr(node, "test", None)]
            for call in (call for test in tests if test is not None for call in ast.walk(test)):
                if method_called(call) in VALUE_READING_METHODS:
                    yield f"{source.path}:{call.lineno}: a branch is decided by .{method_called(call)}()"


def method_called(node: ast.AST) -> str | None:
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None


def library_neither_prints_nor_asserts(sources: list[Source]) -> Iterator[str]:
    """Output belongs to the command line; input is checked by raising, as -O removes an assert. Narrowing is free."""
    for source in (source for source in sources if source.layer not in {"cli", "__main__"}):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{source.path}:{node.lineno}: print() outside cli.py"
            narrowing = r"isinstance\(.*\)|[\w.]+ is not None"
            if isinstance(node, ast.Assert) and not re.fullmatch(narrowing, ast.unparse(node.test)):
                yield f"{source.path}:{node.lineno}: assert; raise an error of errors.py instead"


def public_names_have_docstrings(sources: list[Source]) -> Iterator[str]:
    def visit(node: ast.AST, name: str, path: str) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield f"{path}:{getattr(node, 'lineno', 1)}: {name} has no docstring"
        for child in [] if isinstance(node, Function) else node.body:
            if isinstance(child, (ast.ClassDef, *Function)) and not child.name.startswith("_"):
                if not any(ast.unparse(mark).endswith(("overload", ".setter")) for mark in child.decorator_list):
                    yield from visit(child, child.name, path)

    for source in sources:
        yield from visit(source.tree, "the module", source.path)


RULES: list[Callable[[list[Source]], Iterator[str]]] = [
    layers_import_only_downward,
    only_training_and_cli_import_lightning,
    one_file_imports_deepspeed_lazily,
    budgets_hold,
    forwards_read_no_tensor,
    library_neither_prints_nor_asserts,
    public_names_have_docstrings,
]


def find_machine_paths(root: Path) -> Iterator[str]:
    folders = [root / folder for folder in (PACKAGE, "recipes", "benchmarks", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".yaml", ".md", ".txt"}]
    top = "README.md CHANGELOG.md Makefile pyproject.toml constraints.txt .ci/run .pre-commit-config.yaml"
    for path in sorted([*paths, *(root / name for name in top.split() if (root / name).is_file())]):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                yield f"{path.relative_to(root).as_posix()}:{number}: names a path of one machine"


def plant(root: Path, files: dict[str, str]) -> list[Source]:
    for path, text in files.items():
        (root / PACKAGE / path).parent.mkdir(parents=True, exist_ok=True)
        (root / PACKAGE / path).write_text(f"'A docstring.'\n{text}", encoding="utf-8")
    return read_sources(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_law(rule: Callable[[list[Source]], Iterator[str]]) -> None:
    sources = read_sources(ROOT)
    assert len(sources) > 10
    violations = list(rule(sources))
    assert not violations, "\n".join(violations)


def test_no_file_names_a_path_of_one_machine() -> None:
    violations = list(find_machine_paths(ROOT))
    assert not violations, "\n".join(violations)


LONG_BODY = "        x = 1\n" * 30
PLANTED = [
    ("nn/norm.py", "from sat_lightning.model import base", "nn imports sat_lightning.model, which is not below it"),
    ("nn/norm.py", "def _f():\n    from ..models.gpt2 import A", "norm.py:3: nn imports sat_lightning.models.gpt2"),
    ("mixins/lora.py", "from .. import models", "mixins imports sat_lightning.models, which is not below it"),
    ("mixins/lora.py", "import_module('sat_lightning.models')", "lora.py:2: mixins imports sat_lightning.models"),
    ("data/text.py", "import sat_lightning.checkpoint.sat", "data imports sat_lightning.checkpoint.sat"),
    ("model/base.py", "from sat_lightning import AutoModel", "model imports sat_lightning.AutoModel"),
    ("config.py", "from .hooks import HookTable", "config imports sat_lightning.hooks"),
    ("helpers/text.py", "", "'helpers' has no place among the layers"),
    ("models/gpt2.py", "from lightning.pytorch import Trainer", "only training/ and cli.py import lightning"),
    ("data/text.py", "def _f():\n    import pytorch_lightning", "text.py:3: only training/ and cli.py import"),
    ("training/strategy.py", "import deepspeed", "deepspeed is imported at module level"),
    ("nn/norm.py", "x = 1\n" * 300, "301 lines, a file has at most 300"),
    ("hooks.py", "def _f():\n" + LONG_BODY * 2, "_f has 61 lines of at most 50"),
    ("nn/norm.py", "class _A:\n    def forward(self):\n" + LONG_BODY, "forward has 31 lines of at most 30"),
    (
        "nn/a.py",
        "class _A:\n    def __init__(self, config, a, b, c, d, e, f, *, g, h, i): 0",
        "with 9 parameters of at most 8",
    ),
    ("nn/mlp.py", "n = counts.tolist()", ".tolist() reads a tensor on the host"),
    ("models/vit.py", "n = x.sum().item()", ".item() reads a tensor on the host"),
    ("nn/masks.py", "if (mask > 0).all():\n    pass", "a branch is decided by .all()"),
    ("mixins/cache.py", "y = 1 if not torch.equal(a, b) else 2", "a branch is decided by .equal()"),
    ("nn/moe.py", "y = [e for e in experts if e.load.any()]", "a branch is decided by .any()"),
    ("data/text.py", "print('done')", "print() outside cli.py"),
    ("data/text.py", "assert length > 0", "raise an error of errors.py instead"),
    ("nn/norm.py", "class Norm:\n    'R.'\n    def reset(self): 0", "norm.py:4: reset has no docstring"),
]


@pytest.mark.parametrize(("path", "text", "expected"), PLANTED)
def test_planted_violation_is_reported(tmp_path: Path, path: str, text: str, expected: str) -> None:
    sources = plant(tmp_path, {path: text})
    reports = [line for rule in RULES for line in rule(sources)]
    assert len(reports) == 1 and expected in reports[0], reports


def test_second_file_that_imports_deepspeed_is_reported(tmp_path: Path) -> None:
    text = "def f():\n    import deepspeed\n"
    sources = plant(tmp_path, {f"training/{name}.py": text for name in ("strategy", "callbacks")})
    expected = (
        "sat_lightning/training/callbacks.py, sat_lightning/training/strategy.py: more than one file imports deepspeed"
    )
    assert list(one_file_imports_deepspeed_lazily(sources)) == [expected]


def test_planted_machine_path_is_reported(tmp_path: Path) -> None:
    plant(tmp_path, {"nn/norm.py": "url = 'https://example.org/home/x'\npath = '/" + "home/someone/data'\n"})
    assert list(find_machine_paths(tmp_path)) == ["sat_lightning/nn/norm.py:3: names a path of one machine"]


ALLOWED = {
    "__init__.py": "from .nn import norm\n__version__ = '1'",
    "nn/norm.py": "if TYPE_CHECKING:\n    from sat_lightning.model import BaseModel",
    "model/base.py": "from sat_lightning import __version__, nn\nfrom .. import errors\nfrom . import mixin",
    "models/gpt2.py": "assert config is not None\nif all(f(x) for x in y.items()):\n    z = max(1, 2)",
    "training/strategy.py": "import lightning\ndef _f():\n    import deepspeed",
    "cli.py": "import sat_lightning\nfrom sat_lightning.training import tasks\nprint(1)",
    "mixins/lora.py": "class _A:\n    def forward(self):\n" + "        x = 1\n" * 29,
    "nn/mlp.py": "class _A:\n    def __init__(self, config, a, b, c, d, e, f, *args, g, h, **kw): 0",
}


def test_what_the_laws_allow_is_not_reported(tmp_path: Path) -> None:
    sources = plant(tmp_path, ALLOWED)
    assert [line for rule in RULES for line in rule(sources)] == []
