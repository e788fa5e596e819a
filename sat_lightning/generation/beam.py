"""Beam search, batched over prompts, without a draw and without a look at the device.

Legend: p prompts, m beams of each, b = p * m rows, n columns of tokens, k candidates, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.generation.beam_scoring import BeamScoring, SatBeamScoring
from sat_lightning.generation.rules import LogitsRules, check_end_tokens, check_range
from sat_lightning.generation.state import NO_TOKEN, DecodingState, Hypothesis


@dataclass(eq=False)
class Beams:
    """What a search keeps in `state.extras["beams"]`."""

    scores: Tensor
    """`[p, m]` sums of log-probabilities of the running beams, best first; -inf where there is none."""
    may_finish: Tensor
    """`[p, m]` bool: running beams that count if the room ends here."""
    finished_tokens: Tensor
    """`[p, m, n]`, -1 where there is no token."""
    finished_scores: Tensor
    """`[p, m]` normalised, best first; -inf where there is none."""
    num_unchanged: Tensor
    """`[p]` steps since the best finished beam changed; 0 while there is none."""
    is_over: Tensor
    """`[p]` bool."""

    def add_finished(self, tokens: Tensor, scores: Tensor) -> None:
        """Put beams `[p, k, n]` with normalised scores `[p, k]` (-inf: not this one) among the finished ones.

        Of equal scores the one added last is first, as in SAT.
        """
        best_before = self.finished_scores[:, 0]
        all_scores, order = torch.cat([scores.flip(1), self.finished_scores], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        order = order[:, : self.finished_scores.shape[1], None].expand(-1, -1, tokens.shape[2])
        self.finished_tokens = torch.cat([tokens.flip(1), self.finished_tokens], dim=1).gather(1, order)
        self.finished_scores = all_scores[:, : self.finished_scores.shape[1]]
        best_added = scores.amax(1)
        is_new = (best_added >= best_before) & (best_added > -torch.inf)
        has_finished = self.finished_scores[:, 0] > -torch.inf
        self.num_unchanged = torch.where(is_new, 0, self.num_unchanged + has_finished.long())


@dataclass(eq=False)
class BeamSearchStrategy(LogitsRules):
    """The most likely texts, found by keeping the `num_beams` best beginnings; the positional arguments are SAT's.

    `start` takes a state with a row for each prompt and makes `num_beams` rows of each. After it, and after each step,
    `state.extras["beam_indices"]` says from which row each row comes. SAT draws its candidates by chance; here they are
    the best. More settings, by keyword, are those of `LogitsRules`; penalties and filters count in the scores.

    Raises:
        ConfigError: if a value is out of its range.
    """

    num_beams: int
    """m: beams kept, and results given."""
    length_penalty: float = 1.0
    """Exponent of the length that the score of a finished beam is divided by; see `SatBeamScoring`."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Only this many most likely tokens go on from each beam; 0 is all."""
    top_p: float = 0.0
    """Only the fewest tokens that have this probability together go on from each beam; 0 and 1 are off."""
    consider_end: bool = True
    """Whether the results are the best finished beams; otherwise the running ones, none of which has an end token."""
    end_tokens: Sequence[int] | None = ()
    """Ids that end a beam."""
    invalid_slices: Sequence[Any] = ()
    """Slices (or ids) of the vocabulary that are never generated."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size is generated twice in a beam; 0 is off. See `ban_prompt_ngrams`."""
    min_tgt_length: int = 0
    """No beam ends before it has this many tokens, its prompt included."""
    repetition_penalty: float = 1.0
    """SAT's: divides the logits of tokens generated so far, whatever their sign."""
    prefer_min_length: int = 5
    """See `SatBeamScoring`."""
    prefer_max_length: int = 100
    """See `SatBeamScoring`."""
    stop_n_iter_unchanged: int = 10
    """See `SatBeamScoring`."""
    _: KW_ONLY
    scoring: BeamScoring | None = None
    """How finished beams are ranked and when the search is over. Default: SAT's, made of the settings above;
    `PlainBeamScoring(length_penalty, early_stopping)` is Hugging Face's."""

    def __post_init__(self) -> None:
        """Check every value."""
        super().__post_init__()
        for name, least in (("num_beams", 1), ("stop_n_iter_unchanged", 1), ("prefer_min_length", 0)):
            check_range(name, getattr(self, name), least)
        check_range("prefer_max_length", self.prefer_max_length, 1)
        check_range("length_penalty", self.length_penalty, -float("inf"))
        check_range("temperature", self.temperature, 0.0, is_open=True)
        self.scoring = self.scoring or SatBeamScoring(
            self.length_penalty, self.prefer_min_length, self.prefer_max_length, self.stop_n_iter_unchanged
        )

    def start(self, state: DecodingState) -> DecodingState:
        """Make `num_beams` rows of each row; the first of them leads, so that no beam begins as another's copy."""
        num_prompts, device = len(state.tokens), state.tokens.device
        state.extras["beam_indices"] = state.repeat_rows(self.num_beams)
        state.add_end_tokens(self.end_tokens or ())
        shape = (num_prompts, self.num_beams)
        scores = torch.full(shape, -torch.inf, device=device)
        scores[:, 0] = 0
        state.extras["beams"] = Beams(
            scores=scores,
            may_finish=torch.ones(shape, dtype=torch.bool, device=device),
            finished_tokens=state.tokens.new_full((*shape, state.capacity), NO_TOKEN),
            finished_scores=torch.full(shape, -torch.inf, device=device),
            num_unchanged=torch.zeros(num_prompts, dtype=torch.int64, device=device),
            is_over=torch.zeros(num_prompts, dtype=torch.bool, device=device),
        )
        return state

    def choose(self, scores: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
        """Take the best of `[p, m * v]` scores: values and places `[p, k]`, best first."""
        return scores.topk(num_candidates)

    def step(self, logits: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
        """Move every beam one token on.

        Args:
            logits: `[b, v]` of each beam's newest token, raw, of any float dtype.
            state: that `start` made; its rows are put in the order of the new beams.

        Returns:
            Ids `[b]`, and the state, with `beam_indices` in its extras.
        """
        if "beams" not in state.extras:
            raise ConfigError("beam search needs rows of its own: call strategy.start(state) before the first step.")
        if state.num_generated == 0:
            self._check_vocabulary(state, logits.shape[-1])
        beams: Beams = state.extras["beams"]
        scores, parents, next_tokens = self._candidates(logits, state)
        is_end = torch.zeros_like(parents, dtype=torch.bool)
        if state.end_tokens is not None:
            is_end = torch.isin(next_tokens, state.end_tokens)
        is_good = self._rules.may_finish(is_end, self.num_beams) & ~beams.is_over[:, None]
        self._finish(scores.masked_fill(~(is_end & is_good), -torch.inf), parents, next_tokens, state)
        # Those that go on, best first, then, where they are too few, ended ones that no longer count.
        order = is_end.long().argsort(dim=1, stable=True)[:, : self.num_beams]
        beams.scores = scores.masked_fill(is_end, -torch.inf).gather(1, order)
        beams.may_finish = is_good.gather(1, order)
        self._move_rows(parents.gather(1, order), state)
        num_generated, room = state.num_generated + 1, state.capacity - state.prompt_length
        beams.is_over = beams.is_over | self._rules.is_over(
            beams.finished_scores, beams.scores[:, 0], beams.num_unchanged, num_generated, room
        )
        beams.is_over = beams.is_over | (beams.scores[:, 0] == -torch.inf)
        state.is_done = beams.is_over.repeat_interleave(self.num_beams)
        return next_tokens.gather(1, order).flatten(), state

    @property
    def _rules(self) -> BeamScoring:
        assert self.scoring is not None  # __post_init__ made it
        return self.scoring

    def _check_vocabulary(self, state: DecodingState, vocab_size: int) -> None:
        check_end_tokens(state, self.end_tokens or (), vocab_size)
        if self.num_beams > vocab_size:
            raise ConfigError(
                f"num_beams={self.num_beams} is above the vocabulary of {vocab_size} tokens: "
                f"one prompt has only {vocab_size} different beginnings. Take at most {vocab_size} beams."
            )

    def _candidates(self, logits: Tensor, state: DecodingState) -> tuple[Tensor, Tensor, Tensor]:
        """Score the best ways to go on: sums of log-probabilities, beams they come from and tokens, each `[p, k]`."""
        beams: Beams = state.extras["beams"]
        vocab_size, num_ends = logits.shape[-1], 0 if state.end_tokens is None else len(state.end_tokens)
        logits = self.filter(self.process(logits.float(), state))
        # A beam that may go nowhere has no logarithm of a distribution; it must not take the others with it.
        log_probs = logits.log_softmax(-1).masked_fill(logits == -torch.inf, -torch.inf)
        scores = (beams.scores.flatten()[:, None] + log_probs).view(-1, self.num_beams * vocab_size)
        num_candidates = min((max(1, num_ends) + 1) * self.num_beams, scores.shape[1])
        values, places = self.choose(scores, num_candidates)
        has_text = beams.is_over | (beams.finished_scores[:, 0] > -torch.inf)
        state.note_best(values[:, 0].masked_fill(has_text, 0).repeat_interleave(self.num_beams))
        return values, places // vocab_size, places % vocab_size

    def _finish(self, scores: Tensor, parents: Tensor, next_tokens: Tensor, state: DecodingState) -> None:
        """Add the candidates that end: `scores` are -inf for all others."""
        if state.end_tokens is None:
            return
        rows = state.tokens.view(len(parents), self.num_beams, -1)
        tokens = rows.gather(1, parents[..., None].expand(-1, -1, rows.shape[2]))
        tokens[:, :, state.length] = next_tokens
        state.extras["beams"].add_finished(tokens, scores / self._rules.divisor(state.num_generated + 1))

    def _move_rows(self, parents: Tensor, state: DecodingState) -> None:
        first = torch.arange(len(parents), device=parents.device)[:, None] * self.num_beams
        indices = (first + parents).flatten()
        state.tokens.copy_(state.tokens[indices])
        state.extras["beam_indices"] = indices

    def finalize(self, state: DecodingState) -> list[list[Hypothesis]]:
        """Take the results: for each prompt at most `num_beams` texts with their normalised scores, best first.

        Running beams of a prompt whose search is not over count as if they ended here.
        """
        beams: Beams = state.extras["beams"]
        running_scores = beams.scores / self._rules.divisor(state.num_generated)
        running = state.tokens.view(len(beams.scores), self.num_beams, -1).clone()
        running[:, :, state.length :] = NO_TOKEN
        if self.consider_end:
            counts = beams.may_finish & ~beams.is_over[:, None]
            beams.add_finished(running, running_scores.masked_fill(~counts, -torch.inf))
            running, running_scores = beams.finished_tokens, beams.finished_scores
        return [
            [
                Hypothesis(row[row != NO_TOKEN], score)
                for row, score in zip(rows, scores, strict=True)
                if score > -torch.inf
            ]
            for rows, scores in zip(running, running_scores.tolist(), strict=True)
        ]
