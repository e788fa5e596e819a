from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sat_lightning.training import SkipNonFinite
from tests.guard_examples import Stranger, differing, fit, make_batches, state_of


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
