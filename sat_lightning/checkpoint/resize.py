"""A checkpoint of another vocabulary or sequence length in a model: only on request, and by a rule that is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sat_lightning.checkpoint.report import matches
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.patch_embedding import ImageConfig, interpolate_positions

VocabularyFill = Literal["mean", "zeros", "initial"]
PositionFill = Literal["interpolate", "repeat", "initial"]


@dataclass(frozen=True)
class Resize:
    """How tensors of one size become tensors of another; without a request they do not.

    Args:
        before: the configuration of the checkpoint.
        after: the configuration of the model.
        vocab: what new rows of embeddings and heads are: the "mean" of the others (Hewitt 2021, "Initializing New Word
            Embeddings for Pretrained Language Models"), "zeros", or what the model was built with, "initial". A smaller
            vocabulary drops the last rows.
        positions: what a longer position table is: the old one stretched ("interpolate", linear), "repeat"ed, or
            continued with what the model was built with, "initial". A shorter one drops the last rows. The table of an
            image's patches is stretched in both directions, bicubic, to the `image_size` of the model; special tokens
            keep their rows.
    """

    before: TransformerConfig
    after: TransformerConfig
    vocab: VocabularyFill | None = None
    positions: PositionFill | None = None

    @property
    def needs_initial_values(self) -> bool:
        """Whether rows of the freshly built model are kept."""
        before, after = self.before, self.after
        if isinstance(before, ImageConfig) and isinstance(after, ImageConfig):
            if after.pre_len > before.pre_len or after.post_len > before.post_len:
                return True
        return "initial" in (self.vocab, self.positions)

    def apply(self, name: str, tensor: Tensor, own: Tensor) -> Tensor:
        """Return the tensor in the shape of `own` if a request covers the difference, else as it is."""
        differing = [dim for dim, (a, b) in enumerate(zip(tensor.shape, own.shape, strict=False)) if a != b]
        if self._is_of_patches(name):
            return self._interpolate(name, tensor, own)
        if tensor.dim() != own.dim() or differing != [0]:
            return tensor
        sizes = (tensor.shape[0], own.shape[0])
        is_position = "position_embeddings" in name
        if self.vocab and not is_position and sizes in self._vocabularies():
            return _extend(tensor, own, self.vocab)
        if self.positions and is_position:
            return _extend(tensor, own, self.positions)
        return tensor

    def _vocabularies(self) -> list[tuple[int, int]]:
        """Return the sizes before and after of every vocabulary; a model of images and texts has one for each."""
        names = [name for name in ("vocab_size", "text_vocab_size") if hasattr(self.before, name)]
        return [(getattr(self.before, name), getattr(self.after, name)) for name in names]

    def _is_of_patches(self, name: str) -> bool:
        """Tell whether a tensor numbers the patches of an image, and the two models see other images."""
        before, after = self.before, self.after
        if not (isinstance(before, ImageConfig) and isinstance(after, ImageConfig)):
            return False
        return matches(name, after.position_tables) and _layout(before) != _layout(after)

    def _interpolate(self, name: str, tensor: Tensor, own: Tensor) -> Tensor:
        """Stretch a table over other patches; a table of as many rows would else be taken for one that fits."""
        before, after = self.before, self.after
        assert isinstance(before, ImageConfig) and isinstance(after, ImageConfig)
        if self.positions != "interpolate":
            raise CheckpointError(
                f"'{name}' numbers the patches of images of {before.image_size}, the model reads {after.image_size}. "
                'Ask for resize_positions="interpolate", which stretches it.'
            )
        if len(tensor) != before.max_sequence_length:
            raise CheckpointError(
                f"'{name}' has {len(tensor)} rows and an image of {before.image_size} {before.max_sequence_length} "
                "tokens, so which row is which patch is unknown. Keep the image size."
            )
        return interpolate_positions(tensor, own, before, after)


def _layout(config: ImageConfig) -> tuple[object, ...]:
    return config.grid, config.pre_len, config.post_len


def _extend(tensor: Tensor, own: Tensor, rule: str) -> Tensor:
    size, wanted = tensor.shape[0], own.shape[0]
    if wanted <= size:
        return tensor[:wanted].contiguous()
    if rule == "interpolate":
        rows = torch.nn.functional.interpolate(tensor.float().T[None], size=wanted, mode="linear", align_corners=True)
        return rows[0].T.to(tensor.dtype).contiguous()
    if rule == "repeat":
        return tensor[torch.arange(wanted) % size]
    added = (
        own[size:].detach().to(tensor.dtype)
        if rule == "initial"
        else tensor.new_zeros(wanted - size, *tensor.shape[1:])
    )
    if rule == "mean":
        added += tensor.float().mean(0).to(tensor.dtype)
    return torch.cat([tensor, added])


def round_up(vocab_size: int, multiple: int) -> int:
    """Return the smallest multiple that holds a vocabulary (SAT's `make_vocab_size_divisible_by`)."""
    return -(-vocab_size // multiple) * multiple
