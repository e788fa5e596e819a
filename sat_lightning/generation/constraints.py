"""What a text must look like: a hook of yours, a regular expression, or a JSON schema.

Each is a processor: `BaseStrategy(processors=[...])`, `BeamSearchStrategy(..., processors=[...])`. What is allowed
depends on what was written, so these, and no other processor, ask the device at each step.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.processors import ban_mask
from sat_lightning.generation.rules import LogitsRules
from sat_lightning.generation.state import NO_TOKEN, DecodingState


@dataclass(frozen=True, eq=False)
class AllowedTokens:
    """Let a function say, row by row, which tokens may come next."""

    allowed_tokens: Callable[[list[int]], Sequence[int] | None]
    """Takes the ids of a row, prompt and all, and gives those that may follow; None is all."""

    def __call__(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Ban what is not allowed in rows that are not done.

        Raises:
            InputError: if an id is outside the vocabulary.
        """
        rows = state.tokens[:, : state.length].tolist()
        is_banned = torch.zeros(logits.shape, dtype=torch.bool)
        for i, (row, is_done) in enumerate(zip(rows, state.is_done.tolist(), strict=True)):
            allowed = None if is_done else self.allowed_tokens([token for token in row if token != NO_TOKEN])
            if allowed is None:
                continue
            ids = torch.as_tensor(list(allowed), dtype=torch.int64)
            outside = ids[(ids < 0) | (ids >= logits.shape[1])]
            if len(outside):
                raise InputError(
                    f"allowed_tokens gave ids {outside.tolist()[:8]} for row {i}; the vocabulary has "
                    f"{logits.shape[1]} tokens."
                )
            is_banned[i] = True
            is_banned[i, ids] = False
        return ban_mask(logits, is_banned.to(logits.device))


def allow_only(strategy: Any, allowed_tokens: Callable[[list[int]], Sequence[int] | None]) -> Any:  # noqa: ANN401
    """Return a copy of a strategy that keeps to `AllowedTokens`, behind its own processors.

    Raises:
        ConfigError: if it takes no processors.
    """
    if not isinstance(strategy, LogitsRules):
        raise ConfigError(
            f"allowed_tokens needs a BaseStrategy or a BeamSearchStrategy, not a {type(strategy).__name__}."
        )
    strategy = copy.copy(strategy)
    strategy.processors = (*strategy.processors, AllowedTokens(allowed_tokens))
    return strategy


class Grammar:
    """Let only such text be written as a grammar describes; then only an end token may follow.

    The prompt does not count. The tokenizer gives the bytes of its tokens: it has `to_json()` (the format of the
    `tokenizers` library), `token_bytes()` (a list, b"" for special tokens), or is one of Hugging Face's fast ones.

    Args:
        grammar: in the format of the llguidance library; `json_schema` and `regex` make one.
        tokenizer: of the model.

    Raises:
        ConfigError: if the library is missing, or the grammar or the tokenizer cannot be understood.
    """

    def __init__(self, grammar: str, tokenizer: Any) -> None:  # noqa: ANN401
        self.grammar, self.tokenizer = grammar, tokenizer
        self._library = _import_llguidance()
        if complaint := self._library.LLMatcher.validate_grammar(grammar):
            raise ConfigError(f"the grammar cannot be understood: {complaint.strip()}")
        self._vocabularies: dict[int, Any] = {}

    def __call__(self, logits: Tensor, state: DecodingState) -> Tensor:
        """Ban what the grammar does not allow next in rows that are not done.

        Raises:
            ConfigError: if nothing can end a row.
        """
        if not state.end_ids:
            raise ConfigError("a grammar needs an end token, or a row could not stop where the text is whole.")
        ends = list(state.end_ids)
        rows = [tuple(row) for row in state.tokens[:, state.prompt_length : state.length].tolist()]
        rows = [() if is_done else row for row, is_done in zip(rows, state.is_done.tolist(), strict=True)]
        matchers = self._advance(rows, state.extras.get(f"grammar {id(self)}", {}), ends[0])
        state.extras[f"grammar {id(self)}"] = matchers
        masks = {row: self._mask(matcher, ends, logits.shape[1]) for row, matcher in matchers.items()}
        allowed = torch.from_numpy(np.stack([masks[row] for row in rows]))
        is_done = state.is_done[:, None]
        return ban_mask(logits, ~(allowed.to(logits.device) | is_done))

    def _advance(self, rows: Sequence[tuple[int, ...]], before: dict[Any, Any], end: int) -> dict[Any, Any]:
        """Find the matcher of each row: that of the row without its newest token, one token on."""
        matchers: dict[Any, Any] = {}
        num_children = Counter(row[:-1] for row in set(rows))
        for row in set(rows):
            parent = before.get(row[:-1]) if row else None
            if parent is None:
                matcher, missing = self._library.LLMatcher(self._vocabulary(end), self.grammar), row
            else:
                matcher = parent if num_children[row[:-1]] == 1 and row[:-1] not in rows else parent.deep_copy()
                missing = row[-1:]
            for token in missing:  # one by one: what a token that does not fit leaves behind is an error, and no mask
                matcher.consume_token(token)
            matchers[row] = matcher
        return matchers

    def _vocabulary(self, end: int) -> Any:  # noqa: ANN401
        if end not in self._vocabularies:
            self._vocabularies[end] = _read_vocabulary(self._library, self.tokenizer, end)
        return self._vocabularies[end]

    @staticmethod
    def _mask(matcher: Any, ends: list[int], vocab_size: int) -> np.ndarray:  # noqa: ANN401
        mask = np.zeros(vocab_size, dtype=bool)
        if not matcher.is_error():
            allowed = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)[:vocab_size] > 0
            mask[: len(allowed)] = allowed
            mask[ends] = mask[ends[0]]
        return mask


