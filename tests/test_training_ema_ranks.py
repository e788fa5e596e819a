"""`EMA` in two real processes, each of which averages what its optimizer updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from sat_lightning.models import GPT2Model
from sat_lightning.training import EMA
from sat_lightning.training.zero_checkpoint import read_as_lightning
from tests.ema_worker import CASES, NUM_STEPS, SAVED_AT
from tests.processes import launch
from tests.training_examples import counting_loader, make_trainer
from tests.zero_cases import FAMILIES, Case

pytestmark = pytest.mark.timeout(1200)  # two processes on a busy machine


ALL = [*CASES["quick"], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES["slow"])]
ZERO = [case for case in ALL if "zero_" in str(case)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run the cases of a kind, when the first of them is asked for."""

    @cache
    def run(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        launch("-m", "tests.ema_worker", str(folder), kind)
        return folder

    return run


@pytest.fixture
def folder(folders: Callable[[str], Path], case: Case) -> Path:
    return folders("quick" if case in CASES["quick"] else "slow")


def results(folder: Path, case: Case) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"results_{rank}.json").read_text())[str(case)] for rank in (0, 1)]
    assert not [result["error"] for result in found if "error" in result]
    return found


@pytest.mark.parametrize("case", ALL, ids=str)
def test_each_rank_averages_its_part_and_all_is_as_on_one(folder: Path, case: Case) -> None:
    ranks = results(folder, case)
    first, second = ranks
    is_split = case.strategy not in ("ddp", "zero_0")
    assert [rank["elements"] for rank in ranks] == [first["all_elements"] // (2 if is_split else 1)] * 2
    for rank in ranks:
        assert rank["num_updates"] == rank["resumed_updates"] == NUM_STEPS
        # The last bit of bf16 may go either way, where the two averages differ in the last of fp32.
        assert rank["while_evaluating"] <= (1e-2 if case.precision == "bf16-mixed" else 1e-6)
        assert rank["num_evaluated"] > 2 and len(rank["is_put_back"]) > 1 and all(rank["is_put_back"])
        updates, distance = rank.get("from_checkpoint", (SAVED_AT, 0.0))
        assert updates == SAVED_AT and distance <= (1e-2 if case.precision == "bf16-mixed" else 1e-6)
        assert rank.get("trains_alike", True) and rank["resumes_exactly"] and rank["moves_on"]
    assert first["export"] <= 1e-6 and first["dtypes"] == ["torch.float32"] and second["others_are_empty"]


@pytest.mark.parametrize("case", ZERO, ids=str)
def test_shards_of_two_ranks_hold_the_whole_average(folder: Path, case: Case) -> None:
    results(folder, case)
    saved = torch.load(folder / f"{case}.averages.pt", weights_only=True)
    read = read_as_lightning(folder / f"{case}.ckpt")
    assert read["ema"]["num_updates"] == SAVED_AT
    averages = {name.removeprefix("model."): value for name, value in read["ema"]["averages"].items()}
    assert averages.keys() == saved.keys() and all(torch.equal(averages[name], saved[name]) for name in saved)
    moments = {kind for state in read["optimizer_states"][0]["state"].values() for kind in state}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("case", ALL, ids=str)
def test_average_is_exported_as_a_model_of_its_own(folder: Path, case: Case) -> None:
    results(folder, case)
    exported = folder / f"{case}.model"
    for place, name in ((exported, "weights"), (exported / "ema", "averages")):
        model = GPT2Model.from_pretrained(place) if case.family == "gpt2" else None
        tensors = load_file(place / "model.safetensors") if model is None else dict(model.state_dict())
        expected = torch.load(folder / f"{case}.{name}.pt", weights_only=True)
        assert all(torch.equal(tensors[key].float(), expected[key].float()) for key in expected)
    base = "transformer.final_layernorm.weight"
    assert base in tensors and (exported / "ema" / "model_config.json").is_file()


@pytest.mark.parametrize("case", CASES["quick"][:1], ids=str)
def test_checkpoint_of_two_ranks_goes_on_with_one(folder: Path, case: Case) -> None:
    results(folder, case)

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.averages = ema.ema_state_dict(trainer)

    ema, start = EMA(), Start()
    trainer = make_trainer(3, callbacks=[ema, start], gradient_clip_val=0.5)
    trainer.fit(FAMILIES[case.family](), counting_loader(), ckpt_path=folder / f"{case}.ckpt", weights_only=True)
    saved = torch.load(folder / f"{case}.averages.pt", weights_only=True)
    assert saved.keys() == start.averages.keys() and ema.num_updates == 3
    assert all(torch.equal(saved[name], start.averages[name]) for name in saved)
