"""Text of a row while its tokens come: whole characters only, and nothing of what a stop string cuts off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: Tokens of the text before that are decoded again with the first new one.
_NUM_BEFORE = 6


class RowText:
    """Turn one row's new tokens into text piece by piece.

    Args:
        tokenizer: has `decode(ids)`.
        stop_strings: the text ends before the first of them.
        before: ids of the text that is continued: many tokenizers leave out a space where a text begins, and keep it
            within one. Where a special token stands last, or nothing, a new text begins.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), before: Sequence[int] = ()) -> None:  # noqa: ANN401
        self.tokenizer, self.stop_strings = tokenizer, tuple(stop_strings)
        self.is_stopped = False
        self.num_tokens = 0
        """Tokens taken, the one that completed a stop string included."""
        self._tokens: list[int] = self._context(before)
        # How many tokens were decoded before, and the place from which they are decoded again.
        self._shown, self._read = len(self._tokens), 0
        self._held = ""

    def add(self, tokens: Iterable[int]) -> str:
        """Take tokens until a stop string is there; returns the text that is certain."""
        pieces = []
        for token in tokens:
            if self.is_stopped:
                break
            self._tokens.append(token)
            self.num_tokens += 1
            pieces.append(self._take(self._new_text(is_last=False)))
        return "".join(pieces)

    def close(self) -> str:
        """Return what was held back, when no token will come."""
        if self.is_stopped:
            return ""
        text, rest = self._take(self._new_text(is_last=True)), self._held
        self._held = ""
        return text if self.is_stopped else text + rest

    def _context(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens of the text before, as far as they are text."""
        size = getattr(self.tokenizer, "vocab_size", None)
        last = list(before[-_NUM_BEFORE:])
        if not last or (isinstance(size, int) and last[-1] >= size) or not str(self.tokenizer.decode(last[-1:])):
            return []
        known = [token for token in last if not isinstance(size, int) or token < size]
        return [] if str(self.tokenizer.decode(known)).endswith("\N{REPLACEMENT CHARACTER}") else known

    def _new_text(self, *, is_last: bool) -> str:
        """Decode what came since; a token's text may depend on those before it, and a character may need several."""
        before = str(self.tokenizer.decode(self._tokens[self._read : self._shown]))
        now = str(self.tokenizer.decode(self._tokens[self._read :]))
        if not is_last and (now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before)):
            return ""
        self._read, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _take(self, text: str) -> str:
        """Pass text on, but for what may be the beginning of a stop string."""
        self._held += text
        found = [place for place in map(self._held.find, self.stop_strings) if place >= 0]
        if found:
            self.is_stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self.stop_strings), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Count how many of the last characters of a text may be the first of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
