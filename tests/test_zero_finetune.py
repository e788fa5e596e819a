"""Checkpoints of fine-tunes without their base, what is reset, and weights alone: under ZeRO and DDP, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sat_lightning.errors import CheckpointError
from sat_lightning.training import TrainableOnly
from sat_lightning.training.zero_checkpoint import read_as_lightning
from sat_lightning.training.zero_shards import ShardFiles
from tests.test_zero import job, run_in_processes
from tests.training_examples import counting_loader, make_trainer
from tests.zero_cases import MIDDLE, NUM_STEPS, OTHERS, STRATEGIES, Case, run_case

FINE = {name: Case(name, family="finetune") for name in (*STRATEGIES, "auto")}
HALF = Case("zero_3", "bf16-mixed", family="finetune")
#: Who resumes what whom has saved, in two processes.
RESUMED = [
    (FINE["zero_0"], "zero_0"),
    (FINE["zero_1"], "zero_2"),
    (FINE["zero_3"], "zero_3"),
    (FINE["zero_3"], "zero_1"),
    (FINE["ddp"], "zero_3"),
    (FINE["zero_2"], "alone"),
    (HALF, "ddp"),
    (FINE["ddp"], "half"),
]
#: The same in one process.
RESUMED_ALONE = [(FINE["auto"], "zero_3"), (FINE["zero_3"], "zero_2"), (FINE["zero_1"], "ddp")]
RESETS = [("zero_1", "optimizer"), ("zero_2", "optimizer,scheduler"), ("zero_3", "optimizer,scheduler,step")]
#: What begins with the weights of what.
BEGUN = [("zero_3", "zero_1-gpt2"), ("zero_3", "ddp-gpt2"), ("zero_1", "zero_1-gpt2")]


def jobs_in(folder: Path) -> list[dict[str, Any]]:
    only = {"trainable_only": True}
    jobs = [job(FINE[name], name, folder=str(folder / name), **only) for name in STRATEGIES]
    jobs.append(job(HALF, "half", folder=str(folder / "half"), **only))
    for case, source in RESUMED:
        name = f"{case} of {source}"
        jobs.append(job(case, name, folder=str(folder / name), resume=middle(folder, source), **only))
    for name in ("zero_3", "ddp"):
        jobs.append(job(FINE[name], f"{name} other", resume=middle(folder, name), seed=1, **only))
    jobs.append(job(Case("zero_2"), "other model", resume=middle(folder, "zero_2")))
    for name in ("ddp", "zero_1"):
        for family in ("gpt2", "stranger"):
            jobs.append(job(Case(name, family=family), f"{name}-{family}", folder=str(folder / f"{name}-{family}")))
    for name, words in RESETS:
        at = {"folder": str(folder / f"{name} reset"), "resume": middle(folder, "zero_1-gpt2")}
        jobs.append(job(Case(name), f"{name} reset", reset=words.split(","), **at))
    for name, source in BEGUN:
        for of in (source, source.replace("gpt2", "stranger")):
            case = Case(name, family=of.partition("-")[2])
            at = {"folder": str(folder / f"{name} with {of}"), "begin_with": middle(folder, of)}
            jobs.append(job(case, f"{name} with {of}", seed=1, **at))
    return jobs


def middle(folder: Path, source: str) -> str:
    return str(folder / source / "middle.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """One process writes a checkpoint; two processes do all the rest."""
    alone = run_case(FINE["auto"], 1, 0, folder=str(folder / "alone"), trainable_only=True)
    return run_in_processes(folder, jobs_in(folder)) | {"alone": alone}


def names_of(task: Any) -> tuple[set[str], set[str]]:
    """What trains, and all that a state dict has."""
    task.configure_model()
    return {name for name, p in task.named_parameters() if p.requires_grad}, set(task.state_dict())


def content_of(path: Path) -> dict[str, Any]:
    return read_as_lightning(path) if path.is_dir() else torch.load(path, weights_only=True)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("source", [*STRATEGIES, "half", "alone"])
def test_checkpoint_is_what_trains(results: dict[str, Any], folder: Path, source: str) -> None:
    """Less than 1.1 of the trained weights and their moments; the base is three times as large as the weights."""
    assert "error" not in results[source], results[source]["error"]
    saved = Path(middle(folder, source))
    files = [saved] if saved.is_file() else [f for f in saved.iterdir() if not f.name.startswith("model")]
    trained, all_names = names_of(OTHERS["finetune"]())
    content = content_of(saved)
    weights = content["state_dict"]
    assert set(weights) == trained < all_names
    moments = [m for state in content["optimizer_states"][0]["state"].values() for m in state.values() if m.dim()]
    needed = sum(tensor.nbytes for tensor in [*weights.values(), *moments])
    assert len(moments) == 2 * len(trained)
    assert sum(file.stat().st_size for file in files) < 1.1 * needed
    base = content["frozen_base"]
    assert base["num_tensors"] == len(all_names - trained)
    alone = torch.load(middle(folder, "alone"), weights_only=True)["frozen_base"]
    if source == "half":
        assert base["precisions"] == ["bfloat16"] and base["rounded"] == {"bfloat16": alone["rounded"]["bfloat16"]}
    else:
        assert base == alone and set(base["rounded"]) == {"bfloat16", "float16"}


def check_resumed(found: dict[str, Any], unbroken: dict[str, Any], rel: float) -> None:
    assert "error" not in found, found["error"]
    assert found["global_step"] == NUM_STEPS and len(found["losses"]) == NUM_STEPS - MIDDLE
    assert found["losses"] == pytest.approx(unbroken["losses"][MIDDLE:], rel=rel)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("case", "source"), RESUMED, ids=str)
def test_resume_with_the_same_base(results: dict[str, Any], folder: Path, case: Case, source: str) -> None:
    name, is_half = f"{case} of {source}", (case is HALF) != (source == "half")
    check_resumed(results[name], results[source], rel=2e-2 if is_half else 2e-5)
    start, saved = content_of(folder / name / "start.ckpt"), content_of(Path(middle(folder, source)))
    assert start["state_dict"].keys() == saved["state_dict"].keys()
    for key, value in saved["state_dict"].items():
        assert torch.equal(start["state_dict"][key], value), key
    one, other = (content["optimizer_states"][0]["state"] for content in (start, saved))
    assert one.keys() == other.keys() and len(one) == len(saved["state_dict"])
    for index, moments in other.items():
        assert moments.keys() == {"exp_avg", "exp_avg_sq", "step"}
        assert all(torch.equal(moment.float(), one[index][kind].float()) for kind, moment in moments.items())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("case", "source"), RESUMED_ALONE, ids=str)
def test_one_process_resumes_with_the_same_base(
    results: dict[str, Any], folder: Path, tmp_path: Path, case: Case, source: str
) -> None:
    found = run_case(case, 1, 0, folder=str(tmp_path), resume=middle(folder, source), trainable_only=True)
    check_resumed(found, results[source], rel=2e-5)
    start, saved = content_of(tmp_path / "start.ckpt"), content_of(Path(middle(folder, source)))
    assert all(torch.equal(start["state_dict"][key], value) for key, value in saved["state_dict"].items())


@pytest.mark.timeout(1200)
def test_another_base_and_another_model_are_refused(results: dict[str, Any], folder: Path) -> None:
    for name in ("zero_3", "ddp"):
        said = results[f"{name} other"]["error"]
        assert "CheckpointError: The checkpoint was trained on another base: its frozen weights have SHA-256 " in said
        assert content_of(Path(middle(folder, name)))["frozen_base"]["sha256"] in said
    said = results["other model"]["error"]
    assert "The checkpoint does not fit: it lacks nothing, and the model lacks model.mixins.scale.scale. Build" in said


def test_validation_compares_the_base_and_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    made = run_case(FINE["auto"], 1, 0, folder=str(tmp_path / "saved"), trainable_only=True)
    assert made["global_step"] == NUM_STEPS
    task = OTHERS["finetune"]()
    trainer = make_trainer(callbacks=TrainableOnly(), default_root_dir=tmp_path)
    for seed in (1, 0):
        torch.manual_seed(seed)
        task = OTHERS["finetune"]()
        task.configure_model()
        if seed:
            with pytest.raises(CheckpointError, match="was trained on another base"):
                trainer.validate(task, counting_loader(8), ckpt_path=tmp_path / "saved" / "end.ckpt", verbose=False)
        else:
            trainer.validate(task, counting_loader(8), ckpt_path=tmp_path / "saved" / "end.ckpt", verbose=False)
    assert "on_load_checkpoint" not in vars(task)
    saved = torch.load(tmp_path / "saved" / "end.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(task.state_dict()[name], value) for name, value in saved.items())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "words"), RESETS)
def test_reset_of_the_optimizer(results: dict[str, Any], folder: Path, tmp_path: Path, name: str, words: str) -> None:
    """The weights are those saved, the moments those of a run that has just begun, the losses those of one process."""
    found, source = results[f"{name} reset"], folder / "zero_1-gpt2"
    assert "error" not in found, found["error"]
    start, saved = ShardFiles(folder / f"{name} reset" / "start.ckpt"), ShardFiles(source / "middle.ckpt")
    for key in saved.names:
        assert torch.equal(start.whole(key), saved.whole(key))
        assert not any(start.whole(key, kind).any() for kind in start.kinds(key) if kind != "weight")
    alone = run_case(Case("auto"), 1, 0, resume=str(source / "middle.ckpt"), reset=tuple(words.split(",")))
    kept = run_case(Case("auto"), 1, 0, resume=str(source / "middle.ckpt"))
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-5)
    assert found["losses"][-1] != pytest.approx(kept["losses"][-1], rel=1e-3)
    assert found["global_step"] == alone["global_step"] == NUM_STEPS
    assert len(found["losses"]) == NUM_STEPS - ("step" not in words) * MIDDLE


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["gpt2", "stranger"])
@pytest.mark.parametrize(("name", "source"), BEGUN)
def test_begin_with_weights_alone(results: dict[str, Any], folder: Path, name: str, source: str, family: str) -> None:
    source = source.replace("gpt2", family)
    found = results[f"{name} with {source}"]
    assert "error" not in found, found["error"]
    assert len(found["losses"]) == found["global_step"] == NUM_STEPS
    start, saved = (content_of(folder / path) for path in (f"{name} with {source}/start.ckpt", f"{source}/middle.ckpt"))
    assert start["state_dict"].keys() == saved["state_dict"].keys()
    for key, value in saved["state_dict"].items():
        assert torch.equal(start["state_dict"][key], value), key
    assert found["losses"][0] == pytest.approx(results[source]["losses"][MIDDLE], rel=0.5)
    states = start["optimizer_states"][0]["state"].values()
    assert not any(moment.any() for state in states for kind, moment in state.items() if kind != "step")
