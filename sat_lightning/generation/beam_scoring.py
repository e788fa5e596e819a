"""How finished beams are ranked, and when a beam search is over: SAT's rules, and Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError


class BeamScoring(Protocol):
    """What a `BeamSearchStrategy` asks of its rules. Legend: p prompts, k candidates, m beams."""

    def divisor(self, num_generated: int) -> float:
        """Say by what the sum of log-probabilities of so many generated tokens is divided."""

    def may_finish(self, is_end: Tensor, num_beams: int) -> Tensor:
        """Say which candidates, best first and `[p, k]`, are good enough to be finished beams if they end."""

    def is_over(
        self, finished: Tensor, best_running: Tensor, num_unchanged: Tensor, num_generated: int, capacity: int
    ) -> Tensor:
        """Say of which prompts nothing better is to be expected.

        Args:
            finished: `[p, m]` scores of finished beams, best first, -inf where there is none.
            best_running: `[p]` sum of log-probabilities of the best running beam.
            num_unchanged: `[p]` steps since the best finished beam changed.
            num_generated: tokens generated so far.
            capacity: tokens that may be generated at most.

        Returns:
            `[p]` bool.
        """


@dataclass(frozen=True)
class SatBeamScoring:
    """SAT's: a finished beam has `sum / (min(longest, length) + 1) ** penalty`; length counts what is generated.

    Below `prefer_min_length` the penalty is drawn towards half of it (at most 0.5), so that short beams are worth less.
    The search is over when the best finished beam has stood for `stop_n_iter_unchanged` steps.
    """

    length_penalty: float = 1.0
    """The exponent; above 0 it favours long texts."""
    prefer_min_length: int = 5
    """Shorter texts get a smaller exponent."""
    prefer_max_length: int = 100
    """Longer texts are divided as this length is."""
    stop_n_iter_unchanged: int = 10
    """Steps without a new best."""

    def divisor(self, num_generated: int) -> float:
        """See `BeamScoring`."""
        exponent = self.length_penalty
        if num_generated < self.prefer_min_length:
            share = num_generated / self.prefer_min_length
            exponent = share * exponent + (1 - share) * min(0.5, exponent / 2)
        return float((min(self.prefer_max_length, num_generated) + 1) ** exponent)

    def may_finish(self, is_end: Tensor, num_beams: int) -> Tensor:
        """Let those finish that at most `num_beams` candidates which go on are before."""
        goes_on = (~is_end).long()
        return goes_on.cumsum(1) - goes_on <= num_beams

    def is_over(
        self, finished: Tensor, best_running: Tensor, num_unchanged: Tensor, num_generated: int, capacity: int
    ) -> Tensor:
        """See `BeamScoring`."""
        return num_unchanged >= self.stop_n_iter_unchanged


@dataclass(frozen=True)
class PlainBeamScoring:
    """Hugging Face's: a finished beam has `sum / length ** penalty`; only the best `num_beams` candidates may finish.

    Raises:
        ConfigError: if `early_stopping` is none of its values.
    """

    length_penalty: float = 1.0
    """The exponent; above 0 it favours long texts."""
    early_stopping: bool | Literal["never"] = False
    """True: over when `num_beams` have finished. False: when the best running beam, at its length, is worse than all of
    them. "never": when it would be at whatever length is best for it, so that nothing better is ever missed."""

    def __post_init__(self) -> None:
        """Refuse an unknown rule."""
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}.")

    def divisor(self, num_generated: int) -> float:
        """See `BeamScoring`."""
        return float(max(num_generated, 1) ** self.length_penalty)

    def may_finish(self, is_end: Tensor, num_beams: int) -> Tensor:
        """Let the best `num_beams` candidates finish."""
        return torch.arange(is_end.shape[1], device=is_end.device).expand_as(is_end) < num_beams

    def is_over(
        self, finished: Tensor, best_running: Tensor, num_unchanged: Tensor, num_generated: int, capacity: int
    ) -> Tensor:
        """See `BeamScoring`."""
        worst = finished[:, -1]
        if self.early_stopping is True:
            return worst > -torch.inf
        hopes_for_length = self.early_stopping == "never" and self.length_penalty > 0
        return best_running / self.divisor(capacity if hopes_for_length else num_generated) <= worst
