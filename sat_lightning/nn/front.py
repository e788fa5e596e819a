"""Room for tokens that a hook puts in front of a sequence: positions, masks, and where they are cut off again.

Legend: b batch, n tokens in front, s query length, t key length, c hidden size.

A `word_embedding_forward` that returns n + s embeddings says so by what it writes to `output_cross_layer`:

    front_length     n; positions and masks make room, and the n hidden states are cut off before `final_forward`
    keeps_front      True: they are not cut off
    first_position   how much later all positions begin, for who has put n tokens elsewhere
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.nn.masks import MaskLike


class Front(NamedTuple):
    """What stands in front of a sequence."""

    length: int = 0
    first_position: int = 0
    is_kept: bool = False

    def number(self, position_ids: Tensor | None, num_positions: int | None) -> Tensor | None:
        """Return the positions of all tokens: `[s]` or `[b|1, s]` to `[.., n + s]`.

        Args:
            position_ids: of the sequence; None stays None.
            num_positions: rows of the position table, None where there is none.

        Raises:
            InputError: if the table is too short, or positions have two axes.
        """
        if position_ids is None:
            return None
        if position_ids.dim() > 2:
            raise InputError(
                f"position_ids has shape {list(position_ids.shape)}, and cannot be moved along for tokens in front: "
                "that needs [length] or [batch, length]."
            )
        total = self.length + self.first_position + position_ids.shape[-1]
        if num_positions is not None and total > num_positions:
            raise InputError(
                f"{self.length + self.first_position} tokens of a prompt and {position_ids.shape[-1]} of the sequence "
                f"are {total}, max_sequence_length is {num_positions}. Shorten one of them, or build the model with a "
                "larger max_sequence_length."
            )
        later = position_ids + (self.length + self.first_position)
        if not self.length:
            return later
        first = torch.arange(self.length, device=position_ids.device) + self.first_position
        return torch.cat([position_ids[..., :1] + first, later], dim=-1)

    def extend(self, attention_mask: MaskLike) -> MaskLike:
        """Let all see the tokens in front; where a mask has a row for each query, theirs are causal.

        Args:
            attention_mask: of the sequence; one that is no tensor stays as it is.
        """
        if not isinstance(attention_mask, Tensor) or not self.length:
            return attention_mask
        mask, n = attention_mask, self.length
        mask = torch.cat([mask.new_ones(*mask.shape[:-1], n), mask], dim=-1)
        if mask.shape[-2] == 1:
            return mask
        rows = mask.new_ones(n, mask.shape[-1]).tril().expand(*mask.shape[:-2], -1, -1)
        return torch.cat([rows, mask], dim=-2)

    def extend_others(self, kw: dict[str, Any]) -> dict[str, Any]:
        """Make room in what else is given for each pair: `log_attention_weights`, `cross_attention_mask`."""
        weights, cross, n = kw.get("log_attention_weights"), kw.get("cross_attention_mask"), self.length
        if n and weights is not None:
            columns, rows = (n if size > 1 else 0 for size in (weights.shape[-1], weights.shape[-2]))
            kw = kw | {"log_attention_weights": F.pad(weights, (columns, 0, rows, 0))}
        if n and isinstance(cross, Tensor) and cross.shape[-2] > 1:
            first = cross[..., :1, :].expand(*cross.shape[:-2], n, -1)
            kw = kw | {"cross_attention_mask": torch.cat([first, cross], dim=-2)}
        return kw

    def cut(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states of the sequence, `[b, s, c]`."""
        return hidden_states if self.is_kept or not self.length else hidden_states[:, self.length :]


def read_front(carry: dict[str, Any]) -> Front | None:
    """Take out of `carry` what an embedding hook says of tokens in front; None if nothing."""
    if not carry.keys() & {"front_length", "first_position"}:
        return None
    return Front(carry.pop("front_length", 0), carry.pop("first_position", 0), carry.pop("keeps_front", False))
