"""A batch that is bad on one rank, in two real processes: each strategy runs as if it had not been there."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.processes import launch

STRATEGIES = ("ddp", "ddp_find_unused_parameters_true", "zero_0", "zero_1", "zero_2", "zero_3")
#: What is bad, accumulated batches, batches, bad ones, those left out.
SCENES = {
    "loss-x3": ("loss", 3, 9, [1, 3, 8], [1, 3, 8]),  # within a window, first of one, last of the epoch
    "gradient-x1": ("gradient", 1, 4, [1], [1]),
    "loss-x1": ("loss", 1, 4, [0], [0]),
    "gradient-x3": ("gradient", 3, 7, [4], [3, 4, 5]),
}


def make_case(strategy: str, scene: str, precision: str, module: str) -> dict[str, Any]:
    what, accumulate, num_batches, bad, dropped = SCENES[scene]
    name = f"{strategy}-{scene}-{precision}-{module}"
    return locals()


QUICK = [
    *(make_case(strategy, "loss-x3", "32-true", "stranger") for strategy in STRATEGIES),
    *(make_case(strategy, "gradient-x3", "32-true", "ours") for strategy in STRATEGIES[::2]),
    *(make_case(strategy, "gradient-x1", "32-true", "stranger") for strategy in STRATEGIES[1::2]),
    # Asked once, after the backward pass.
    make_case("ddp", "loss-x1", "32-true", "ours"),
    make_case("ddp", "loss-x1", "32-true", "stranger"),
    make_case("zero_0", "loss-x1", "32-true", "stranger"),
]
#: fp16 with a loss scale that adapts.
HALF = [
    *(make_case(strategy, "loss-x3", "16-mixed", "ours") for strategy in ("ddp", *STRATEGIES[2:])),
    make_case("ddp", "loss-x1", "16-mixed", "stranger"),
]
#: A gradient that is not finite is what the scale is adapted by: the scaler makes no step, SkipNonFinite says nothing.
OVERFLOWS = [make_case(strategy, "gradient-x1", "16-mixed", "ours") for strategy in ("ddp", *STRATEGIES[2:])]
ENDS = [
    {"name": f"end-{strategy}-{what}", "strategy": strategy, "what": what}
    for strategy, what in (("ddp", "loss"), ("ddp", "gradient"), ("zero_3", "loss"), ("zero_2", "gradient"))
]
#: The stranger has a BatchNorm, which torch does not compute on CPUs where weights are bf16 and statistics are not.
MATRIX = [
    make_case(*values)
    for values in product(STRATEGIES, SCENES, ("32-true", "bf16-mixed", "16-mixed"), ("stranger", "ours"))
    if values[2] == "32-true" or values[3] == "ours"
    if values[2] != "16-mixed" or values[1].startswith("loss")
]


def run_in_two_processes(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    launch("-m", "tests.guard_worker", str(folder / "cases.json"), str(folder / "results.json"))
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in (0, 1)]


def check(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        found = result[case["name"]]
        assert "error" not in found, (rank, found["error"])
        assert found["differing"] == [] and found["is_finite"], (rank, found)
        assert found["counts"] == [len(case["dropped"]), 0]
        assert found["steps"][0] > 1


@pytest.fixture(scope="module")
def quick_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_two_processes(tmp_path_factory.mktemp("quick"), [*QUICK, *HALF, *OVERFLOWS, *ENDS])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [*QUICK, *HALF], ids=lambda case: case["name"])
def test_bad_on_one_rank(quick_results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    check(case, quick_results)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", HALF, ids=lambda case: case["name"])
def test_loss_scale_does_not_see_what_is_left_out(quick_results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    for result in quick_results:
        one, other = result[case["name"]]["scales"]
        assert one == other and one >= 256


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", OVERFLOWS, ids=lambda case: case["name"])
def test_overflows_are_left_to_the_scaler(quick_results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    """On all ranks together, and the weights stay finite; a scale of 256 is halved by the one overflow."""
    for result in quick_results:
        found = result[case["name"]]
        assert "error" not in found, found["error"]
        assert found["counts"] == [0, 0] and found["is_finite"]
        assert found["scales"][0] == 128.0 and found["scales"][1] >= 256.0
        assert found["steps"] == [4, 3]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", ENDS, ids=lambda case: case["name"])
def test_too_many_on_one_rank_end_all(quick_results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    first, second = (result[case["name"]]["said"] for result in quick_results)
    assert first == second and "2 batches in a row were left out (max_consecutive=2), the last one at epoch" in first
    if case["what"] == "loss":
        assert "with rank 1: loss=nan." in first and "rank 0: Here nothing was bad" in first
        assert "rank 1: The first tensor that is not finite is an input of first (Linear) (shape [6, 4]" in first
    elif case["strategy"] == "ddp":
        assert "rank 0: gradient=norm.bias, norm.weight" in first and "rank 1: gradient=norm.bias" in first
        assert "is that of the output of drop (Dropout)" in first.split("rank 1: Back")[1]
    else:
        assert "with gradient: dropped by the strategy." in first


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_two_processes(tmp_path_factory.mktemp("matrix"), MATRIX)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case["name"])
def test_matrix(all_results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    check(case, all_results)
