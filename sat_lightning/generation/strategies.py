"""How the next token is chosen: settings and pure functions of logits and a state; nothing is kept in a strategy.

A strategy of your own is any object with `end_tokens`, `start`, `step` and `finalize` as below; subclass `BaseStrategy`
and override `step` or `process`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.generation.rules import LogitsRules, check_end_tokens
from sat_lightning.generation.sampling import draw_token
from sat_lightning.generation.sat_contract import SatContract
from sat_lightning.generation.state import DecodingState, Hypothesis, read_rows


@dataclass(eq=False)
class BaseStrategy(SatContract, LogitsRules):
    """Sampling with temperature, top-k and top-p, or greedy; the positional arguments are SAT's.

    More settings, by keyword, are those of `LogitsRules`.

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

    _: KW_ONLY
    no_repeat_ngram_size: int = 0
    """No n-gram of this size is generated twice in a row of the batch; 0 is off. See `ban_prompt_ngrams`."""
    min_tgt_length: int = 0
    """No row ends before it has this many tokens, its prompt included."""

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
        if self.is_greedy:
            best, next_tokens = logits.max(-1)
        else:
            best, next_tokens = logits.amax(-1), self.draw(logits, state)
        state.note_best(best)
        return next_tokens, state

    def draw(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Draw a token of each row from processed logits `[b, v]`; returns ids `[b]`.

        Raises:
            ConfigError: if `start` did not prepare the state.
        """
        if state.uniforms is None:
            raise ConfigError("this strategy draws, and the state has no uniforms: call strategy.start(state) first.")
        kept, ids = self.candidates(logits)
        place = draw_token(kept, state.uniforms[:, state.num_generated])
        return place if ids is None else ids.gather(1, place[:, None])[:, 0]

    def finalize(self, state: Any, mems: Any = None) -> Any:  # noqa: ANN401
        """Take the results of a state: for each row a list of one text; `finalize(tokens, mems)` is SAT's."""
        if isinstance(state, Tensor):
            self.forget()
            return state, mems
        results: list[list[Hypothesis]] = [[Hypothesis(row)] for row in read_rows(state)]
        return results


def greedy(**settings: Any) -> BaseStrategy:
    """Make the strategy that takes the most likely token; `settings` are those of `BaseStrategy`."""
    return BaseStrategy(**{"top_k": 1, **settings})
