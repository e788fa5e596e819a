"""A run with bad batches is a run that never saw them; too many end it with a reason."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.plugins import MixedPrecision

from sat_lightning.errors import ConfigError, NonFiniteError
from sat_lightning.training import SATDeepSpeedStrategy, SkipNonFinite, ZeroOptions
from sat_lightning.training.callbacks.curves import read_curves
from sat_lightning.training.deepspeed import load_deepspeed
from tests.guard_examples import Stranger, differing, fit, make_batches, make_guarded_task, state_of


def without(batches: list[Any], left_out: tuple[int, ...]) -> list[Any]:
    return [batch for number, batch in enumerate(batches) if number not in left_out]


@pytest.mark.parametrize("what", ["loss", "metric"])
@pytest.mark.parametrize(
    ("num_accumulated", "num_batches", "bad"),
    [
        (1, 6, (0,)),
        (1, 6, (2, 3)),
        (1, 6, (5,)),
        (3, 10, (3,)),  # the first of a window
        (3, 10, (4,)),  # a middle one
        (3, 10, (5,)),  # the last
        (3, 10, (0, 4, 8)),
        (3, 9, (8,)),  # the last of the epoch, with a window open
        (3, 9, (7, 8)),
        (3, 10, (9,)),  # the last of the epoch, with no window open
        (3, 8, (6,)),  # in the short window at the end
    ],
)
def test_a_run_with_bad_batches_equals_one_that_never_saw_them(
    num_accumulated: int, num_batches: int, bad: tuple[int, ...], what: str, tmp_path: Path
) -> None:
    batches = make_batches(num_batches, bad, what)
    states = []
    for rows in (batches, without(batches, bad)):
        guard = SkipNonFinite(max_fraction=0.5)
        trainer = fit(
            Stranger(returns_dict=True, frequency=2),
            rows,
            tmp_path,
            callbacks=guard,
            accumulate_grad_batches=num_accumulated,
            gradient_clip_val=0.5,
            max_epochs=2,
        )
        states.append(state_of(trainer))
        assert guard.num_skipped == (2 * len(bad) if rows is batches else 0)
    assert differing(*states) == []


def test_the_guard_changes_nothing_where_all_is_good(tmp_path: Path) -> None:
    batches = make_batches(10)
    states = []
    for callbacks in ([], [SkipNonFinite()]):
        trainer = fit(Stranger(), batches, tmp_path, callbacks=callbacks, accumulate_grad_batches=3, max_epochs=2)
        states.append(state_of(trainer))
    assert differing(*states) == []
    assert "training_step" not in trainer.strategy.__dict__ and "log" not in trainer.lightning_module.__dict__


@pytest.mark.parametrize(
    ("num_accumulated", "bad", "dropped"), [(1, (2,), (2,)), (3, (4,), (3, 4, 5)), (3, (9,), (9,)), (1, (0,), (0,))]
)
def test_a_bad_gradient_drops_its_window(
    num_accumulated: int, bad: tuple[int, ...], dropped: tuple[int, ...], tmp_path: Path
) -> None:
    batches = make_batches(10, bad, "gradient")
    states = []
    for rows in (batches, without(batches, dropped)):
        guard = SkipNonFinite()
        trainer = fit(Stranger(), rows, tmp_path, callbacks=guard, accumulate_grad_batches=num_accumulated)
        states.append(state_of(trainer))
        assert guard.num_skipped == (len(dropped) if rows is batches else 0)
    assert differing(*states) == []


class Recorder(L.Callback):
    """Keeps what the trainer shows after each batch."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.shown: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)
        self.shown.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("check_metrics", [True, False])
def test_metrics_of_a_stranger_count_only_if_asked(check_metrics: bool, tmp_path: Path) -> None:
    guard = SkipNonFinite(check_metrics=check_metrics)
    fit(Stranger(returns_dict=True), make_batches(4, (1,), "metric"), tmp_path, callbacks=guard)
    assert guard.num_skipped == check_metrics


def test_logits_with_infinity_in_them_are_no_metric(tmp_path: Path) -> None:
    class WithLogits(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "logits": torch.full((3,), float("-inf")), "name": "x", "count": 3}

    guard = SkipNonFinite()
    trainer = fit(WithLogits(), make_batches(3), tmp_path, callbacks=guard)
    assert (guard.num_skipped, trainer.global_step) == (0, 3)


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_what_a_bad_batch_logged_is_dropped_and_the_count_is_logged(num_accumulated: int, tmp_path: Path) -> None:
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name=None, version="")
    recorder = Recorder()
    batches = make_batches(8, (2, 5))
    trainer = fit(
        Stranger(),
        batches,
        tmp_path,
        callbacks=[SkipNonFinite(), recorder],
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=num_accumulated,
    )
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped_batches"] for row in rows if row["skipped_batches"]] == ["1.0", "2.0"]
    logged = [float(row["loss_step"]) for row in rows if row["loss_step"]]
    assert len(logged) == trainer.global_step == 6 // num_accumulated and all(map(math.isfinite, logged))
    losses = [number_of(outputs["loss"]) * num_accumulated for outputs in recorder.outputs if outputs]
    assert recorder.outputs[2] == recorder.outputs[5] == {}
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert recorder.shown[2 + 1]["skipped_batches"] == 1 and trainer.callback_metrics["skipped_batches"] == 2