def json_schema(schema: Mapping[str, Any] | str, tokenizer: Any, *, has_free_whitespace: bool = True) -> Grammar:  # noqa: ANN401
    """Let only JSON that a schema allows be written.

    Args:
        schema: a dict, or its text.
        tokenizer: see `Grammar`.
        has_free_whitespace: whether spaces and lines may stand where JSON allows them, or none at all.

    Raises:
        ConfigError: see `Grammar`.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    overrides = {"whitespace_flexible": has_free_whitespace}
    try:
        grammar = _import_llguidance().LLMatcher.grammar_from_json_schema(text, overrides=overrides)
    except ValueError as error:
        raise ConfigError(f"the JSON schema cannot be understood: {error}") from error
    return Grammar(grammar, tokenizer)


def regex(pattern: str, tokenizer: Any) -> Grammar:  # noqa: ANN401
    """Let only text be written that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's `regex`: no look-around, no back-references.
        tokenizer: see `Grammar`.

    Raises:
        ConfigError: see `Grammar`.
    """
    return Grammar(_import_llguidance().LLMatcher.grammar_from_regex(pattern), tokenizer)


def _import_llguidance() -> Any:  # noqa: ANN401 - the library is optional
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ConfigError(
            "constraints by a grammar need the llguidance library, which is not installed. Run: "
            'pip install "sat_lightning[constraints]"'
        ) from error


class _TokenBytes:
    """A tokenizer as the library wants it.

    Text that the grammar forces is cut into the longest tokens: it begins in the middle of a text, where the tokenizer
    itself might add a space.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Any, end: int) -> None:  # noqa: ANN401
        pieces = list(tokenizer.token_bytes())
        self.tokens = [piece or b"<special %d>" % i for i, piece in enumerate(pieces)]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.eos_token_id = end
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        rest, ids = text.encode() if isinstance(text, str) else text, []
        while rest:
            sizes = range(min(self._longest, len(rest)), 0, -1)
            size = next((size for size in sizes if rest[:size] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[rest[:size]])
            rest = rest[size:]
        return ids


def _read_vocabulary(library: Any, tokenizer: Any, end: int) -> Any:  # noqa: ANN401
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    to_json = getattr(tokenizer, "to_json", None) or getattr(inner, "to_str", None)
    try:
        if to_json is not None:
            return library.LLTokenizer(to_json(), eos_token=end)
        if hasattr(tokenizer, "token_bytes"):
            return library.LLTokenizer(library.TokenizerWrapper(_TokenBytes(tokenizer, end)), eos_token=end)
    except ValueError as error:
        raise ConfigError(f"{type(tokenizer).__name__} with end token {end} does not fit a grammar: {error}") from error
    raise ConfigError(
        f"{type(tokenizer).__name__} does not say what bytes its tokens are: give it to_json() or token_bytes()."
    )
