"""SAT's iterative refinement: all places are drawn at once, and the unsure ones hotter (or colder) than the sure.

Legend: b batch, s places, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.processors import ban_mask, mask_of_slices
from sat_lightning.generation.rules import check_range
from sat_lightning.generation.sampling import draw_token


def top_entropy(logits: Tensor, num_top: int) -> Tensor:
    """Measure how unsure logits `[..., v]` are among their `num_top` best tokens: an entropy in nats, `[...]`."""
    log_probs = logits.float().topk(num_top, dim=-1).values.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def keep_drawn_top_k(drawn: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Replace a drawn token that is less likely than the `top_k` best by the last of these.

    Unlike a draw among the best alone, this makes them no likelier.

    Args:
        drawn: ids `[...]`.
        logits: `[..., v]` they were drawn from.
        top_k: tokens that may stay.
    """
    values, indices = logits.topk(top_k, dim=-1)
    is_outside = logits.gather(-1, drawn[..., None]) < values[..., -1:]
    return torch.where(is_outside, indices[..., -1:], drawn[..., None])[..., 0]


@dataclass(eq=False)
class IterativeEntfilterStrategy:
    """Draw every place of a text anew, as SAT's class of this name does; the arguments are SAT's.

    `forward` also takes, for one call: `temperature`; `entfilter`, an entropy in nats above which a place has that
    temperature, while the others have `temperature2`; `filter_topk`, among how many best tokens the entropy is
    measured; and `generator`, the source of chance on the device of the logits.

    Raises:
        ConfigError: if a value is out of its range.
    """

    invalid_slices: Sequence[Any] = ()
    """Slices (or ids) of the vocabulary that are never generated."""
    temperature: float = 1.0
    """Divides the logits."""
    topk: int = 10
    """A draw outside this many most likely tokens becomes the last of them."""

    def __post_init__(self) -> None:
        """Check every value."""
        check_range("temperature", self.temperature, 0.0, is_open=True)
        check_range("topk", self.topk, 1)

    def forward(
        self,
        logits: Tensor,
        tokens: Tensor,
        temperature: float | None = None,
        entfilter: float | None = None,
        filter_topk: int = 5,
        temperature2: float | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw all places of logits `[b, s, v]` at once; of tokens `[b, s + 1]` the first column is kept.

        Returns:
            Ids `[b, s + 1]`.
        """
        self._check(logits, tokens, entfilter, filter_topk, temperature2)
        heat = torch.full(logits.shape[:-1], temperature or self.temperature, device=logits.device)
        if entfilter is not None and temperature2 is not None:
            heat = heat.where(top_entropy(logits, filter_topk) > entfilter, temperature2)
        logits = logits.float() / heat[..., None]
        if self.invalid_slices:
            logits = ban_mask(logits, mask_of_slices(self.invalid_slices, logits))
        uniforms = torch.rand(logits.shape[:-1], generator=generator, device=logits.device)
        drawn = draw_token(logits.flatten(0, 1), uniforms.flatten()).view(uniforms.shape)
        return torch.cat([tokens[:, :1], keep_drawn_top_k(drawn, logits, self.topk)], dim=1)

    def _check(self, logits: Tensor, tokens: Tensor, entfilter: Any, filter_topk: int, temperature2: Any) -> None:
        if tokens.shape[1] != logits.shape[1] + 1:
            raise InputError(
                f"{tokens.shape[1]} tokens and logits of {logits.shape[1]} places: there must be one token more."
            )
        if self.topk > logits.shape[-1] or filter_topk > logits.shape[-1]:
            raise ConfigError(f"topk={self.topk} and filter_topk={filter_topk} for {logits.shape[-1]} tokens.")
        if entfilter is not None and temperature2 is None:
            raise ConfigError("entfilter= needs temperature2=, the temperature of the places below it.")