def number_of(tensor: torch.Tensor) -> float:
    return tensor.item()


def test_each_left_out_batch_is_written_down(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"left out batch \[1\] of epoch 0, rank 0: loss=nan; 1 so far. See .*jsonl"):
        fit(Stranger(), make_batches(6, (1, 4)), tmp_path, callbacks=SkipNonFinite(), accumulate_grad_batches=2)
    lines = [json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert lines == [
        {"epoch": 0, "batches": [1], "global_step": 0, "found": {"rank 0": {"loss": "nan"}}, "samples": None},
        {"epoch": 0, "batches": [4], "global_step": 1, "found": {"rank 0": {"loss": "nan"}}, "samples": None},
    ]


def test_a_dropped_window_is_written_down_with_its_parameters(tmp_path: Path) -> None:
    batches = make_batches(6, (4,), "gradient")
    fit(Stranger(), batches, tmp_path, callbacks=SkipNonFinite(), accumulate_grad_batches=3)
    (line,) = (json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines())
    assert (line["batches"], line["global_step"]) == ([3, 4, 5], 1)
    assert line["found"] == {"rank 0": {"gradient": "norm.bias, norm.weight, first.bias and 1 more"}}


@pytest.mark.parametrize(
    ("num_accumulated", "what", "bad", "num_in_a_row"),
    [
        (1, "loss", (1, 2, 4, 5, 6), 3),
        (3, "loss", (2, 3, 6, 7, 8), 3),
        (3, "gradient", (4, 7), 6),
    ],
)
def test_too_many_in_a_row_end_the_run(
    num_accumulated: int, what: str, bad: tuple[int, ...], num_in_a_row: int, tmp_path: Path
) -> None:
    guard = SkipNonFinite(max_consecutive=num_in_a_row, max_fraction=0.9)
    batches = make_batches(12, bad, what)
    with pytest.raises(NonFiniteError) as caught:
        fit(Stranger(), batches, tmp_path, callbacks=guard, accumulate_grad_batches=num_accumulated)
    last = bad[-1] if what == "loss" else 8
    said = str(caught.value)
    assert f"{num_in_a_row} batches in a row were left out (max_consecutive={num_in_a_row})" in said
    assert f"the last one at epoch 0, batch {last}, global step " in said
    assert "Set diagnose=True to have the first module and tensor named." in said
    patient = SkipNonFinite(max_consecutive=num_in_a_row + 1, max_fraction=0.9)
    fit(Stranger(), batches, tmp_path, callbacks=patient, accumulate_grad_batches=num_accumulated)


def test_too_large_a_part_ends_the_run(tmp_path: Path) -> None:
    bad = tuple(range(0, 12, 2))
    with pytest.raises(
        NonFiniteError, match=r"4 of 7 batches were left out \(max_fraction=0.03\), the last one at .* 6"
    ):
        fit(Stranger(), make_batches(12, bad), tmp_path, callbacks=SkipNonFinite(max_fraction=0.03))
    guard = SkipNonFinite(max_fraction=0.03)
    fit(Stranger(), make_batches(300, tuple(range(36, 300, 36))), tmp_path, callbacks=guard)
    assert guard.num_skipped == 8


def test_a_failed_run_leaves_trainer_and_module_as_they_were(tmp_path: Path) -> None:
    module = Stranger()
    with pytest.raises(NonFiniteError):
        fit(module, make_batches(3, (1,)), tmp_path, callbacks=SkipNonFinite(1))
    assert "log" not in module.__dict__
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert module.norm.running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_consecutive": 0}, "SkipNonFinite: max_consecutive is 0. Set it to at least 1."),
        ({"max_fraction": 1.5}, "SkipNonFinite: max_fraction is 1.5. Set it between 0 and 1."),
    ],
)
def test_limits_must_make_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SkipNonFinite(**arguments)
    assert str(caught.value) == said


def test_manual_optimization_and_lbfgs_are_refused(tmp_path: Path) -> None:
    module = Stranger()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="Stranger has automatic_optimization=False, so its training step calls"):
        fit(module, make_batches(1), tmp_path, callbacks=SkipNonFinite())

    class Newton(Stranger):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigError, match="LBFGS computes a batch several times a step. Use another optimizer."):
        fit(Newton(), make_batches(1), tmp_path, callbacks=SkipNonFinite())


