"""ZeRO 0 to 3 and DDP in two real processes: the numbers of one process, whatever is sharded."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.training.zero_shards import LightningShards, ShardFiles
from tests.processes import results_of
from tests.zero_cases import FAMILIES, MATRIX, NUM_STEPS, Case, run_case

#: Every strategy once, and each value of everything else with some strategy.
QUICK = [
    Case("ddp", "32-true", 3, "gpt2_with_mixins"),
    Case("zero_0", "32-true", 3, "gpt2"),
    Case("zero_1", "32-true", 3, "gpt2"),
    Case("zero_2", "bf16-mixed", 3, "gpt2_with_mixins"),
    Case("zero_3", "32-true", 3, "pretrained"),
    Case("zero_3", "bf16-mixed", 1, "tied_with_list"),
]
#: What two processes resume that another stage, another number of ranks or another strategy has saved.
FROM_ELSEWHERE = [
    ("one to two", Case("zero_3"), "one"),
    ("one to two, other stage", Case("zero_1"), "one"),
    ("stage 3 to 2", Case("zero_2", "32-true", 3, "pretrained"), str(Case("zero_3", "32-true", 3, "pretrained"))),
    ("file to stage 2", Case("zero_2", "32-true", 3, "gpt2_with_mixins"), str(QUICK[0])),
]
#: What one process resumes that two have saved.
TO_ONE = [
    (Case("zero_1", "32-true", 3), Case("zero_3", "32-true", 3)),
    (Case("zero_3", "bf16-mixed", 1, "tied_with_list"), Case("zero_3", "bf16-mixed", 1, "tied_with_list")),
    (Case("zero_0", "32-true", 3), Case("zero_2", "32-true", 3)),
    (Case("zero_1", "32-true", 3), Case("auto", "32-true", 3)),
]
#: Relative difference of a loss from one process in fp32; in bf16 weights have 8 bits.
TOLERANCES = {"32-true": 2e-5, "bf16-mixed": 2e-2}
#: The same of norms. Stage 0 sums up the gradients of a window in bf16.
NORM_TOLERANCES = {"32-true": 1e-4, "bf16-mixed": 5e-2, "zero_0-bf16-mixed": 2e-1}


def job(case: Case, name: str | None = None, **arguments: Any) -> dict[str, Any]:
    return {"name": name or str(case), "case": asdict(case), **arguments}


def run_in_processes(folder: Path, jobs: list[dict[str, Any]], num_ranks: int = 2) -> dict[str, Any]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return results_of("tests.zero_worker", folder, str(folder / "jobs.json"), str(num_ranks))


@cache
def run_alone(case: Case) -> dict[str, Any]:
    return run_case(case, 1, 0)


def check(case: Case, found: dict[str, Any]) -> None:
    assert "error" not in found, found["error"]
    alone = run_alone(case.alone())
    assert found["global_step"] == alone["global_step"] == NUM_STEPS
    assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCES[case.precision]), case
    assert alone["losses"][-1] < alone["losses"][0]
    # The norm that clips is that of all gradients: of all ranks, of the whole window, before clipping.
    assert len(found["norms"]) == NUM_STEPS
    tolerance = NORM_TOLERANCES.get(f"{case.strategy}-{case.precision}", NORM_TOLERANCES[case.precision])
    assert found["norms"] == pytest.approx(alone["norms"], rel=tolerance), case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def quick_results(folder: Path) -> dict[str, Any]:
    """One process writes a checkpoint; two processes run all of `QUICK`, resume theirs, each other's and that one."""
    from_one = run_case(Case("zero_3"), 1, 0, folder=str(folder / "one"))
    jobs = [job(case, folder=str(folder / str(case))) for case in QUICK]
    for case in QUICK:
        if case.strategy.startswith("zero"):
            at = {"folder": str(folder / f"resumed-{case}"), "resume": str(folder / str(case) / "middle.ckpt")}
            jobs.append(job(case, f"resumed-{case}", **at))
    for name, case, source in FROM_ELSEWHERE:
        jobs.append(job(case, name, folder=str(folder / name), resume=str(folder / source / "middle.ckpt")))
    return run_in_processes(folder, jobs) | {"one": from_one}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_two_processes_learn_what_one_learns(quick_results: dict[str, Any], case: Case) -> None:
    check(case, quick_results[str(case)])


