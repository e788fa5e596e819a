"""The settings that all strategies share: what is punished, what is banned, what is kept."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.generation import processors
from sat_lightning.generation.state import DecodingState

Processor = Callable[[Tensor, DecodingState], Tensor]


class SatSettings:
    """The settings that SAT's constructors take, each strategy in an order of its own."""

    invalid_slices: Sequence[Any]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_tgt_length: int
    end_tokens: Sequence[int] | None


@dataclass(eq=False, kw_only=True)
class LogitsRules(SatSettings):
    """Settings that a strategy takes by keyword, and their order: penalties, processors, temperature, bans, filters.

    Raises:
        ConfigError: if a value is out of its range.
    """

    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 is off."""
    typical_p: float = 0.0
    """Keep the most typical tokens of this probability together; 0 and 1 are off."""
    signed_repetition_penalty: float = 1.0
    """Hugging Face's `repetition_penalty`: the prompt counts too, and a negative logit is multiplied."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token was generated; the prompt does not count."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens that were generated."""
    bad_words: Sequence[Sequence[int]] = ()
    """Ids of each word, one or several, that is never completed."""
    min_new_tokens: int = 0
    """No row ends before it has generated this many tokens."""
    ban_prompt_ngrams: bool = False
    """Whether the n-grams of the prompt, too, may not be repeated (Hugging Face), or only generated ones (SAT)."""
    processors: Sequence[Processor] = ()
    """Functions `(logits, state) -> logits` of your own, applied in this order behind the penalties."""

    def __post_init__(self) -> None:
        """Check every value, and make the sequences tuples."""
        self.invalid_slices = tuple(self.invalid_slices)
        self.end_tokens = read_end_tokens(self.end_tokens)
        self.bad_words = tuple(tuple(word) for word in self.bad_words)
        self.processors = tuple(self.processors)
        if self.top_k == 0:
            self.top_k = 0  # SAT's beam search writes 0.0
        if not all(self.bad_words):
            raise ConfigError(f"bad_words must be lists of one id or more, not {list(map(list, self.bad_words))}.")
        for name in ("top_k", "no_repeat_ngram_size", "min_tgt_length", "min_new_tokens"):
            check_range(name, getattr(self, name), 0)
        for name in ("top_p", "min_p", "typical_p"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("repetition_penalty", "signed_repetition_penalty"):
            check_range(name, getattr(self, name), 0.0, is_open=True)
        for name in ("frequency_penalty", "presence_penalty"):
            check_range(name, getattr(self, name), -math.inf)
        check_range("temperature", self.temperature, 0.0)

    @property
    def looks_back(self) -> bool:
        """Whether what is punished or banned depends on the tokens written so far."""
        penalties = (self.repetition_penalty, self.signed_repetition_penalty) != (1, 1)
        counts = self.frequency_penalty or self.presence_penalty or self.no_repeat_ngram_size
        return bool(penalties or counts or self.bad_words or self.processors or self.least_length)

    @property
    def least_length(self) -> int:
        """The larger of `min_new_tokens` and `min_tgt_length`; 0 is none."""
        return max(self.min_new_tokens, self.min_tgt_length)

    def process(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Apply penalties, processors, temperature and bans to float logits `[b, v]`."""
        logits = self.punish(logits, state)
        for processor in self.processors:
            logits = processor(logits, state)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        return self.ban(logits, state)

    def punish(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Apply the penalties."""
        generated = state.tokens[:, state.prompt_length :]
        if self.repetition_penalty != 1:
            logits = processors.sat_repetition_penalty(logits, generated, self.repetition_penalty)
        if self.signed_repetition_penalty != 1:
            logits = processors.signed_repetition_penalty(logits, state.tokens, self.signed_repetition_penalty)
        if self.frequency_penalty or self.presence_penalty:
            logits = processors.count_penalty(logits, generated, self.frequency_penalty, self.presence_penalty)
        return logits

    def ban(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Apply the bans."""
        tokens = state.tokens[:, : state.length]
        if self.invalid_slices:
            if "invalid" not in state.extras:
                state.extras["invalid"] = _mask_invalid(self.invalid_slices, logits)
            logits = processors.ban_mask(logits, state.extras["invalid"])
        if self.bad_words:
            if "bad_words" not in state.extras:
                _check_words(self.bad_words, logits.shape[-1])
                state.extras["bad_words"] = processors.pack_words(self.bad_words, logits.device)
            logits = processors.ban_words(logits, tokens, *state.extras["bad_words"])
        if self.no_repeat_ngram_size:
            first = 0 if self.ban_prompt_ngrams else state.prompt_length
            logits = processors.ban_repeated_ngrams(logits, tokens, self.no_repeat_ngram_size, first)
        return self._ban_ends(logits, tokens, state)

    def _ban_ends(self, logits: Tensor, tokens: Tensor, state: DecodingState) -> Tensor:
        if state.end_tokens is None:
            return logits
        if state.num_generated < self.min_new_tokens:
            return logits.index_fill(-1, state.end_tokens, -math.inf)
        if state.num_generated < self.min_tgt_length - 1:
            is_short = (tokens >= 0).sum(1, keepdim=True) < self.min_tgt_length
            return logits.where(~is_short, logits.index_fill(-1, state.end_tokens, -math.inf))
        return logits

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keep only what may be drawn: top-k (of equal ones at its edge no more), top-p, min-p, typical.

        Args:
            logits: `[b, v]`.

        Returns:
            Logits `[b, k]`, -inf where not kept, and their ids in ascending order; None for the whole vocabulary.
        """
        places = None
        if 0 < self.top_k < logits.shape[-1]:
            places = logits.topk(self.top_k, sorted=False).indices.sort(dim=-1).values
            logits = logits.gather(-1, places)
        logits = processors.keep_min_p(processors.keep_top_p(logits, self.top_p), self.min_p)
        return processors.keep_typical(logits, self.typical_p), places

    def filter(self, logits: Tensor) -> Tensor:
        """Do as `candidates`, in place in the vocabulary: `[b, v]`, -inf where not kept."""
        kept, places = self.candidates(logits)
        return kept if places is None else torch.full_like(logits, -torch.inf).scatter(-1, places, kept)


def _mask_invalid(slices: Sequence[Any], logits: Tensor) -> Tensor:
    try:
        if any(isinstance(part, str) for part in slices):
            raise TypeError("a text is none")
        return processors.mask_of_slices(slices, logits)
    except (IndexError, TypeError) as error:
        raise ConfigError(
            f"invalid_slices is {list(slices)}, for a vocabulary of {logits.shape[-1]} tokens: {error}. Give ids, "
            "lists of ids, or slices."
        ) from error


def _check_words(words: Sequence[Sequence[int]], vocab_size: int) -> None:
    outside = sorted({token for word in words for token in word if not 0 <= token < vocab_size})
    if outside:
        raise ConfigError(f"bad_words holds the ids {outside}, outside the vocabulary of {vocab_size} tokens.")


def check_range(name: str, value: float, low: float, high: float = math.inf, *, is_open: bool = False) -> None:
    """Refuse a setting outside `[low, high]`, or outside `(low, high]` if `is_open`.

    Raises:
        ConfigError: naming the setting, its value and the range; a limit that is an int asks for an int.
    """
    is_number = isinstance(value, int if isinstance(low, int) else (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (low < value if is_open else low <= value) and value <= high:
        return
    kind = "an integer" if isinstance(low, int) else "a finite number"
    lower = "" if low == -math.inf else f" above {low}" if is_open else f" at least {low}"
    upper = "" if high == math.inf else f" and at most {high}"
    raise ConfigError(f"{name} must be {kind}{lower}{upper}, not {value!r}.")


def read_end_tokens(end_tokens: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return ids as a tuple: of None, of one id, or of any number of them.

    Raises:
        ConfigError: for what are no ids.
    """
    try:
        found = [] if end_tokens is None else end_tokens if isinstance(end_tokens, Iterable) else [end_tokens]
        return tuple(operator.index(token) for token in found)
    except TypeError as error:
        raise ConfigError(f"end_tokens must be ids, such as [2], not {end_tokens!r}.") from error


def check_end_tokens(state: DecodingState, end_tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse end tokens that the model can never generate.

    Raises:
        ConfigError: naming them and the vocabulary.
    """
    known = {*end_tokens, *state.end_ids}
    outside = sorted(token for token in known if not 0 <= token < vocab_size)
    if outside:
        raise ConfigError(f"end tokens {outside} are outside the vocabulary of {vocab_size} tokens: no row can end so.")
