"""Words to guess: which tokens of a batch are hidden, and by what.

Legend: b batch, s length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.data.words import WordEdges
from sat_lightning.errors import ConfigError

_SHOWN_AS_MASK, _SHOWN_AS_OTHER = 0.8, 0.1
_MASK = 2**32 - 1
_NUM_BITS = 24  # what a float32 holds
_SALTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)


class WordMasking:
    """BERT's corruption (Devlin et al. 2018, arXiv:1810.04805), on the device of the batch, without waiting for it.

    Of the chosen tokens 80 % are shown as the mask, 10 % as any word, 10 % as they are; all of them are to be guessed.

    Args:
        mask_token_id: of the mask.
        mask_prob: share of the tokens that are chosen, above 0, at most 1.
        special_token_ids: never chosen, such as those around a sentence.
        edges: of words, which are then chosen whole; each of their tokens is shown in its own way. Default: tokens are
            chosen one by one.

    Raises:
        ConfigError: a number is outside its range.
    """

    def __init__(
        self,
        mask_token_id: int,
        mask_prob: float = 0.15,
        special_token_ids: Sequence[int] = (),
        edges: WordEdges | None = None,
    ) -> None:
        if not 0 < mask_prob <= 1:
            raise ConfigError(f"mask_prob is {mask_prob}. Set it to a share of the tokens, above 0 and at most 1.")
        if mask_token_id < 0:
            raise ConfigError(f"mask_token_id is {mask_token_id}. Set it to the id of the tokenizer's mask.")
        self.mask_token_id, self.mask_prob = mask_token_id, mask_prob
        self.special_token_ids = (mask_token_id, *special_token_ids)
        self.edges = edges

    def hide(self, batch: dict[str, Tensor], vocab_size: int, is_fixed: bool = False) -> dict[str, Tensor]:
        """Hide words of a batch.

        Args:
            batch: `input_ids` `[b, s]`. Where `target_ids` are -100, nothing is chosen: that is padding. `word_ids`
                `[b, s]`, the number of each token's word, from 0 and below s, go before `edges`.
            vocab_size: words that may be shown instead.
            is_fixed: whether a text decides what is hidden of it: the same in every batch, and on every rank. Default:
                the random numbers of the device do.

        Returns:
            The batch with hidden `input_ids`, and as `target_ids` the words to guess, not shifted, elsewhere -100.

        Raises:
            ConfigError: the mask is outside the vocabulary.
        """
        if self.mask_token_id >= vocab_size:
            raise ConfigError(
                f"mask_token_id is {self.mask_token_id} and the model's vocab_size {vocab_size}. Raise vocab_size."
            )
        input_ids, word_ids = batch["input_ids"], batch.get("word_ids")
        is_text = batch["target_ids"] != IGNORED_TARGET if "target_ids" in batch else torch.ones_like(input_ids).bool()
        if is_fixed:
            bits = _bits_of(input_ids, is_text)
            draw, others = bits[:2] / 2**_NUM_BITS, bits[2] % vocab_size
        else:
            draw = torch.rand(2, *input_ids.shape, device=input_ids.device)
            others = torch.randint(vocab_size, input_ids.shape, device=input_ids.device)
        if word_ids is None and self.edges is not None:
            word_ids = self.edges.number(input_ids)
        chance = draw[0] if word_ids is None else draw[0].gather(1, word_ids)
        is_chosen = (chance < self.mask_prob) & is_text
        for token_id in self.special_token_ids:
            is_chosen &= input_ids != token_id
        shown = torch.where(draw[1] < _SHOWN_AS_MASK + _SHOWN_AS_OTHER, others, input_ids)
        shown = torch.where(draw[1] < _SHOWN_AS_MASK, self.mask_token_id, shown)
        targets = torch.where(is_chosen, input_ids, IGNORED_TARGET)
        rest = {name: value for name, value in batch.items() if name != "word_ids"}
        return rest | {"input_ids": torch.where(is_chosen, shown, input_ids), "target_ids": targets}


def _bits_of(input_ids: Tensor, is_text: Tensor) -> Tensor:
    """Derive numbers below 2^24 from texts, three for each token: `[3, b, s]`; padding plays no part in them."""
    so_far = (_mix(input_ids + 1) * is_text).cumsum(1) & _MASK
    whole = _mix((so_far * is_text).sum(1, keepdim=True) & _MASK)
    seeds = _mix(so_far) ^ whole
    return torch.stack([_mix(seeds ^ salt) >> (32 - _NUM_BITS) for salt in _SALTS])


def _mix(values: Tensor) -> Tensor:
    """Let each of 32 bits move all of them; the products stay below 2^63."""
    for _ in range(2):
        values = ((values ^ (values >> 16)) * 0x45D9F3B) & _MASK
    return values ^ (values >> 16)
