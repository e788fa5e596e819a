"""The README is true: its Python runs, its YAML parses, and its commands name what exists.

A block whose first line is a comment with only a file name (`# my_mixin.py`) is also written to that file, so that
later blocks and commands can use it, as a reader would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

from sat_lightning import SATDataModule, TransformerConfig
from sat_lightning.cli import main
from sat_lightning.training import DataOptions, OptimConfig

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block: the heading it stands under, its language, its text and the README line of its first line."""

    section: str
    language: str
    text: str
    line: int


def read_blocks(markdown: str) -> list[Block]:
    blocks = []
    for match in BLOCK.finditer(markdown):
        headings = re.findall(r"^## (.*)$", BLOCK.sub("", markdown[: match.start()]), re.MULTILINE)
        line = markdown.count("\n", 0, match.start(2)) + 1
        blocks.append(Block(headings[-1] if headings else "", match[1], match[2], line))
    return blocks


def run_blocks(blocks: list[Block]) -> None:
    """Execute Python blocks in order, those under one heading in one namespace; a traceback names the README's line."""
    namespaces: dict[str, dict[str, object]] = {}
    for block in blocks:
        code = compile("\n" * (block.line - 1) + block.text, "README.md", "exec")
        exec(code, namespaces.setdefault(block.section, {"__name__": "readme"}))


def write_named_files(blocks: list[Block], folder: Path) -> None:
    for block in blocks:
        if named := FILE_NAME.match(block.text):
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(block.text, encoding="utf-8")


def read_commands(blocks: list[Block]) -> list[list[str]]:
    """The commands of the shell blocks, as words; a prompt, a comment and a line continuation are not part of them."""
    text = "\n".join(block.text for block in blocks if block.language in ("bash", "sh", "console"))
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def verb_arguments(command: list[str]) -> list[str] | None:
    """What follows `python -m sat_lightning` (or `sat-lightning`) in a command, or None for another command."""
    for start in (["python", "-m", "sat_lightning"], ["sat-lightning"]):
        if command[: len(start)] == start:
            return command[len(start) :]
    return None


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    return read_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture
def reader_folder(blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: the README's named files and the recipes lie there, and Python imports from there."""
    write_named_files(blocks, tmp_path)
    for name in ("recipes", "tests/data/golden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_python_blocks_run(blocks: list[Block], reader_folder: Path) -> None:
    python_blocks = [block for block in blocks if block.language == "python"]
    assert python_blocks
    run_blocks(python_blocks)


def test_yaml_blocks_parse(blocks: list[Block]) -> None:
    yaml_blocks = [block for block in blocks if block.language == "yaml"]
    assert yaml_blocks
    for block in yaml_blocks:
        assert isinstance(yaml.safe_load(block.text), dict), f"README.md:{block.line}"


def test_make_targets_exist(blocks: list[Block]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [command[1] for command in read_commands(blocks) if command[0] == "make"]
    assert {"quickstart", "test"} <= set(named)
    assert set(named) <= targets


@pytest.mark.timeout(900)  # a process for each command
def test_commands_are_accepted(blocks: list[Block], reader_folder: Path) -> None:
    """Each training command is parsed whole by the real command line: its files, keys, classes and values stand."""
    commands = [arguments for command in read_commands(blocks) if (arguments := verb_arguments(command)) is not None]
    assert commands
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(reader_folder), str(ROOT)])}
    for arguments in commands:
        configs = [after for word, after in zip(arguments, arguments[1:], strict=False) if word in ("--config", "-c")]
        assert [config for config in configs if not Path(config).is_file()] == []
        if arguments[0] in ("fit", "validate", "test", "predict"):
            words = [sys.executable, "-m", "sat_lightning", *arguments, "--print_config"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stderr}"
            assert "trainer" in yaml.safe_load(done.stdout)


def test_commands_of_other_verbs_have_the_options_they_name(blocks: list[Block]) -> None:
    commands = [arguments for command in read_commands(blocks) if (arguments := verb_arguments(command)) is not None]
    shown = {}
    for verb, *words in commands:
        if verb in ("generate", "chat", "merge", "convert", "doctor"):
            if verb not in shown:
                with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(io.StringIO()) as text:
                    main([verb, "--help"])
                shown[verb] = set(re.findall(r"--[\w-]+", text.getvalue()))
            assert {word for word in words if word.startswith("--")} <= shown[verb]
    assert {"generate", "chat", "merge"} <= shown.keys()


