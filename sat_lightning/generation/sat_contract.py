"""How SAT's own loops, and strategies derived from SAT's, drive a strategy.

Legend: b rows, t tokens so far, v vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sat_lightning.generation.state import DecodingState

_NOTES = ("_is_done", "context_length")


class SatContract:
    """`forward`, `is_done` and `finalize(tokens, mems)`, over a `step` that keeps nothing in the strategy.

    Unlike `step`, `forward` leaves two notes in the strategy until `finalize` or `forget`, as in SAT: how long the
    prompt was, and whether a single row has ended.
    """

    top_k: int

    @property
    def topk(self) -> int:
        """What SAT's strategies call `top_k`."""
        return self.top_k

    @topk.setter
    def topk(self, value: int) -> None:
        self.top_k = value

    @property
    def is_done(self) -> bool:
        """Whether the one row there is has ended; of several rows, SAT ends none."""
        return bool(vars(self).get("_is_done", False))

    def forward(
        self,
        logits: Tensor,
        tokens: Tensor,
        mems: Any,  # noqa: ANN401
        temperature: float | None = None,
        nan_default_token: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Append the next token to each row.

        Args:
            logits: `[b, v]`.
            tokens: `[b, t]`; at the first call they are the prompt.
            mems: handed back.
            temperature: in the place of the strategy's own.
            nan_default_token: what follows where logits are NaN. Default: an error.

        Returns:
            Tokens `[b, t + 1]`, and `mems`.
        """
        context_length = vars(self).setdefault("context_length", tokens.shape[1])
        if nan_default_token is not None:
            default = torch.full_like(logits, -1000.0).index_fill(1, tokens.new_tensor([nan_default_token]), 0.0)
            logits = torch.where(logits.isnan().any(-1, keepdim=True), default, logits)
        next_tokens = _step(self, logits, tokens, context_length, temperature)
        if len(next_tokens) == 1 and int(next_tokens) in (getattr(self, "end_tokens", None) or ()):
            vars(self)["_is_done"] = True
        return torch.cat([tokens, next_tokens[:, None]], dim=1), mems

    def forget(self) -> None:
        """Drop the notes of `forward`: the next call begins a new text."""
        for note in _NOTES:
            vars(self).pop(note, None)


def _step(strategy: Any, logits: Tensor, tokens: Tensor, context_length: int, temperature: float | None) -> Tensor:  # noqa: ANN401
    """Choose the next tokens `[b]` behind a text, in a state that is made for this one step."""
    if temperature is not None:
        strategy = copy.copy(strategy)
        strategy.temperature = temperature
    length = tokens.shape[1]
    state = DecodingState.create(tokens[:, :context_length], length - context_length + 1)
    state.tokens[:, :length], state.length = tokens, length
    next_tokens, state = strategy.step(logits, strategy.start(state))
    state.all_done()
    return next_tokens
