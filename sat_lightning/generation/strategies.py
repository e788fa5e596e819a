"""How the next token is chosen: settings and pure functions of logits and a state; nothing is kept in a strategy.

A strategy of your own is any object with `end_tokens`, `start`, `step` and `finalize` as below; subclass `BaseStrategy`
and override `step` or `process`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.generation import processors
from sat_lightning.generation.sampling import draw_token
from sat_lightning.generation.state import DecodingState, Hypothesis, read_rows

Processor = Callable[[Tensor, DecodingState], Tensor]


@dataclass(eq=False)
class BaseStrategy:
    """Sampling with temperature, top-k and top-p, or greedy; the positional arguments are SAT's.

    Raises:
        ConfigError: if a value is out of its range.
    """

    invalid_slices: Sequence[Any] = ()
    """Slices (or ids) of the vocabulary that are never generated."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 200
    """Draw among this many most likely tokens; 1 is greedy, 0 is all."""
    eps: float = 1e-4
    """SAT has it and does not use it; nor do we."""
    top_p: float = 0.0
    """Draw among the fewest tokens that have this probability together; 0 and 1 are off."""
    repetition_penalty: float = 1.0
    """SAT's: divides the logits of tokens generated so far, whatever their sign; the prompt does not count."""
    end_tokens: Sequence[int] | None = None
    """Ids that end a row."""

    def __post_init__(self) -> None:
        """Check every value, and make the sequences tuples."""
        self.invalid_slices = tuple(self.invalid_slices)
        self.end_tokens = tuple(int(token) for token in self.end_tokens or ())
        check_range("temperature", self.temperature, 0.0)
        check_range("top_k", self.top_k, 0)
        check_range("top_p", self.top_p, 0.0, 1.0)
        check_range("repetition_penalty", self.repetition_penalty, 0.0, is_open=True)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1

    def start(self, state: DecodingState) -> DecodingState:
        """Prepare a state before the first step."""
        state.add_end_tokens(self.end_tokens or ())
        if not self.is_greedy:
            state.draw_uniforms()
        return state

    def process(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Apply penalties, bans and temperature to float logits `[b, v]`: all but the choice of candidates."""
        if self.repetition_penalty != 1:
            generated = state.tokens[:, state.prompt_length :]
            logits = processors.sat_repetition_penalty(logits, generated, self.repetition_penalty)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        if self.invalid_slices:
            logits = processors.ban_slices(logits, self.invalid_slices)
        return logits

    def step(self, logits: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
        """Choose the next token of each row.

        Args:
            logits: `[b, v]` of each row's newest token, raw, of any float dtype.
            state: where the generation stands; only its notes and `extras` change.

        Returns:
            Ids `[b]`, and the state.
        """
        if state.num_generated == 0:
            check_end_tokens(state, self.end_tokens or (), logits.shape[-1])
        logits = self.process(logits.float(), state)
        best, next_tokens = logits.max(-1)
        state.note_best(best)
        if not self.is_greedy:
            logits = processors.keep_top_p(processors.keep_top_k(logits, self.top_k), self.top_p)
            if state.uniforms is None:
                raise ConfigError(
                    "this strategy draws, and the state has no uniforms: call strategy.start(state) first."
                )
            next_tokens = draw_token(logits, state.uniforms[:, state.num_generated])
        return next_tokens, state

    def finalize(self, state: DecodingState) -> list[list[Hypothesis]]:
        """Take the results: for each row a list of one text."""
        return [[Hypothesis(row)] for row in read_rows(state)]


def greedy(**settings: Any) -> BaseStrategy:
    """Make the strategy that takes the most likely token; `settings` are those of `BaseStrategy`."""
    return BaseStrategy(**{"top_k": 1, **settings})


def check_range(name: str, value: float, low: float, high: float = math.inf, *, is_open: bool = False) -> None:
    """Refuse a setting outside `[low, high]`, or outside `(low, high]` if `is_open`.

    Raises:
        ConfigError: naming the setting, its value and the range; a limit that is an int asks for an int.
    """
    is_number = isinstance(value, int if isinstance(low, int) else (int, float)) and not isinstance(value, bool)
    if is_number and (low < value if is_open else low <= value) and value <= high:
        return
    kind = "an integer" if isinstance(low, int) else "a number"
    lower = f"above {low}" if is_open else f"at least {low}"
    upper = "" if high == math.inf else f" and at most {high}"
    raise ConfigError(f"{name} must be {kind} {lower}{upper}, not {value!r}.")


def check_end_tokens(state: DecodingState, end_tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse end tokens that the model can never generate.

    Raises:
        ConfigError: naming them and the vocabulary.
    """
    known = end_tokens if state.end_tokens is None else state.end_tokens.tolist()
    outside = [token for token in known if not 0 <= token < vocab_size]
    if outside:
        raise ConfigError(
            f"end tokens {outside} are outside the vocabulary of {vocab_size} tokens: no row can end by them."
        )
