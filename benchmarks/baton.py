"""Several contestants, each a process of its own, of which one computes at a time: whoever holds the baton.

A shared machine drifts, so runs one after the other say little about each other, and runs at the same time take the
cores from each other. Here all contestants are alive together, each with memory of its own, and the baton passes on
every few steps: `turn` steps of one, the same steps of the next. The clock runs only for its holder. So drift hits all
alike, and the ratio of a turn compares the same work within seconds.

A contestant is a function of a `Baton` and of its own arguments that can be pickled:

    def train(baton, path):
        ...                              # build; contestants do so at the same time, which is not timed
        baton.start(tokens_of_each_step)
        for batch in batches:            # in a callback, where a trainer owns the loop
            loss = step(batch)
            baton.step(loss)
        return {"accuracy": ...}         # computed with the baton in hand, but not timed

    results = race({"ours": (train, "a"), "theirs": (train, "b")}, turn=10)
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timing
from torch import Tensor

LOG_TAIL = 4000


@dataclass(frozen=True)
class Turn:
    """What a contestant did from taking the baton to giving it."""

    seconds: float
    """On the clock of the baton."""
    tokens: int
    losses: list[float]
    """One for each step."""
    busy: float
    """CPU seconds that other processes used meanwhile, of all CPUs; 0 where nobody counts."""


@dataclass
class Result:
    """The whole run of a contestant."""

    turns: list[Turn] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """What its function returned."""

    @property
    def timed(self) -> list[Turn]:
        """All turns but the first, which warms up; that one too if there is no other."""
        return self.turns[1:] or self.turns

    @property
    def losses(self) -> list[float]:
        return [loss for turn in self.turns for loss in turn.losses]

    def tokens_per_second(self) -> float:
        return sum(turn.tokens for turn in self.timed) / sum(turn.seconds for turn in self.timed)

    def ratios(self, other: Result) -> list[float]:
        """How many times this one's time the other took, turn by turn.

        Raises:
            SystemExit: the turns do not hold the same tokens.
        """
        pairs = list(zip(self.timed, other.timed, strict=True))
        if any(own.tokens != their.tokens for own, their in pairs):
            raise SystemExit("The contestants' turns hold different tokens: they did not train on the same batches.")
        return [their.seconds / own.seconds for own, their in pairs]


class Baton:
    """The contestant's end: it computes only between taking the baton and giving it.

    Args:
        connection: to the parent.
        turn: steps that it holds the baton.
        device: `cuda` is synchronised before the clock is read.
        own_time: count this process's CPU time, which means something for one thread only.
    """

    def __init__(self, connection: Connection, turn: int, device: str = "cpu", own_time: bool = False) -> None:
        self.connection, self.turn, self.device = connection, turn, device
        self.clock = time.process_time if own_time else time.perf_counter
        self.tokens: Sequence[int] = ()
        self.done = self.begun = 0
        self.losses: list[Tensor] = []
        self.started, self.busy, self.own = 0.0, 0.0, 0.0

    def start(self, tokens: Sequence[int]) -> None:
        """Wait for the first turn, built and ready to make the first step.

        Args:
            tokens: of each step there will be.
        """
        self.tokens = tokens
        self.connection.send(None)
        self._take()

    def step(self, loss: Tensor) -> None:
        """Count a step, and pass the baton on if it was the last one of the turn; returns with the baton in hand.

        Args:
            loss: of the step; it is read when the clock stands.
        """
        self.losses.append(loss.detach())
        self.done += 1
        if self.done - self.begun == self.turn or self.done == len(self.tokens):
            self._give()
            self._take()

    def _take(self) -> None:
        self.connection.recv()
        self.busy, self.own = timing.busy_seconds(), time.process_time()
        self.started = self.clock()

    def _give(self) -> None:
        timing.synchronize(self.device)
        seconds = self.clock() - self.started
        busy = max(0.0, timing.busy_seconds() - self.busy - (time.process_time() - self.own))
        tokens = sum(self.tokens[self.begun : self.done])
        self.connection.send(Turn(seconds, tokens, [float(loss) for loss in self.losses], busy))
        self.begun, self.losses = self.done, []


def race(
    contestants: dict[str, tuple[Any, ...]],
    turn: int,
    *,
    device: str = "cpu",
    own_time: bool = False,
    inspect: Callable[[dict[str, Result]], None] = lambda results: None,
) -> dict[str, Result]:
    """Let contestants train, one at a time, turn by turn; who begins a round changes with the rounds.

    Args:
        contestants: by name a function of a `Baton`, of the top level of a module, and its further arguments. It
            returns a dict.
        turn: steps until the baton passes on.
        device: see `Baton`.
        own_time: see `Baton`.
        inspect: sees the first turn of all, and may raise rather than let an unequal race go on for hours.

    Returns:
        What each did.

    Raises:
        SystemExit: one failed; the end of what it said is in the message.
    """
    context = multiprocessing.get_context("spawn")
    results = {name: Result() for name in contestants}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ends: dict[str, Connection] = {}
        for number, (name, (function, *arguments)) in enumerate(contestants.items()):
            ends[name], far_end = context.Pipe()
            settings = (turn, device, own_time)
            words = (far_end, settings, logs / str(number), function, arguments)
            process = context.Process(target=_compete, args=words, daemon=True)
            process.start()
            stack.callback(_stop, process)
            stack.callback(ends[name].close)  # first, so that who waits for the baton no longer does
            far_end.close()  # so that the end of the process is the end of the pipe

        def receive(name: str) -> Any:
            try:
                return ends[name].recv()
            except EOFError:
                log = (logs / str(list(contestants).index(name))).read_text(errors="replace")
                raise SystemExit(f"{name} failed:\n{log[-LOG_TAIL:]}") from None

        for name in contestants:
            receive(name)
        _pass_rounds(ends, receive, results, inspect)
    return results


def _pass_rounds(
    ends: dict[str, Connection],
    receive: Callable[[str], Any],
    results: dict[str, Result],
    inspect: Callable[[dict[str, Result]], None],
) -> None:
    racing, number = list(ends), 0
    while racing:
        first = number % len(racing)
        for name in racing[first:] + racing[:first]:
            ends[name].send(None)
            message = receive(name)
            if isinstance(message, Turn):
                results[name].turns.append(message)
            else:
                results[name].values = message
                racing.remove(name)
        if number == 0:
            inspect(results)
        number += 1


def _compete(
    connection: Connection,
    settings: tuple[int, str, bool],
    log: Path,
    function: Callable[..., dict[str, Any]],
    arguments: Sequence[Any],
) -> None:
    """Run a contestant in its process; what it and its libraries say goes to its log."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    connection.send(function(Baton(connection, *settings), *arguments))


def _stop(process: Any) -> None:
    """Wait for a process that has sent its result, and end one that another's failure left behind."""
    process.join(10)
    if process.is_alive():
        process.terminate()
        process.join()