def test_metrics_of_torchmetrics_forget_a_bad_batch(tmp_path: Path) -> None:
    class Measured(Stranger):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric(nan_strategy="disable")
            self.all = torchmetrics.CatMetric(nan_strategy="disable")

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.mean.update(loss.detach())
            self.all.update(loss.detach())
            self.log("mean", self.mean, on_epoch=True)
            return loss

    module = Measured()
    trainer = fit(module, make_batches(6, (0, 3)), tmp_path, callbacks=SkipNonFinite())
    assert math.isfinite(trainer.callback_metrics["mean"])
    assert len(module.all.compute()) == 4 and module.all.compute().isfinite().all()


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_fp16_leaves_overflows_to_the_scaler_and_nothing_else(num_accumulated: int, tmp_path: Path) -> None:
    states = []
    for bad_loss in ((4,), ()):
        batches = make_batches(8, (2,), "gradient")
        batches = [batch for number, batch in enumerate(batches) if number != 4 or bad_loss]
        for number in bad_loss:
            batches[number]["x"][0, 0] = float("nan")
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        guard = SkipNonFinite()
        trainer = fit(
            Stranger(),
            batches,
            tmp_path,
            callbacks=guard,
            plugins=MixedPrecision("16-mixed", "cpu", scaler),
            accumulate_grad_batches=num_accumulated,
        )
        assert guard.num_skipped == len(bad_loss)
        states.append(state_of(trainer))
    assert differing(*states) == []
    # Halved once by the bad gradient, and doubled after each three good steps.
    assert states[0]["scaler"]["scale"] == {1: 256.0, 2: 128.0}[num_accumulated]
    assert all(value.isfinite().all() for value in states[0].values() if isinstance(value, torch.Tensor))


def test_a_scaler_that_never_steps_ends_the_run(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(NonFiniteError, match=r"the loss scale of fp16 has fallen to 5.8e-11 by global step 50: grad"):
        bad = make_batches(60, tuple(range(60)), "gradient")
        fit(Stranger(), bad, tmp_path, callbacks=SkipNonFinite(), plugins=plugin)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_scaler_of_deepspeed_that_never_steps_ends_the_run(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 0 goes on for ever by itself, and the others end in an exception that says nothing of a cure."""
    device = load_deepspeed("cpu").accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: True)
    strategy = SATDeepSpeedStrategy(stage, options=ZeroOptions(initial_scale_power=3, hysteresis=1))
    with pytest.raises(
        NonFiniteError, match=r"the loss scale of fp16 has fallen to 1.0e\+00 by global step [34]: grad"
    ):
        bad = make_batches(20, tuple(range(20)), "gradient")
        at = {"strategy": strategy, "precision": "16-mixed", "callbacks": SkipNonFinite()}
        fit(make_guarded_task(), bad, tmp_path, **at)


def test_gradients_of_other_precisions_are_looked_at(tmp_path: Path) -> None:
    for precision in ("bf16-mixed", "64-true"):
        guard = SkipNonFinite()
        fit(Stranger(), make_batches(4, (1,), "gradient"), tmp_path, callbacks=guard, precision=precision)
        assert guard.num_skipped == 1


def test_a_finite_gradient_however_large_is_no_reason(tmp_path: Path) -> None:
    class Steep(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * 1e30

    guard = SkipNonFinite()
    fit(Steep(), make_batches(1), tmp_path, callbacks=guard)
    assert guard.num_skipped == 0


def test_compiled_modules_are_guarded_and_diagnosed(tmp_path: Path) -> None:
    def run(batches: list[Any], **arguments: Any) -> dict[str, Any]:
        module = Stranger()
        module.first.compile(backend="eager")
        module.last.compile(backend="eager")
        return state_of(fit(module, batches, tmp_path, callbacks=SkipNonFinite(**arguments)))

    batches = make_batches(6, (2,))
    assert differing(run(batches), run(without(batches, (2,)))) == []
    with pytest.raises(
        NonFiniteError, match=r"is an input of first \(Linear\) \(shape \[6, 4\], float32, 1 NaN, 0 inf"
    ):
        run(batches, max_consecutive=1, diagnose=True)


def test_the_steps_of_a_module_of_ours_are_guarded(tmp_path: Path) -> None:
    batches = make_batches(9, (4,), "loss")
    states, means = [], []
    for rows in (batches, without(batches, (4,))):
        logger = L.pytorch.loggers.CSVLogger(tmp_path, name=None, version="")
        trainer = fit(
            make_guarded_task(),
            rows,
            tmp_path,
            callbacks=SkipNonFinite(),
            logger=logger,
            log_every_n_steps=2,
            accumulate_grad_batches=2,
        )
        states.append(state_of(trainer))
        means.append(read_curves(tmp_path / "metrics.csv", ("train_loss", "train_score")))
    assert differing(*states) == []
    assert means[0] == means[1] and len(means[0]["train_loss"][1]) == 2
    metric = SkipNonFinite()
    fit(make_guarded_task(), make_batches(3, (1,), "metric"), tmp_path, callbacks=metric)
    assert metric.num_skipped == 1