def everything_in(path: Path) -> dict[str, Any]:
    """All weights, moments and counts of a checkpoint."""
    shards = ShardFiles(path)
    tensors = {(name, kind): shards.whole(name, kind) for name in shards.names for kind in shards.kinds(name)}
    return tensors | {(name, "scalars"): shards.scalars(name) for name in shards.names}


def everything_in_file(path: Path, names: list[str]) -> dict[str, Any]:
    """The same of a file of Lightning's."""
    shards = LightningShards(torch.load(path, weights_only=True), names)
    tensors = {
        (name, kind): shards.read(name, kind, 0, shape.numel()).view(shape)
        for name, shape in ((name, torch.Size(shards.shape(name))) for name in shards.names)
        for kind in shards.kinds(name)
    }
    return tensors | {(name, "scalars"): shards.scalars(name) for name in shards.names}


def assert_same(path: Path, other: Path) -> None:
    expected = everything_in(other)
    names = [n for group in json.loads((other / "engine.json").read_text())["groups_of"] for n in group]
    found = everything_in(path) if path.is_dir() else everything_in_file(path, names)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        is_same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert is_same, key
    assert any(kind == "exp_avg_sq" for _, kind in found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [case for case in QUICK if case.strategy.startswith("zero")], ids=str)
def test_resumed_run_is_the_unbroken_run_bit_for_bit(quick_results: dict[str, Any], folder: Path, case: Case) -> None:
    resumed = quick_results[f"resumed-{case}"]
    assert "error" not in resumed, resumed["error"]
    num_left = len(resumed["losses"])
    assert 0 < num_left < len(quick_results[str(case)]["losses"])
    assert resumed["losses"] == quick_results[str(case)]["losses"][-num_left:]
    assert_same(folder / f"resumed-{case}" / "start.ckpt", folder / str(case) / "middle.ckpt")
    assert_same(folder / f"resumed-{case}" / "end.ckpt", folder / str(case) / "end.ckpt")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "case", "source"), FROM_ELSEWHERE, ids=[name for name, *_ in FROM_ELSEWHERE])
def test_resume_from_other_ranks_and_stages(
    quick_results: dict[str, Any], folder: Path, name: str, case: Case, source: str
) -> None:
    resumed = quick_results[name]
    assert "error" not in resumed, resumed["error"]
    unbroken = quick_results[source]["losses"]
    assert resumed["losses"] == pytest.approx(unbroken[-len(resumed["losses"]) :], rel=TOLERANCES[case.precision])
    saved = folder / source / "middle.ckpt"
    if saved.is_dir():
        assert_same(folder / name / "start.ckpt", saved)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("source", "case"), TO_ONE, ids=str)
def test_one_process_resumes_what_two_saved(
    quick_results: dict[str, Any], folder: Path, tmp_path: Path, source: Case, case: Case
) -> None:
    saved = folder / str(source) / "middle.ckpt"
    resumed = run_case(case, 1, 0, folder=str(tmp_path), resume=str(saved))
    unbroken = quick_results[str(source)]["losses"]
    assert resumed["losses"] == pytest.approx(unbroken[-len(resumed["losses"]) :], rel=TOLERANCES[case.precision])
    assert_same(tmp_path / "start.ckpt", saved)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [case for case in QUICK if case.strategy.startswith("zero")], ids=str)
def test_consolidated_weights_are_the_model(quick_results: dict[str, Any], folder: Path, case: Case) -> None:
    """Tied, frozen and persistent ones included, in the model's own names, in fp32 where the optimizer has that."""
    saved = folder / str(case) / "end.ckpt"
    tensors, shards = load_file(saved / "model.safetensors"), ShardFiles(saved)
    task = FAMILIES[case.family]()
    task.configure_model()
    report = load_checkpoint(task.model, saved)
    assert not report.missing and not report.unexpected
    assert tensors.keys() == task.model.state_dict().keys()
    assert {f"model.{name}" for name in tensors} >= set(shards.names)
    for name in shards.names:
        assert torch.equal(tensors[name.removeprefix("model.")], shards.whole(name)), name
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert {tensors[name].dtype for name in trained} == {torch.float32}


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_in_processes(tmp_path_factory.mktemp("matrix"), [job(case) for case in MATRIX])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(all_results: dict[str, Any], case: Case) -> None:
    check(case, all_results[str(case)])