def test_conversions_run(blocks: list[Block], reader_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each conversion runs, in order, and finds what it wrote equal to what it read."""
    commands = [arguments for command in read_commands(blocks) if (arguments := verb_arguments(command)) is not None]
    conversions = [arguments for arguments in commands if arguments[0] == "convert"]
    assert conversions
    for arguments in conversions:
        main(arguments)
    differences = re.findall(r"maximum difference (\S+) ", capsys.readouterr().out)
    assert len(differences) == sum("--verify" in arguments for arguments in conversions)
    assert all(float(difference) < 1e-6 for difference in differences)


# What `get_args` of SwissArmyTransformer 0.4.12 knows, beside the flags of DeepSpeed's launcher.
SAT_FLAGS = """
num-layers hidden-size num-attention-heads vocab-size max-sequence-length layernorm-order inner-hidden-size
hidden-size-per-attention-head model-parallel-size skip-init use-gpu-initialization num-multi-query-heads is-gated-mlp
is-rotary-emb layernorm-epsilon hidden-dropout attention-dropout drop-path make-vocab-size-divisible-by parallel-output
experiment-name train-iters batch-size lr mode seed zero-stage checkpoint-activations checkpoint-num-layers
checkpoint-skip-layers fp16 bf16 gradient-accumulation-steps profiling epochs log-interval summary-dir save-args
lr-decay-iters lr-decay-style lr-decay-ratio warmup weight-decay save load force-train save-interval no-save-rng
no-load-rng resume-dataloader distributed-backend local_rank exit-interval wandb wandb-project-name eval-batch-size
eval-iters eval-interval strict-eval train-data train-data-weights iterable-dataset iterable-dataset-eval
batch-from-same-dataset valid-data test-data split num-workers block-size prefetch-factor temperature top_p top_k
num-beams length-penalty no-repeat-ngram-size min-tgt-length out-seq-length input-source output-path with-id
max-inference-batch-size device tokenizer-type deepspeed_config
""".split()


def test_every_flag_of_sat_is_mapped_to_a_name_that_exists() -> None:
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("## Coming from SAT\n")[2].partition("\n## ")[0]
    )
    named = set(re.findall(r"--([\w-]+)", section))
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert [flag for flag in SAT_FLAGS if flag not in named and flag.replace("-", "_") not in fields] == []
    known = {
        "optim": {field.name for field in dataclasses.fields(OptimConfig)},
        "data.options": {field.name for field in dataclasses.fields(DataOptions)},
        "data": {"options", *inspect.signature(SATDataModule).parameters},
        "trainer": {"strategy", *inspect.signature(Trainer.__init__).parameters},
    }
    names = re.findall(r"`(data\.options|data|optim|trainer)\.(\w+)", section)
    assert {place for place, _ in names} == known.keys()
    assert [f"{place}.{name}" for place, name in names if name not in known[place]] == []


SAMPLE = """
# Title
```python
x = 1
```
## One
```bash
# first
make quickstart ARGS="--data.path my.txt"
$ python -m sat_lightning fit \\
    --config recipes/a.yaml
```
```python
# part/own.py
y = 2
```
## Two
```python
assert "y" not in globals()
raise RuntimeError
```
"""


def test_blocks_are_read_and_run_as_a_reader_would(tmp_path: Path) -> None:
    sample = read_blocks(SAMPLE)
    assert [(block.section, block.language) for block in sample] == [
        ("", "python"),
        ("One", "bash"),
        ("One", "python"),
        ("Two", "python"),
    ]
    make, fit = read_commands(sample)
    assert make == ["make", "quickstart", "ARGS=--data.path my.txt"] and verb_arguments(make) is None
    assert verb_arguments(fit) == ["fit", "--config", "recipes/a.yaml"]
    write_named_files(sample, tmp_path)
    assert (tmp_path / "part/own.py").read_text() == "# part/own.py\ny = 2\n"
    with pytest.raises(RuntimeError) as raised:
        run_blocks([block for block in sample if block.language == "python"])
    assert raised.traceback[-1].lineno + 1 == SAMPLE.splitlines().index("raise RuntimeError") + 1
