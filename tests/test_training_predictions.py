"""`PredictionWriter`: what `predict` found, each row once and in the order of the data, on one process and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning.cli import main
from sat_lightning.training import PredictionWriter
from sat_lightning.training.callbacks.predictions import read_prediction
from tests.test_cli import RECIPE
from tests.training_examples import counting_rows, make_model, make_task, make_trainer

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_scores_of_a_language_model_are_written_row_by_row(tmp_path: Path) -> None:
    task, rows = make_task(make_model()), counting_rows(5)
    rows[3]["target_ids"] = torch.full_like(rows[3]["target_ids"], -100)
    loader = DataLoader(rows, batch_size=2)
    trainer = make_trainer(callbacks=PredictionWriter("scores.jsonl"), default_root_dir=tmp_path)
    predicted = trainer.predict(task, loader)
    found = lines(tmp_path / "scores.jsonl")
    losses = torch.cat([batch["loss"] for batch in predicted])
    assert [line["row"] for line in found] == list(range(5))
    assert [line["num_targets"] for line in found] == [16, 16, 16, 0, 16]
    assert found[3]["loss"] is None and losses[3].isnan()
    assert [line["loss"] for line in found if line["row"] != 3] == losses[[0, 1, 2, 4]].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


class Texts(L.LightningModule):
    """Predicts a text for each row."""

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> list:
        return [f"row {first}" for first in batch["input_ids"][:, 0].tolist()]


def test_rows_go_back_to_their_places_in_each_of_several_sets(tmp_path: Path) -> None:
    rows = counting_rows(5)
    order = [3, 0, 4, 1, 2]
    loaders = [DataLoader(rows, batch_size=2, sampler=order), DataLoader(rows[:2], batch_size=1)]
    make_trainer(callbacks=PredictionWriter(), default_root_dir=tmp_path).predict(Texts(), loaders)
    expected = [(f"row {int(row['input_ids'][0])}") for row in rows]
    assert lines(tmp_path / "predictions.jsonl") == [
        *({"row": i, "set": 0, "prediction": text} for i, text in enumerate(expected)),
        *({"row": i, "set": 1, "prediction": text} for i, text in enumerate(expected[:2])),
    ]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ({"a": torch.tensor([1, 2]), "b": torch.tensor(0.5)}, (True, [{"a": 1, "b": 0.5}, {"a": 2, "b": 0.5}])),
        ({"loss": torch.tensor(float("inf"))}, (False, [{"loss": None}])),
        (torch.tensor([[1.0], [2.0]]), (True, [{"prediction": [1.0]}, {"prediction": [2.0]}])),
        (torch.tensor(3), (False, [{"prediction": 3}])),
        (["x", "y"], (True, [{"prediction": "x"}, {"prediction": "y"}])),
        ([{"t": "x", "p": Path("z")}, {"t": "y"}], (True, [{"t": "x", "p": "z"}, {"t": "y"}])),
        (torch.tensor([1, 2, 3]), (False, [{"prediction": [1, 2, 3]}])),
        ({"a": np.array([1, 2]), "b": np.float32(0.5)}, (True, [{"a": 1, "b": 0.5}, {"a": 2, "b": 0.5}])),
    ],
)
def test_what_a_step_returned_is_taken_apart(prediction: object, expected: tuple) -> None:
    assert read_prediction(prediction, 2) == expected


def test_the_command_writes_the_same_from_two_processes_and_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(60)))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    main(["fit", "--config", "tiny.yaml"])
    checkpoint = next((tmp_path / "runs" / "tiny" / "version_0" / "checkpoints").glob("*.ckpt"))
    words = ["predict", "--config", "tiny.yaml", "--ckpt_path", str(checkpoint), "--data.batch_size", "2"]
    words += ["--trainer.logger.version"]
    main([*words, "1"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "sat_lightning",
        *words,
        "2",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
    ]
    command += ["--trainer.strategy", "ddp"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone, together = (lines(tmp_path / "runs" / "tiny" / f"version_{n}" / "predictions.jsonl") for n in (1, 2))
    assert len(alone) % 4 and [line["row"] for line in alone] == list(range(len(alone)))
    assert [line["row"] for line in together] == [line["row"] for line in alone]
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert not list((tmp_path / "runs" / "tiny" / "version_2").glob(".predictions*"))
