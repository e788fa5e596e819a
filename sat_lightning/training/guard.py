"""The seam by which a batch, or a window of accumulated batches, is left out of a run of any Lightning module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from sat_lightning.training.finite import read_highest
from sat_lightning.training.gradients import GradientCheck, forgets_backward
from sat_lightning.training.held import HeldLogs, count_batch, forget_batch, set_counting
from sat_lightning.training.rewind import Snapshot, StepRewind
from sat_lightning.training.verdict import BadBatch, Messenger, Values, Verdict, describe

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _LeftOut(Exception):
    """Leaves the training step, or the closure of the optimizer, before it can do harm."""

    def __init__(self, bad: BadBatch) -> None:
        super().__init__("a batch is left out")
        self.bad = bad


class StepGuard:
    """Stands between the trainer's loop and its strategy, from `attach` to `detach`.

    The forward pass is run, ranks agree on what came of it, and only then backward pass and optimizer follow. Where
    they do not, the loop is left as if the batch had not been there: windows of accumulated batches are counted in good
    batches. What a training step logs is held back until the batch is known to be good.

    Asked is before the backward pass, and about gradients once more before a step. Where a window is one batch and a
    backward pass of NaN leaves nothing behind (`forgets_backward`), both are asked at once, after the backward pass:
    the batch is left out all the same, its gradients are never used, and the host waits once. In longer windows that
    cannot be: a bad last batch would spoil the gradients of the good ones before it.

    Args:
        trainer: that fits.
        check_metrics: look at what the training step gives beside the loss.
        check_gradients: look at the gradients before each optimizer step.
        on_left_out: called on all ranks for whatever is left out; what it raises ends the run.
        messenger: whose number travels with the question, if there is one.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        check_metrics: bool,
        check_gradients: bool,
        on_left_out: Callable[[BadBatch], None],
        messenger: Messenger | None = None,
    ) -> None:
        self._trainer, self._module = trainer, trainer.lightning_module
        self._strategy: Any = trainer.strategy
        self._loop: Any = trainer.fit_loop.epoch_loop
        self._on_left_out, self._checks_gradients = on_left_out, check_gradients
        self.gradients = GradientCheck(trainer.strategy)
        """Looks at the gradients of a window."""
        self._verdict = Verdict(trainer, check_metrics, messenger)
        self._rewind = StepRewind(self._module, trainer.strategy.root_device)
        self._originals: dict[str, Callable[..., Any]] = {}
        self._undo: list[tuple[Any, str, Any]] = []
        self._logs = HeldLogs(self._module)
        self._undecided: tuple[Values, Snapshot] | None = None
        self._can_ask_once = False
        self._latest: Any = None  # arguments, and what was remembered before them
        self._latest_good: Any = None
        self._window_start: Any = None
        self._after_run = ExitStack()
        self._is_left_out, self._is_closing = False, False
        self._num_begun = 0
        self.window: list[int] = []
        """Good batches of the open window, this one included, numbered in the order they began."""
        self.num_accumulated = 0
        """Batches, good or not, since the last optimizer step, from the first good one on."""
        self.num_left_out = 0
        """Batches left out in this epoch."""
        self.has_stepped = False
        """Whether the last batch ended a window."""

    def attach(self, saved: Mapping[str, Any]) -> None:
        """Step in.

        Args:
            saved: in a resumed run what `state_dict` gave; it may be empty.
        """
        # Without a guard until now, the trainer's own count is right.
        num_begun = self._loop.batch_progress.current.processed % self._trainer.accumulate_grad_batches
        self.num_accumulated = saved.get("num_accumulated", num_begun)
        self.has_stepped = saved.get("has_stepped", not self._loop._should_accumulate())
        self.num_left_out = saved.get("num_left_out", 0)
        self._replace(self._strategy, "training_step", self._training_step)
        self._replace(self._strategy, "optimizer_step", self._optimizer_step)
        self._replace(self._loop.automatic_optimization, "run", self._run)
        self._replace(self._loop, "_should_accumulate", self._should_accumulate)
        self._replace(self._loop, "_update_learning_rates", self._update_learning_rates)
        self._replace(self._module, "log", self._logs.log)
        self._verdict.carry(True)
        if self._checks_gradients:
            self.gradients.prepare()
            is_left = self.gradients.is_left_to_engine or self.gradients.is_left_to_scaler
            self._can_ask_once = not is_left and forgets_backward(self._trainer)

    def detach(self) -> None:
        """Step out, and leave nothing behind."""
        for owner, name, before in reversed(self._undo):
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
        self._undo = []
        self._logs.drop()
        self._verdict.carry(False)
        set_counting(self._module, True)
        self._latest, self._latest_good, self._window_start = None, None, None

    def state_dict(self, num_in_window: int) -> dict[str, Any]:
        """Say where the run stands, as of the beginning of an open window.

        Args:
            num_in_window: batches left out since then.

        Returns:
            A few numbers, the same on every rank.
        """
        return {
            "num_accumulated": self.num_accumulated,
            "has_stepped": self.has_stepped,
            "num_left_out": self.num_left_out - num_in_window,
        }

    def begin_batch(self) -> None:
        """Count a batch as good until it is known better."""
        if self._loop.batch_progress.current.ready == 1:
            self.num_left_out, self.has_stepped = 0, True  # an epoch begins with a window
        if self.has_stepped:
            self.window = []
        if not self.window:
            self.num_accumulated, self._latest_good = 0, None
        self.has_stepped, self._is_left_out, self._is_closing = False, False, False
        self._num_begun += 1
        self.window.append(self._num_begun)

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:  # noqa: ANN401
        self._originals[name] = getattr(owner, name)
        self._undo.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = method

    def _run(self, optimizer: Any, batch_idx: int, kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Train on a batch; `{}`, as from a training step that returns None, if it is left out."""
        step = self._loop.automatic_optimization.optim_progress.optimizer.step
        before = [(count, count.ready) for count in (step.current, step.total)]
        # The trainer clears gradients where this is a multiple of the accumulated batches.
        index = batch_idx - (batch_idx - len(self.window) + 1) % self._trainer.accumulate_grad_batches
        bad: BadBatch | None = None
        try:
            outputs = self._originals["run"](optimizer, index, kwargs)
        except _LeftOut as left_out:
            outputs, bad = {}, left_out.bad
        finally:
            self._logs.drop()
            self._latest, self._undecided = None, None
            self._after_run.close()
        if bad is not None:
            for count, ready in before:
                count.ready = ready
            self._is_left_out = True
            self.num_left_out += len(bad.batches_ago)
            self.window = [] if bad.is_window else self.window[:-1]
        self.has_stepped = not self._should_accumulate()
        self.num_accumulated = self.num_accumulated + 1 if self.window and not self.has_stepped else 0
        if bad is not None:
            self._on_left_out(bad)
        return {} if self._is_closing else outputs

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        before = self._rewind.remember()
        if len(self.window) == 1:
            self._window_start = before
        self._latest = ((args, kwargs), before)
        output = self._forward(args, kwargs)
        self._rewind.learn(before)
        values = self._verdict.values(output)
        asks_later = self._can_ask_once and self._trainer.accumulate_grad_batches == 1
        set_counting(self._module, not asks_later)
        if asks_later:
            self._undecided = (values, before)
            return output
        if not self._verdict.ask(values)[0]:
            self._logs.release()
            if self._trainer.accumulate_grad_batches > 1 and output is not None:
                self._latest_good = self._latest
            return output
        bad = self._bad_batch(values, before)
        is_last = self._loop._num_ready_batches_reached() and not self._strategy.handles_gradient_accumulation
        if is_last and self._latest_good is not None:
            return self._close_window(bad, *self._latest_good)
        raise _LeftOut(bad)

    def _close_window(self, bad: BadBatch, good: _Arguments, before: Snapshot) -> Tensor:
        """The last batch of an epoch is bad and a window is open: step with what the window has.

        The last good batch is run again for a loss of which every gradient is zero, so that each strategy reduces,
        clips and steps in its own way.
        """
        output = self._after_run.enter_context(self._rerun(good, before))
        self._is_closing, self.window = True, self.window[:-1]
        self.num_left_out += 1
        self._on_left_out(bad)
        loss: Tensor = output["loss"] if isinstance(output, Mapping) else output
        return loss * 0.0

    def _bad_batch(self, values: Values, before: Snapshot) -> BadBatch:
        bad = BadBatch(describe(values), [0], partial(self._rerun, *self._latest))
        self._rewind.restore(before)
        return bad

    @contextmanager
    def _rerun(self, arguments: _Arguments, before: Snapshot) -> Iterator[Any]:
        """Compute a batch again, and take it back only when its backward pass, if any, is done."""
        now = self._rewind.remember()
        self._rewind.restore(before)
        try:
            output = self._forward(*arguments)
            self._logs.drop()
            forget_batch(self._module)
            yield output
        finally:
            self._rewind.restore(now)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        self._logs.hold()
        return self._originals["training_step"](*args, **kwargs)

    def _should_accumulate(self) -> bool:
        if self._is_left_out:
            return True
        if not self.window:
            return not self.has_stepped
        if len(self.window) % self._trainer.accumulate_grad_batches == 0:
            return False
        return bool(self._strategy.handles_gradient_accumulation or not self._loop._num_ready_batches_reached())

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Schedules that step every few batches count the good ones."""
        current = self._loop.batch_progress.current
        num_left_out = self.num_left_out if interval == "step" else 0
        current.ready -= num_left_out
        try:
            self._originals["_update_learning_rates"](interval, update_plateau_schedulers)
        finally:
            current.ready += num_left_out

    def _optimizer_step(
        self,
        optimizer: Any,  # noqa: ANN401
        closure: Callable[[], Any],
        model: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        is_stepping = self._checks_gradients and not self._should_accumulate() and not self.gradients.is_left_to_scaler

        def checked() -> Any:  # noqa: ANN401
            result = closure()
            if is_stepping and not self.gradients.is_left_to_engine:
                self._look_at_gradients(optimizer)
            return result

        result = self._originals["optimizer_step"](optimizer, checked, model, **kwargs)
        if is_stepping and self.gradients.is_bad_after_step():
            raise _LeftOut(self._bad_window())
        return result

    def _look_at_gradients(self, optimizer: Any) -> None:  # noqa: ANN401
        flag = self.gradients.find_bad(optimizer)
        if self._undecided is None:
            is_bad_gradient = read_highest([flag])[0] > 0
        else:
            values, before = self._undecided
            is_bad, is_bad_gradient = self._verdict.ask(values, flag)
            if is_bad:
                raise _LeftOut(self._bad_batch(values, before))
            self._logs.release()
            count_batch(self._module)
        if is_bad_gradient:
            raise _LeftOut(self._bad_window())

    def _bad_window(self) -> BadBatch:
        found = {"gradient": names} if (names := self.gradients.describe()) else {}
        self.gradients.drop()
        self._rewind.restore(self._window_start)
        batches_ago = [self._num_begun - number for number in self.window]
        return BadBatch(found, batches_ago, partial(self._rerun, *self._latest), is_window=True)
