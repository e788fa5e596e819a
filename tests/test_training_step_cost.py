"""What a step makes ranks wait for, counted: collective operations, and reads of tensors that lie on a device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from sat_lightning.training import SkipNonFinite, zero_groups
from sat_lightning.training.zero_groups import join_groups
from tests.cost_counter import StepCosts, counting
from tests.guard_examples import Stranger, fit, make_batches, make_guarded_task
from tests.processes import launch

STRATEGIES = ("ddp", "zero_0", "zero_1", "zero_2", "zero_3")
CASES = [
    *({"strategy": strategy, "what": what} for strategy in STRATEGIES for what in ("minimal", "ours", "guarded")),
    {"strategy": "zero_2", "what": "minimal", "clip": 0.5, "accumulate": 2},
    {"strategy": "zero_2", "what": "guarded", "clip": 0.5, "accumulate": 2},
    {"strategy": "zero_2", "what": "guarded", "precision": "bf16-mixed"},
    {"strategy": "zero_2", "what": "guarded", "log_every": 5},
]
ASK, STOP, NORM = "all_reduce in finite.read_highest", "all_reduce in finite.exchange", "cpu in zero_groups.norm"
LIGHTNING_ASKS = "broadcast in training_epoch_loop._broadcast_sigterm_tensor"
GATHER = "all_gather_into_tensor in zero_groups.gather_groups"
READ = "tolist in finite.read_highest"


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 counted, per batch; the other one counts the same."""
    folder = tmp_path_factory.mktemp("costs")
    (folder / "cases.json").write_text(json.dumps([{**case, "name": name_of(case)} for case in CASES]))
    launch("-m", "tests.cost_worker", str(folder / "cases.json"), str(folder / "results.json"))
    ranks = [json.loads((folder / f"results.{rank}").read_text()) for rank in (0, 1)]
    assert not [result["error"] for result in ranks[0].values() if "error" in result]
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guard_and_signals_are_one_small_collective_in_place_of_lightnings(found: Any, strategy: str) -> None:
    minimal, ours, guarded = (dict(found[f"{strategy}-{w}"]["collectives"]) for w in ("minimal", "ours", "guarded"))
    assert minimal.pop(LIGHTNING_ASKS) == 1
    assert ours.pop(STOP) == 1 and ours == minimal
    assert guarded.pop(ASK) == 1 and guarded == minimal


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_guard_signals_and_monitor_read_once(found: Any, strategy: str) -> None:
    # A rank reads what others answered a batch ago; and under ZeRO 1 to 3 the norm, in DeepSpeed's place.
    of_zero = {NORM: 1} if strategy in ("zero_1", "zero_2", "zero_3") else {}
    assert found[f"{strategy}-minimal"]["reads"] == of_zero
    assert found[f"{strategy}-ours"]["reads"] == {"__int__ in finite.read": 1, **of_zero}
    assert found[f"{strategy}-guarded"]["reads"] == {READ: 1, **of_zero}


@pytest.mark.timeout(1200)
def test_an_accumulated_batch_is_asked_about_once(found: Any) -> None:
    minimal, guarded = (dict(found[f"zero_2-{what}-0.5-2"]["collectives"]) for what in ("minimal", "guarded"))
    assert minimal.pop(LIGHTNING_ASKS) == guarded.pop(ASK) == 1 and guarded == minimal
    assert found["zero_2-guarded-0.5-2"]["reads"] == {READ: 1, NORM: 0.5}


@pytest.mark.timeout(1200)
def test_all_groups_are_one_norm_and_one_gather(found: Any) -> None:
    """A task has two parameter groups, with and without weight decay."""
    for name in ("zero_1-guarded", "zero_2-guarded", "zero_2-guarded-bf16-mixed"):
        collectives = dict(found[name]["collectives"])
        assert [collectives.pop(kind) for kind in (ASK, "all_reduce in zero_groups.norm", GATHER)] == [1, 1, 1]
        assert collectives == {"all_reduce in torch.all_reduce": 1}  # the gradients


@pytest.mark.timeout(1200)
def test_what_is_logged_is_gathered_once_for_all(found: Any) -> None:
    quiet, logged = (found[f"zero_2-guarded{end}"]["collectives"] for end in ("", "-5"))
    assert {name: round(5 * number) for name, number in logged.items() if number != quiet.get(name)} == {
        "all_reduce in finite.sum_over_ranks": 1,  # the means of the module
        "all_gather in functional.forward": 1,  # the rates of the monitor
    }


@pytest.mark.parametrize("make", [Stranger, make_guarded_task])
@pytest.mark.parametrize(("accumulate", "checks", "reads"), [(1, True, 1.0), (1, False, 1.0), (2, True, 1.5)])
def test_one_process_reads_once(make: Any, accumulate: int, checks: bool, reads: float, tmp_path: Path) -> None:
    with counting(StepCosts()) as costs:
        guard = SkipNonFinite(check_gradients=checks)
        fit(make(), make_batches(16), tmp_path, callbacks=[guard, costs], accumulate_grad_batches=accumulate)
    assert costs.per_step(costs.reads) == {READ: reads}


class LooksBefore(Stranger):
    """Looks at each batch before its backward pass, so that none may be bad."""

    def on_before_backward(self, loss: Tensor) -> None:
        assert torch.isfinite(loss.detach()).all()


