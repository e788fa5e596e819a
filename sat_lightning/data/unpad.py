"""Telling a model which entries of a padded batch are tokens, so that its layers compute nothing else.

Legend: b batch, s length, n tokens of the batch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sat_lightning.data.packing import IGNORED_TARGET
from sat_lightning.errors import DataError

Batch = dict[str, Tensor]


class UnpadCollate:
    """Add `token_indices` `[n]` to what another collate makes, so that a model leaves the padding out of its layers.

    They come from `token_mask` `[b, s]` or `[b, choices, s]`; for the pairs of `PairCollate` they are
    `enc_token_indices` and `dec_token_indices`. A batch with next to no padding gets none. See
    `sat_lightning.nn.unpadding`.

    Args:
        collate: makes the batch, with its masks: `LabelCollate()`, `PadCollate(token_mask=True)` or `PairCollate()`.
        round_to: compute as much padding as brings n to a multiple: of a few sizes an allocator keeps less memory than
            of a new one with every batch.

    Raises:
        DataError: `round_to` is below 1.
    """

    def __init__(self, collate: Callable[[list[Any]], Batch], round_to: int = 64) -> None:
        if round_to < 1:
            raise DataError(f"unpad: round_to is {round_to}. Set it to at least 1.")
        self.collate, self.round_to = collate, round_to
        #: What batches are planned by, see `PadCollate`.
        self.length, self.multiple_of = getattr(collate, "length", "longest"), getattr(collate, "multiple_of", 1)

    def __call__(self, samples: list[Any]) -> Batch:
        """Collate a batch.

        Args:
            samples: of the inner collate.

        Raises:
            DataError: the batch does not say what is padding.
        """
        batch = self.collate(samples)
        masks = {"token_indices": batch.get("token_mask")}
        if masks["token_indices"] is None and _is_of_pairs(batch):
            masks = {
                "enc_token_indices": batch["attention_mask"].bool(),
                "dec_token_indices": batch["target_ids"] != IGNORED_TARGET,
            }
        found = {name: _indices(mask, self.round_to) for name, mask in masks.items() if mask is not None}
        if not found:
            raise DataError(
                f"unpad: the batch has {sorted(batch)} and no token_mask, which says what is padding. Let "
                f"{type(self.collate).__name__} add one, as PadCollate(token_mask=True) does, or remove unpad."
            )
        return batch | {name: indices for name, indices in found.items() if indices is not None}


def _is_of_pairs(batch: Batch) -> bool:
    return all(name in batch and batch[name].dim() == 2 for name in ("attention_mask", "target_ids"))


def _indices(mask: Tensor, round_to: int) -> Tensor | None:
    is_computed = mask.flatten()
    num_more = -int(is_computed.sum()) % round_to
    is_computed = is_computed | (~is_computed & ((~is_computed).cumsum(0) <= num_more))
    return None if is_computed.all() else is_computed.nonzero()[:, 0]
