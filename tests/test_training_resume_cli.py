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
from sat_lightning.training.zero_checkpoint import read_as_lightning
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
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    words = ["validate", "--config", "tiny.yaml", *trainable, "--trainer.callbacks", "[{class_path: TrainableOnly}]"]
    main([*words, "--ckpt_path", checkpoint])
    assert "was trained on another base" in refusal(
        capsys, *words, "--ckpt_path", checkpoint, "--seed_everything", "7", code=1
    )


@pytest.mark.timeout(600)
def test_zero_resumes_and_validates_on_a_base_that_it_began_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is no part of the checkpoints: each time it is read from the folder, by a model that ZeRO-3 splits."""
    for seed in ("3", "4"):
        fit("--seed_everything", seed, more=", {class_path: ExportModel}")
    begin = ["--init_from", "runs/tiny/version_0/model", "--model.trainable", "[final_layernorm]"]
    begin += ["--trainer.strategy", "zero_3", "--trainer.accelerator", "cpu"]
    more = ", {class_path: TrainableOnly}"
    fit(*begin, more=more)
    run = stopped(*begin, at=2, more=more)
    main(["fit", "--resume", str(run)])
    one, two = (read_as_lightning(path / "checkpoints" / "last.ckpt") for path in (Path("runs/tiny/version_2"), run))
    assert set(one["state_dict"]) == {f"model.transformer.final_layernorm.{name}" for name in ("weight", "bias")}
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["frozen_base"] == two["frozen_base"] and two["global_step"] == 4
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    words = ["validate", "--config", "tiny.yaml", *begin, "--trainer.callbacks", "[{class_path: TrainableOnly}]"]
    for strategy in ("zero_3", "auto"):
        main([*words, *checkpoint, "--trainer.strategy", strategy])
        other = [*checkpoint, "--trainer.strategy", strategy, "--init_from", "runs/tiny/version_1/model"]
        assert "was trained on another base" in refusal(capsys, *words, *other, code=1)
    files = [run.parent / f"version_{number}" / "metrics.csv" for number in (4, 6)]
    losses = [float(path.read_text().splitlines()[1].split(",")[-1]) for path in files]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    bare = ["validate", "--config", "tiny.yaml", *begin, *checkpoint, "--trainer.strategy", "auto"]
    with pytest.raises(RuntimeError, match="Missing key"):  # Lightning's: without the callback nothing may lack
        main(bare)
