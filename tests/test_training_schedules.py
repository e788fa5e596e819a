from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from sat_lightning.errors import ConfigError
from sat_lightning.training import OptimConfig
from sat_lightning.training.optim import make_schedule
from sat_lightning.training.schedules import COOLDOWN_SHAPES, SCHEDULES, schedule_factor
from tests.training_examples import counting_loader, make_task, make_trainer

TABLE = json.loads((Path(__file__).parent / "data" / "tables" / "annealing_lr.json").read_text())
FALLING = [name for name in SCHEDULES if name not in ("constant", "inverse_sqrt", "sat_linear", "sat_cosine")]


def sgd(rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=rate)


def walk(schedule, num_steps: int) -> list[float]:
    """The rates that the optimizer uses in so many steps."""
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def random_curves(seed: int = 0, count: int = 60):
    """Schedules of all kinds with settings drawn at random."""
    draw = random.Random(seed)
    for index in range(count):
        num_steps = draw.randint(1, 300)
        yield (
            num_steps,
            dict(
                warmup_steps=draw.randint(0, num_steps),
                schedule=SCHEDULES[index % len(SCHEDULES)],
                minimum_ratio=draw.choice([1e-3, 0.1, 0.5, draw.random() or 0.5, 1.0]),
                cooldown_ratio=draw.random(),
                cooldown_shape=draw.choice(COOLDOWN_SHAPES),
            ),
        )


def test_every_curve_rises_once_and_then_never_rises_again() -> None:
    for num_steps, curve in random_curves():
        rates = [schedule_factor(step, num_steps, **curve) for step in range(num_steps + 20)]
        top = curve["warmup_steps"]
        assert all(a < b for a, b in itertools.pairwise(rates[:top])), curve
        assert all(a >= b for a, b in itertools.pairwise(rates[max(0, top - 1) :])), curve
        assert all(0 <= rate <= 1 for rate in rates), curve
        if curve["schedule"] != "sat_linear":
            assert min(rates[top:]) >= min(curve["minimum_ratio"], 1.0), curve


@pytest.mark.parametrize("schedule", FALLING)
def test_floor_is_reached_in_the_last_step_exactly_and_kept(schedule: str) -> None:
    for num_steps, curve in random_curves(seed=1):
        if curve["warmup_steps"] >= num_steps - 1 or round(curve["cooldown_ratio"] * num_steps) < 1:
            continue
        curve["schedule"] = schedule
        rates = [schedule_factor(step, num_steps, **curve) for step in range(num_steps + 5)]
        assert rates[num_steps - 1 :] == [curve["minimum_ratio"]] * 6, curve
        if curve["minimum_ratio"] < 1:
            assert rates[num_steps - 2] > curve["minimum_ratio"], curve


def test_first_step_end_of_the_rise_and_last_step() -> None:
    ends = {
        schedule: [round(schedule_factor(step, 100, 10, schedule, 0.1), 6) for step in (0, 9, 10, 50, 99)]
        for schedule in SCHEDULES
    }
    middle = 40 / 89
    assert ends == {
        "cosine": [0.1, 1.0, 1.0, round(0.1 + 0.45 * (1 + math.cos(math.pi * middle)), 6), 0.1],
        "linear": [0.1, 1.0, 1.0, round(1 - 0.9 * middle, 6), 0.1],
        "exponential": [0.1, 1.0, 1.0, round(0.1**middle, 6), 0.1],
        "constant": [0.1, 1.0, 1.0, 1.0, 1.0],
        "wsd": [0.1, 1.0, 1.0, 1.0, 0.1],
        "inverse_sqrt": [0.1, 1.0, *(round(math.sqrt(10 / count), 6) for count in (11, 51, 100))],
        "sat_linear": [0.1, 1.0, 0.99, 0.59, 0.1],
        "sat_cosine": [0.1, 1.0, 0.999778, round(0.1 + 0.45 * (1 + math.cos(math.pi * 0.41)), 6), 0.122025],
    }  # fmt: skip


def test_wsd_falls_only_in_its_last_part() -> None:
    halves = {"linear": 0.6, "cosine": 0.6, "exponential": math.sqrt(0.2), "sqrt": 1 - 0.8 * math.sqrt(0.5)}
    for shape, halfway in halves.items():
        curve = [schedule_factor(step, 100, 5, "wsd", 0.2, 0.2, shape) for step in range(100)]
        assert curve[4:80] == [1.0] * 76 and curve[80] < 1.0
        assert curve[89] == pytest.approx(halfway) and curve[99] == 0.2


@pytest.mark.parametrize("name", [name for name in TABLE["columns"] if "exponential" not in name])
def test_sat_schedules_equal_the_table(name: str) -> None:
    column = TABLE["columns"][name]
    style = column["decay_style"]
    config = OptimConfig(
        schedule="constant" if style == "constant" else f"sat_{style}",
        minimum_ratio=column["decay_ratio"],
        warmup_ratio=column["warmup_iter"] / column["num_iters"],
        decay_steps=column["num_iters"],
        # The scheduler's first rate is that of step `init_step + 1`, counted from 1 by SwissArmyTransformer.
        steps_before=max(0, column["init_step"]),
        auto_warmup_steps=column["auto_warmup_steps"],
    )
    is_before_first = column["init_step"] < 0  # row 0 is then a rate of 0, with which no step is made
    rates = walk(make_schedule(sgd(column["start_lr"]), config, math.inf), 201)
    expected = dict(zip(TABLE["rows"], column["rates"], strict=True))
    ours, theirs = [], []
    for row, rate in expected.items():
        if row == 0 and is_before_first:
            continue
        if is_before_first and column["auto_warmup_steps"] and row == column["auto_warmup_steps"]:
            continue  # theirs counts the rate of 0 as one of the steps held down
        ours.append(rates[row - 1 if is_before_first else row])
        theirs.append(max(0.0, rate))  # below 0 their linear fall climbs the loss: not ported
    assert len(ours) > 40 and ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


