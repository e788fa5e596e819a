"""Computing only the tokens of a padded batch: what is not attention then never sees padding.

Legend: b batch, s length, n tokens that are computed (of b * s), h heads, c hidden size.

    embeddings [b, s, c]  --gather-->  [1, n, c]  norms, linears, MLPs, residuals of all layers
                                          |  query_key_value  --scatter-->  [b, s, 3 c]
                                          |      attention as ever, by the mask  [b, s, c]
                                          |  dense            <--gather--   [b, s, c]
    final hook [b, s, c]  <--scatter-- [1, n, c]   0 where a token was left out

Where texts of different lengths share a batch this saves the share of padding in all matrix products (as
MosaicBERT does, Portes et al. 2023, arXiv:2312.17482). The result of the tokens is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sat_lightning.errors import InputError

if TYPE_CHECKING:
    from sat_lightning.hooks import HookTable
    from sat_lightning.nn.front import Front


class Unpadding:
    """The tokens of a batch that are computed.

    Args:
        token_indices: `[n]`, int64: row * s + column of each, none twice.
        batch_size: b.
        length: s.
    """

    def __init__(self, token_indices: Tensor, batch_size: int, length: int) -> None:
        self.token_indices, self.batch_size, self.length = token_indices, batch_size, length

    def gather(self, x: Tensor) -> Tensor:
        """Return the features of the tokens: `[b, s, c]` to `[1, n, c]`."""
        return x.flatten(0, 1).index_select(0, self.token_indices)[None]

    def scatter(self, x: Tensor) -> Tensor:
        """Put them where they came from, 0 elsewhere: `[1, n, c]` to `[b, s, c]`."""
        if x.shape[:2] != (1, len(self.token_indices)):
            raise InputError(
                f"{len(self.token_indices)} tokens are computed, and a layer holds {list(x.shape)} instead of "
                f"[1, {len(self.token_indices)}, c]: a hook that needs whole rows. Leave token_indices out."
            )
        # No index is there twice, so adding is writing, and several times as fast as index_copy on a CPU.
        flat = x.new_zeros(self.batch_size * self.length, x.shape[-1]).index_add(0, self.token_indices, x[0])
        return flat.unflatten(0, (self.batch_size, self.length))


def make_unpadding(
    token_indices: Tensor | None, input_ids: Tensor, words: Tensor, front: Front | None, hooks: HookTable
) -> Unpadding | None:
    """Return what leaves tokens out of the layers, None where all are computed.

    Args:
        token_indices: of the caller, about `input_ids`; None computes all.
        input_ids: `[b, s]`.
        words: what the layers read, `[b, n in front + s, c]`; tokens in front are computed in every row.
        front: what stands in front of the sequence.
        hooks: who answers at each seam.

    Raises:
        InputError: the indices are not such numbers, or the model's own layers need whole rows.
    """
    if token_indices is None:
        return None
    batch_size, length = input_ids.shape[:2]
    if token_indices.dim() != 1 or token_indices.dtype != torch.int64 or len(token_indices) > batch_size * length:
        raise InputError(
            f"token_indices is {token_indices.dtype} {list(token_indices.shape)}; for {batch_size} rows of {length} "
            "tokens it must be int64 [n], row * length + column of each token that is computed: "
            "token_mask.flatten().nonzero()[:, 0]."
        )
    in_front = 0 if front is None else front.length
    if words.shape[1] != in_front + length:
        raise InputError(
            f"token_indices are about {length} tokens, and the embeddings are {words.shape[1]} long: a hook adds "
            "tokens among them. Leave token_indices out."
        )
    holder = hooks.origins["attention_forward"][-1]
    if holder != "default":
        raise InputError(
            f"token_indices were given, and '{holder}' replaces attention_forward, which puts padding back for "
            f"attention. Leave token_indices out, or let '{holder}' wrap the seam with @non_conflict."
        )
    if not in_front:
        return Unpadding(token_indices, batch_size, length)
    whole = in_front + length
    starts = torch.arange(batch_size, device=token_indices.device)[:, None] * whole
    first = (starts + torch.arange(in_front, device=token_indices.device)).flatten()
    rows = token_indices // length
    return Unpadding(torch.cat([first, token_indices + (rows + 1) * in_front]), batch_size, whole)


def put_back(x: Tensor, kw: dict[str, Any]) -> Tensor:
    """Return whole rows, `[b, s, c]`, of what layers hold of them; nothing is done where that is all.

    Args:
        x: `[b, s, c]`, or `[1, n, c]` where tokens are left out.
        kw: keywords of the hook.
    """
    unpadding: Unpadding | None = kw.get("unpadding")
    return x if unpadding is None else unpadding.scatter(x)


def take_out(x: Tensor, kw: dict[str, Any]) -> Tensor:
    """Return what layers hold of whole rows: the way back of `put_back`."""
    unpadding: Unpadding | None = kw.get("unpadding")
    return x if unpadding is None else unpadding.gather(x)
