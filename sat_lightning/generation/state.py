"""Where a generation stands: the tokens so far, which rows are done, and the chance each row draws from.

Legend: b rows, s columns of the prompts, n columns in all (prompts and room for what is generated), v vocabulary.

A state belongs to one call. The caller of a strategy drives it:

    state = strategy.start(DecodingState.create(prompts, max_new_tokens, seed=0, end_tokens=(2,)))
    reorder_cache(state.extras.get("beam_indices"))     # None: the rows are as they were
    while state.length < state.capacity:
        next_tokens, state = strategy.step(logits, state)   # logits [b, v] of the newest token of each row
        state.append(next_tokens)
        reorder_cache(state.extras.get("beam_indices"))
        if state.all_done():                             # the one look at the device; every n tokens if wished
            break
        logits = model(next_tokens...)
    results = strategy.finalize(state)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError

#: What stands in a place of `DecodingState.tokens` that holds no token.
NO_TOKEN: Final = -1


@dataclass(eq=False)
class DecodingState:
    """The state of one call; a strategy keeps what it needs between steps in `extras`, never in itself."""

    tokens: Tensor
    """`[b, n]` int64: prompts aligned to the right of their s columns, -1 before them; then what is generated, -1 where
    nothing is yet and behind a row's end."""
    prompt_length: int
    """s: generated tokens begin at this column in every row."""
    length: int
    """Columns filled so far; a number of the host, so that nobody has to ask the device."""
    is_done: Tensor
    """`[b]` bool: rows that have ended."""
    uniforms: Tensor | None = None
    """`[b, n - s]` float64 in [0, 1): one number for each row and step, made by `draw_uniforms`."""
    extras: dict[str, Any] = field(default_factory=dict)
    """What a strategy keeps for itself. `beam_indices` `[b]`, if it is there and not None, says from which row each
    row of the newest step comes: the caller reorders its cache by it."""
    end_tokens: Tensor | None = None
    """`[number]` ids on the device that end a row, or None."""
    end_ids: tuple[int, ...] = ()
    """The same, where the host can read them."""
    seed: int | None = None
    """Of `uniforms`; None takes one from torch's global generator."""
    row_ids: tuple[int, ...] = ()
    """A number for each row that its chance depends on, beside the seed: the place of its prompt among all prompts."""
    noted: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    """Since `all_done` was last asked: each step, its best logits `[b]`, and which rows `[b]` had ended before."""

    @classmethod
    def create(
        cls,
        prompts: Tensor,
        max_new_tokens: int,
        *,
        seed: int | None = None,
        row_ids: Sequence[int] | None = None,
        end_tokens: Sequence[int] = (),
    ) -> DecodingState:
        """Make the state that a generation begins with.

        Args:
            prompts: `[b, s]` ids, shorter ones with -1 on the left.
            max_new_tokens: how many columns to leave for what is generated.
            seed: of the draws. Default: one from torch's global generator, if the strategy draws.
            row_ids: see the field. Default: 0, 1, 2...
            end_tokens: ids that end a row, beside those of the strategy.

        Raises:
            InputError: if the prompts are no `[b, s]` or a row ends without a token.
            ConfigError: if `max_new_tokens` or the seed is negative.
        """
        if prompts.dim() != 2 or prompts.numel() == 0:
            raise InputError(f"prompts must be ids [b, s] of at least one token each, not {list(prompts.shape)}.")
        for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed or 0)):
            if value < 0:
                raise ConfigError(f"{name} must be at least 0, not {value}.")
        num_rows, prompt_length = prompts.shape
        room = prompts.new_full((num_rows, max_new_tokens), NO_TOKEN, dtype=torch.int64)
        state = cls(
            tokens=torch.cat([prompts.long(), room], dim=1),
            prompt_length=prompt_length,
            length=prompt_length,
            is_done=torch.zeros(num_rows, dtype=torch.bool, device=prompts.device),
            seed=seed,
            row_ids=tuple(range(num_rows)) if row_ids is None else tuple(row_ids),
        )
        state.add_end_tokens(end_tokens)
        return state

    @property
    def capacity(self) -> int:
        """n, the columns there are."""
        return self.tokens.shape[1]

    @property
    def num_generated(self) -> int:
        """Columns filled behind the prompts, which is also the number of the present step."""
        return self.length - self.prompt_length

    def add_end_tokens(self, end_tokens: Sequence[int]) -> None:
        """Let these ids, too, end a row."""
        self.end_ids = tuple(sorted({*self.end_ids, *map(int, end_tokens)}))
        self.end_tokens = torch.tensor(self.end_ids, device=self.tokens.device) if self.end_ids else None

    def draw_uniforms(self) -> None:
        """Make `uniforms` if there are none: those of a row depend on the seed and its row id, on nothing else."""
        if self.uniforms is not None:
            return
        if self.seed is None:
            self.seed = int(torch.randint(2**62, (), device="cpu").item())
        self.uniforms = self.more_uniforms(self.capacity - self.prompt_length)

    def more_uniforms(self, num_steps: int, *, stream: int = 0) -> Tensor:
        """Make numbers `[b, num_steps]` that depend on the seed, the row id and `stream`; 0 is that of `uniforms`."""
        rows = [np.random.default_rng((self.seed or 0, row, stream)).random(num_steps) for row in self.row_ids]
        return torch.from_numpy(np.stack(rows)).to(self.tokens.device)

    def repeat_rows(self, num_copies: int) -> Tensor:
        """Put `num_copies` of each row where the row was; returns from which row each comes, `[b * num_copies]`."""
        indices = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(num_copies)
        self.tokens, self.is_done = self.tokens[indices], self.is_done[indices]
        self.noted = [(step, best[indices], is_done[indices]) for step, best, is_done in self.noted]
        self.uniforms = None if self.uniforms is None else self.uniforms[indices]
        self.row_ids = tuple(row for row in self.row_ids for _ in range(num_copies))
        return indices

    def append(self, next_tokens: Tensor) -> None:
        """Write one token to each row that is not done; an end token is written, and ends its row.

        Args:
            next_tokens: `[b]` ids; what they are in rows that are done does not matter.

        Raises:
            InputError: if no column is left.
        """
        if self.length >= self.capacity:
            raise InputError(f"no room for another token: all {self.capacity} columns of the state are filled.")
        self.tokens[:, self.length] = next_tokens.masked_fill(self.is_done, NO_TOKEN)
        if self.end_tokens is not None:
            self.is_done = self.is_done | torch.isin(next_tokens, self.end_tokens)
        self.length += 1

    def note_best(self, best: Tensor) -> None:
        """Remember rows whose best logit `[b]` is not a number (or infinite): `all_done` raises for them."""
        self.noted.append((self.num_generated, best, self.is_done))

    def all_done(self) -> bool:
        """Ask the device, once, whether every row has ended.

        Raises:
            InputError: if logits were NaN or infinite, or no token was allowed, naming the step and the row.
        """
        questions = [self.is_done.all()]
        if self.noted:
            _, bests, ended = zip(*self.noted, strict=True)
            best = bests[0] if len(bests) == 1 else torch.stack(bests)
            is_useful = (best - best == 0) | (ended[0] if len(ended) == 1 else torch.stack(ended))
            questions.append(is_useful.all())
        is_over, *is_well = torch.stack(questions).tolist()
        if not all(is_well):
            self._raise_failure()
        self.noted.clear()
        return is_over

    def _raise_failure(self) -> None:
        found = ((step, best, (~best.isfinite() & ~is_done).nonzero()) for step, best, is_done in self.noted)
        step, best, failed = next(entry for entry in found if len(entry[2]))  # the earliest
        index = int(failed[0, 0])
        row = self.row_ids[index] if self.row_ids else index  # which of all prompts, whatever batch it is in
        if best[index] == -torch.inf:
            cure = "bad words, invalid slices and constraints together leave nothing; allow at least an end token."
            raise InputError(f"step {step}, row {row}: no token is allowed: {cure}")
        cure = "Look at the weights and the dtype (fp16 overflows where bf16 does not)."
        raise InputError(f"step {step}, row {row}: the logits are NaN or infinite. {cure}")


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One finished text of a prompt."""

    tokens: Tensor
    """`[length]` ids: the prompt without padding, then what was generated, the end token included."""
    score: float | None = None
    """What the strategy ranks by (beam search: the normalised sum of log-probabilities), or None."""


def read_rows(state: DecodingState) -> list[Tensor]:
    """Take each row of the state without the places that hold no token, on the device of the state."""
    rows = state.tokens[:, : state.length]
    return [row[row != NO_TOKEN] for row in rows]