def test_exponential_of_the_table_is_constant_and_ours_falls() -> None:
    assert TABLE["columns"]["exponential_warm20"]["rates"] == TABLE["columns"]["constant_warm20"]["rates"]
    assert schedule_factor(199, 200, 20, "exponential", 0.1) == 0.1


def test_fractional_rise_of_sat() -> None:
    rates = walk(make_schedule(sgd(), OptimConfig(schedule="sat_linear", warmup_ratio=0.01), 250), 4)
    assert rates == pytest.approx([0.4, 0.8, 1 - 0.5 / 250, 1 - 1.5 / 250])


def test_no_rise_and_automatic_warmup_go_together() -> None:
    rates = walk(make_schedule(sgd(), OptimConfig(schedule="constant", auto_warmup_steps=3), 10), 5)
    assert rates == [0.05, 0.05, 0.05, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_rates_equal_those_of_an_unbroken_run(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=4, cooldown_ratio=0.3)
    whole = walk(make_schedule(sgd(0.5), config, 20), 25)
    for stop in (0, 1, 4, 11, 19):
        first = make_schedule(sgd(0.5), config, 20)
        walk(first, stop)
        state = json.loads(json.dumps(first.state_dict()))  # nothing but numbers
        second = make_schedule(sgd(0.5), config, 20)
        second.load_state_dict(state)
        assert walk(second, 25 - stop) == whole[stop:]


def test_automatic_warmup_holds_back_after_each_resumption() -> None:
    config = OptimConfig(schedule="linear", minimum_ratio=0.0, auto_warmup_steps=2, auto_warmup_rate=0.1)
    first = make_schedule(sgd(), config, 11)
    assert walk(first, 5) == pytest.approx([0.1, 0.1, 0.8, 0.7, 0.6])
    second = make_schedule(sgd(), config, 11)
    second.load_state_dict(first.state_dict())
    assert walk(second, 6) == pytest.approx([0.1, 0.1, 0.3, 0.2, 0.1, 0.0])
    third = make_schedule(sgd(), config, 11)
    third.load_state_dict(first.state_dict() | {"last_epoch": 10})
    assert walk(third, 1) == [0.0]  # never raised above the schedule


def test_another_peak_in_a_resumed_run_counts_and_is_said() -> None:
    config = OptimConfig(schedule="linear", minimum_ratio=0.0)
    first = make_schedule(sgd(0.5), config, 5)
    walk(first, 2)
    second = make_schedule(sgd(0.25), config, 5)
    with pytest.warns(UserWarning, match=r"peak learning rates were \[0.5\]; this run goes on with \[0.25\]."):
        second.load_state_dict(first.state_dict())
    assert walk(second, 3) == [0.125, 0.0625, 0.0]


def test_schedule_takes_a_rate_that_is_a_tensor() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.5))
    schedule = make_schedule(optimizer, OptimConfig(schedule="linear", minimum_ratio=0.0), 5)
    walk(schedule, 2)
    schedule.load_state_dict(schedule.state_dict())
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.25


def test_endless_run_needs_a_length_or_an_endless_schedule() -> None:
    with pytest.raises(ConfigError, match="a wsd schedule needs the length of the run, and this one has none"):
        make_schedule(sgd(), OptimConfig(schedule="wsd"), math.inf)
    assert walk(make_schedule(sgd(), OptimConfig(schedule="linear", decay_steps=3), math.inf), 4) == [1, 0.55, 0.1, 0.1]
    rates = walk(make_schedule(sgd(), OptimConfig(schedule="inverse_sqrt", warmup_steps=2), math.inf), 300)
    assert rates[7] == 0.5 and rates[-1] == 0.1


def test_run_that_continues_another_starts_in_the_middle_of_the_schedule() -> None:
    config = OptimConfig(schedule="linear", warmup_steps=3, minimum_ratio=0.0)
    whole = walk(make_schedule(sgd(), config, 30), 30)
    later = OptimConfig(schedule="linear", warmup_steps=3, minimum_ratio=0.0, steps_before=12)
    assert walk(make_schedule(sgd(), later, 18), 18) == whole[12:]


def test_trainer_resumes_with_the_rates_of_an_unbroken_run(tmp_path) -> None:
    def run(num_steps: int, max_steps: int, ckpt: Path | None, save: Path | None) -> list[float]:
        task = make_task(optim=OptimConfig(schedule="wsd", warmup_steps=2, cooldown_ratio=0.4, decay_steps=max_steps))
        seen: list[float] = []
        task.on_train_batch_end = lambda *_: seen.append(task.trainer.optimizers[0].param_groups[0]["lr"])
        trainer = make_trainer(num_steps)
        trainer.fit(task, counting_loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        if save:
            trainer.save_checkpoint(save)
        return seen

    whole = run(8, 8, None, None)
    first = run(3, 8, None, tmp_path / "3.ckpt")
    assert first + run(8, 8, tmp_path / "3.ckpt", None) == whole and len(set(whole)) > 3
