"""What an import loads and costs, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["deepspeed", "jsonargparse", "lightning", "lightning.pytorch.cli", "transformers"]
NUM_TRIES, MAX_SECONDS = 5, 0.3
PUBLIC_IMPORTS = """
import sat_lightning
from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict, replaceable
from sat_lightning.models import GPT2Model
"""


def run_python(code: str, folder: Path = ROOT) -> str:
    """Run `code` in a fresh interpreter that finds the package in `folder`; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_of(modules: list[str], code: str) -> list[str]:
    """Say which of `modules` are loaded once `code` has run."""
    report = f"\nimport json, sys\nprint(json.dumps([name for name in {modules} if name in sys.modules]))"
    return json.loads(run_python(code + report).splitlines()[-1])


@pytest.mark.parametrize("code", ["import sat_lightning", PUBLIC_IMPORTS], ids=["package", "public names"])
def test_import_loads_nothing_heavy(code: str) -> None:
    assert loaded_of(HEAVY, code) == []


def test_the_check_sees_a_module_that_is_loaded() -> None:
    assert loaded_of(["json", *HEAVY], "import jsonargparse") == ["json", "jsonargparse"]


def test_import_is_fast_beside_torch() -> None:
    """In time of the processor, which neighbours do not use up; one quick try among several proves the cost."""
    code = f"""
import time, torch
begin = time.process_time()
{PUBLIC_IMPORTS}
print(time.process_time() - begin)
"""
    seconds = []
    for _ in range(NUM_TRIES):
        seconds.append(float(run_python(code)))
        if seconds[-1] <= MAX_SECONDS:
            return
    pytest.fail(f"the package adds {min(seconds):.2f} s to importing torch, at most {MAX_SECONDS} s are allowed")


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_module('sat_lightning', run_name='__main__')",
        "importlib.import_module('sat_lightning.cli').main(['--help'])",
    ],
    ids=["python -m sat_lightning", "cli.main"],
)
def test_help_needs_nothing_heavy(start: str) -> None:
    code = f"""
import importlib, runpy, sys
sys.argv = ["sat_lightning", "--help"]
try:
    {start}
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    help_text = run_python(code)
    assert all(verb in help_text for verb in ("fit", "validate", "test", "predict")), help_text
    assert loaded_of([*HEAVY, "numpy", "torch"], code) == []


def test_inference_needs_no_training_layer(tmp_path: Path) -> None:
    """Without training/, the command line and lightning itself, a model still builds, takes a mixin and runs."""
    left_out = shutil.ignore_patterns("training", "cli.py", "__main__.py", "__pycache__")
    shutil.copytree(ROOT / "sat_lightning", tmp_path / "sat_lightning", ignore=left_out)
    code = f"""
import sys
for name in {[*HEAVY, "lightning_fabric", "pytorch_lightning"]}:
    sys.modules[name] = None
import torch
{PUBLIC_IMPORTS}
class FewLogitsMixin(BaseMixin):
    @non_conflict
    def final_forward(self, logits, *, old_impl, **kw):
        return old_impl(logits, **kw)[..., :3]
sizes = dict(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=11, max_sequence_length=8)
model = GPT2Model(TransformerConfig(**sizes))
model.add_mixin("few", FewLogitsMixin())
print(sat_lightning.__file__, tuple(model(torch.arange(8)[None])[0].shape))
"""
    file, _, shape = run_python(code, tmp_path).strip().partition(" ")
    assert Path(file).is_relative_to(tmp_path)
    assert shape == "(1, 8, 3)"
