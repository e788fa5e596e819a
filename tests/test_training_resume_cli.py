"""`fit --resume`, `--reset` and `--init_from`, model folders beside the state, and checkpoints without their base."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_lightning import AutoModel
from sat_lightning.cli import main
from sat_lightning.training import find_resume_checkpoint
from tests.test_cli import RECIPE, refusal

MINE = """
import os, signal
import lightning as L


class StopAt(L.Callback):
    def __init__(self, batch: int):
        self.batch = batch

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
"""
SAVE = "[{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, save_last: true}}%s]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with a recipe of four steps."""
    recipe = RECIPE.replace("max_steps: 2", "max_steps: 4").replace("16}", "16, hidden_dropout: 0.1}")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    (tmp_path / "tiny.yaml").write_text(recipe)
    (tmp_path / "stopping.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stopping", raising=False)
    return tmp_path


def fit(*words: str, more: str = "") -> None:
    main(["fit", "--config", "tiny.yaml", "--trainer.callbacks", SAVE % more, *words])


def stopped(*words: str, at: int = 3, more: str = "") -> Path:
    """Make a run that SIGTERM ends after some batches."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(*words, more=f", {{class_path: stopping.StopAt, init_args: {{batch: {at}}}}}{more}")
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    return max(Path("runs/tiny").iterdir(), key=lambda path: int(path.name.split("_")[1]))


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_resumed_run_ends_as_if_it_had_not_stopped(folder: Path) -> None:
    fit()
    whole = Path("runs/tiny/version_0")
    run = stopped()
    assert find_resume_checkpoint(run).name == "interrupted.ckpt"
    (run / "checkpoints" / ".half.ckpt.partial").write_bytes(b"half")
    main(["fit", "--resume", str(run)])
    assert not Path("runs/tiny/version_2").exists()
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    one, other = (saved(each / "checkpoints" / "last.ckpt") for each in (whole, run))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    for name, moment in one["optimizer_states"][0]["state"][0].items():
        assert torch.equal(moment, other["optimizer_states"][0]["state"][0][name])
    assert not list((run / "checkpoints").glob(".*"))
    assert json.loads((run / "resumed.jsonl").read_text())["changes"] == {}


def test_changes_are_written_down_and_what_is_reset_begins_anew(folder: Path) -> None:
    run = stopped()
    first = saved(run / "checkpoints" / "interrupted.ckpt")
    assert first["global_step"] == 3
    words = ["--trainer.max_steps", "5", "--model.optim.learning_rate", "0.5"]
    main(["fit", "--resume", str(run), *words, "--reset", "optimizer,scheduler"])
    record = json.loads((run / "resumed.jsonl").read_text())
    assert record["reset"] == ["optimizer", "scheduler"]
    assert record["changes"] == {"trainer.max_steps": [4, 5], "model.init_args.optim.learning_rate": [0.01, 0.5]}
    last = saved(run / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 5
    assert last["optimizer_states"][0]["state"][0]["step"] == 2
    assert last["lr_schedulers"][0]["base_lrs"][0] == 0.5 and last["lr_schedulers"][0]["last_epoch"] == 2
    main(["fit", "--resume", str(run), "--reset=step,data", "--trainer.max_steps", "1"])
    again = saved(find_resume_checkpoint(run))
    assert again["global_step"] == 1
    assert again["SATDataModule"]["position"] == 4
    assert again["optimizer_states"][0]["state"][0]["step"] == 3


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--resume runs/tny", 1, "runs/tny: there is no such folder. Did you mean 'tiny'?"),
        (
            "--resume runs/tiny",
            1,
            "is no run: it has neither config.yaml nor a checkpoint. It holds the runs ",
        ),
        ("--resume .", 1, "is no run: it has neither config.yaml nor a checkpoint."),
        (
            "--resume runs/tiny/version_0 --reset optimiser",
            1,
            "there is no 'optimiser', only optimizer",
        ),
        ("--resume runs/tiny/version_0 --init_from x", 2, "--init_from begins a new run with the weights alone."),
        ("--resume runs/tiny/version_0 --ckpt_path=x", 2, "--ckpt_path names one file."),
        ("--config tiny.yaml --reset data", 2, "Give --resume RUN_DIR, too."),
        ("--resume", 2, "--resume needs a value."),
        ("--config tiny.yaml --init_from none.ckpt", 1, "none.ckpt does not exist."),
    ],
)
def test_refusals(words: str, code: int, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "tiny" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    torch.save({"loops": {}, "optimizer_states": [], "global_step": 1}, run / "checkpoints" / "a.ckpt")
    assert text in refusal(capsys, "fit", *words.split(), code=code)
    whole = (run / "checkpoints" / "a.ckpt").read_bytes()
    (run / "checkpoints" / "a.ckpt").write_bytes(whole[: len(whole) // 2])
    text = "has no complete checkpoint to resume from."
    assert text in refusal(capsys, "fit", "--resume", "runs/tiny/version_0", code=1)


def test_begin_with_weights_of_a_run_and_of_the_model_folder_beside_it(folder: Path) -> None:
    more = ", {class_path: ExportModel}, {class_path: EMA, init_args: {decay: 0.5}}"
    fit(more=more)
    run = Path("runs/tiny/version_0")
    weights = saved(run / "checkpoints" / "last.ckpt")
    model = AutoModel.from_pretrained(run / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights["state_dict"][f"model.{name}"])
    averaged = AutoModel.from_pretrained(run / "model" / "ema").state_dict()
    for name, average in weights["ema"]["averages"].items():
        assert torch.equal(averaged[name.removeprefix("model.")], average)
    losses = set()
    places = [run / "checkpoints" / "last.ckpt", run / "model", run / "model" / "model.safetensors"]
    for number, place in enumerate(places, start=1):
        main(["validate", "--config", "tiny.yaml", "--init_from", str(place)])
        losses.add(Path(f"runs/tiny/version_{number}/metrics.csv").read_text())
    assert len(losses) == 1
    main(["validate", "--config", "tiny.yaml"])
    assert Path("runs/tiny/version_4/metrics.csv").read_text() not in losses


def test_checkpoints_without_the_frozen_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, trainable = ", {class_path: TrainableOnly}", ["--model.trainable", "[final_layernorm]"]
    fit(*trainable, more=more)
    run = stopped(*trainable, more=more)
    names = set(saved(run / "checkpoints" / "interrupted.ckpt")["state_dict"])
    assert names == {f"model.transformer.final_layernorm.{name}" for name in ("weight", "bias")}
    other = refusal(capsys, "fit", "--resume", str(run), "--seed_everything", "7", code=1)
    assert "was trained on another base: its frozen weights have SHA-256" in other
    main(["fit", "--resume", str(run)])
    one, two = (saved(path / "checkpoints" / "last.ckpt") for path in (Path("runs/tiny/version_0"), run))
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["frozen_base"] == two["frozen_base"]