class LooksInside(Stranger):
    """Keeps what a backward pass comes to, so that no loss may be bad."""

    def __init__(self) -> None:
        super().__init__()
        self.last.register_full_backward_hook(self.look)

    def look(self, module: Any, inputs: Any, outputs: tuple[Tensor]) -> None:
        assert torch.isfinite(outputs[0]).all()


class StepsItself(Stranger):
    """Runs a batch without a step now and then, which is its own affair."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class LooksAfter(L.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        assert all(torch.isfinite(p.grad).all() for p in pl_module.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (LooksBefore, {}),
        (LooksInside, {}),
        (StepsItself, {}),
        (Stranger, {"callbacks": [LooksAfter()]}),
        (Stranger, {"detect_anomaly": True}),
    ],
    ids=["module", "tensor hook", "step", "callback", "anomaly"],
)
def test_who_would_see_a_bad_backward_pass_sees_none(make: Any, arguments: dict[str, Any], tmp_path: Path) -> None:
    callbacks = [SkipNonFinite(), costs := StepCosts(), *arguments.pop("callbacks", [])]
    with counting(costs):
        fit(make(), make_batches(16, (2, 7)), tmp_path, callbacks=callbacks, **arguments)
    assert callbacks[0].num_skipped == 2
    assert costs.reads[READ] == 10 + 9  # a second time for the gradients of all but the bad one


def test_after_a_bad_batch_no_more_is_read(tmp_path: Path) -> None:
    class Reads(L.Callback):
        """Counts what anybody reads in a batch, Lightning too."""

        def __init__(self) -> None:
            self.number, self.by_batch = 0, {}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.by_batch[batch_idx] = self.number

    reads, item = Reads(), Tensor.item

    def counted(self: Tensor) -> Any:
        reads.number += 1
        return item(self)

    Tensor.item = counted
    try:
        trainer = fit(make_guarded_task(), make_batches(12, (4,)), tmp_path, callbacks=[SkipNonFinite(), reads])
    finally:
        Tensor.item = item
    per_batch = [reads.by_batch[number + 1] - reads.by_batch[number] for number in (2, 8, 9)]
    assert per_batch[0] == per_batch[1] == per_batch[2]
    assert trainer.progress_bar_metrics["skipped_batches"] == 1.0
    assert trainer.callback_metrics["skipped_batches"] == 1.0


@pytest.fixture
def alone() -> Iterator[Any]:
    # An earlier run in this process leaves a group of one rank, which DeepSpeed goes on with: it stays.
    is_first = not torch.distributed.is_initialized()
    if is_first:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    if is_first:
        torch.distributed.destroy_process_group()


def make_optimizer(group: Any, **changes: Any) -> Any:
    """What is needed of an optimizer of ZeRO's."""
    padding = torch.full((2,), 9.0)
    padding._zero_padding = True
    gradients = {0: [torch.full((4,), 1e25), padding], 1: [torch.full((5,), 1e25)]}
    parts = {"scaled_global_norm": None, "step": None, "device": "cpu", "optimizer": None}
    return SimpleNamespace(**{"averaged_gradients": gradients, "dp_process_group": group, **parts, **changes})


def test_a_norm_is_finite_where_the_gradients_are(alone: Any) -> None:
    """Their squares are not, in fp32."""
    optimizer = make_optimizer(alone)
    join_groups(optimizer)
    assert optimizer.scaled_global_norm().item() == pytest.approx(3e25) and (3e25) ** 2 > torch.finfo().max
    assert optimizer.scaled_global_norm().dtype is torch.float32
    optimizer.averaged_gradients[1][0][3] = float("nan")
    assert optimizer.scaled_global_norm().isnan()
    optimizer.averaged_gradients = {0: None}
    assert optimizer.scaled_global_norm() == 0


@pytest.mark.parametrize("special", ["cpu_offload", "offload_optimizer", "has_moe_layers", "mpu"])
def test_what_counts_otherwise_is_left_to_deepspeed(alone: Any, special: str) -> None:
    optimizer = make_optimizer(alone, **{special: True})
    join_groups(optimizer)
    assert optimizer.scaled_global_norm is None


@pytest.mark.parametrize(("few", "num_gathers"), [(200, 2), (100, 3), (7, 4)])
def test_groups_are_gathered_together_if_they_are_small(
    monkeypatch: pytest.MonkeyPatch, few: int, num_gathers: int
) -> None:
    """Of three ranks the second one, which has its own part of each of four groups."""
    sizes, dtypes = (2, 3, 40, 2), (torch.float32,) * 3 + (torch.bfloat16,)
    wanted = [torch.rand(3 * size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    found = [torch.zeros_like(whole) for whole in wanted]
    parts = [list(whole.view(3, -1)) for whole in found]
    for part, whole in zip(parts, wanted, strict=True):
        part[1].copy_(whole.view(3, -1)[1])
    calls = []

    def gather(whole: Tensor, part: Tensor, ranks: Any) -> None:
        calls.append(part)
        by_rank = [torch.cat([w.view(3, -1)[r] for w in wanted if w.dtype is part.dtype]) for r in range(3)]
        start = next(s for s in range(len(by_rank[1])) if by_rank[1][s : s + len(part)].equal(part))
        whole.copy_(torch.cat([of_rank[start : start + len(part)] for of_rank in by_rank]))

    monkeypatch.setattr(zero_groups, "_FEW", few)
    for name, function in (("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda ranks, value=function: value)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    zero_groups.gather_groups(found, parts, [None] * 4)
    assert all(map(torch.equal, found, wanted)) and len(calls) == num_gathers
