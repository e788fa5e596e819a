"""Images as tokens: what an image model's configuration says, and how patches and positions enter a transformer.

Legend: b batch, s length, c hidden size, h and w height and width in pixels.

    special tokens [b, pre_len + post_len] ─ words ─┐
    image [b, in_channels, h, w] ─ patches ─────────┴─ [pre | patches, row by row | post]  + the whole position table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.hooks import non_conflict
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import PatchLinear, normal_init


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TransformerConfig):
    """Options of a transformer that reads images; `max_sequence_length` follows from them.

    Raises:
        ConfigError: if an image has no patch, or the special tokens have no words.
    """

    #: Names, with `*`, of the tables of the state dict whose rows are [pre | patches | post].
    position_tables: ClassVar[tuple[str, ...]] = ("transformer.position_embeddings.weight",)

    vocab_size: int = 1
    """Rows of the word embedding table: at least `pre_len` + `post_len`."""
    image_size: list[int] = field(default_factory=lambda: [224, 224])
    """Height and width in pixels; one number is a square. What is left beside whole patches is not seen."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    in_channels: int = 3
    """Channels of the image."""
    pre_len: int = 1
    """Special tokens before the patches."""
    post_len: int = 0
    """Special tokens after the patches."""

    def __post_init__(self) -> None:
        """Number the positions, and refuse what does not fit."""
        given: Any = self.image_size
        size = [given] if isinstance(given, int) else list(given)
        object.__setattr__(self, "image_size", size * 2 if len(size) == 1 else size)
        if len(self.image_size) != 2 or min(size) < self.patch_size:
            raise ConfigError(
                f"image_size is {self.image_size}, it must be [height, width] of at least patch_size {self.patch_size}."
            )
        object.__setattr__(self, "max_sequence_length", self.pre_len + self.num_patches + self.post_len)
        super().__post_init__()
        if self.vocab_size < self.pre_len + self.post_len:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, pre_len + post_len is {self.pre_len} + {self.post_len}: every "
                "special token needs a word. Raise vocab_size."
            )

    def without_image(self, **changes: Any) -> TransformerConfig:
        """Return the configuration of a transformer of these sizes that reads no image."""
        sizes = {entry.name: getattr(self, entry.name) for entry in fields(TransformerConfig)}
        return TransformerConfig(**(sizes | {"extra": {}} | changes))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """How many patches an image has."""
        return self.grid[0] * self.grid[1]


class PatchEmbeddingMixin(BaseMixin):
    """Put the patches of `image` between the special tokens, each embedded by one linear (a convolution).

    Args:
        config: gives the sizes.
        bias: whether the convolution has one.
    """

    def __init__(self, config: ImageConfig, bias: bool = True) -> None:
        super().__init__()
        self.pre_len, self.post_len = config.pre_len, config.post_len
        self.image_shape = [config.in_channels, *config.image_size]
        init = normal_init(config.init_method_std)
        self.proj = PatchLinear(config.in_channels, config.hidden_size, config.patch_size, bias, init)

    def embed_patches(self, image: Tensor, **kw: Any) -> Tensor:
        """Embed `[b, in_channels, h, w]`, row by row: `[b, patches, c]`; keywords of the call are for subclasses."""
        return self.proj(image.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, old_impl: Callable[..., Tensor], image: Tensor | None = None, **kw: Any
    ) -> Tensor:
        """Return `[b, s, c]` from special tokens `[b|1, pre_len + post_len]` and the image.

        Raises:
            InputError: if the image, or the number of special tokens, is another than the model's.
        """
        if image is None or list(image.shape[1:]) != self.image_shape:
            found = "missing" if image is None else f"of shape {list(image.shape)}"
            raise InputError(
                f"image is {found}, it must be {['batch', *self.image_shape]}. Resize it, or load the model for "
                'another size: from_pretrained(..., image_size=[h, w], resize_positions="interpolate").'
            )
        if input_ids.shape[1] != self.pre_len + self.post_len:
            raise InputError(
                f"input_ids has {input_ids.shape[1]} special tokens, the model {self.pre_len} before and "
                f"{self.post_len} after the patches. Give as many, or leave input_ids out."
            )
        words = old_impl(input_ids, image=image, **kw).expand(len(image), -1, -1)
        before, after = words.split([self.pre_len, self.post_len], dim=1)
        return torch.cat([before, self.embed_patches(image, **kw), after], dim=1)


class WholeTableMixin(BaseMixin):
    """Add the whole position table: every sequence has its full length, and `position_ids` say nothing."""

    def position_embedding_forward(self, position_ids: Tensor | None, **kw: Any) -> Tensor:
        """Return `[1, s, c]`."""
        return whole(self.transformer.position_embeddings)


def whole(table: Any) -> Tensor:
    """Look up all rows of a table, `[1, s, c]`: by a call, so that who has split the table is asked."""
    return table(torch.arange(table.num_embeddings, device=table.weight.device))[None]


def interpolate_positions(table: Tensor, own: Tensor, before: ImageConfig, after: ImageConfig) -> Tensor:
    """Stretch a position table over the patches of another image size (bicubic, as Dosovitskiy et al. 2020 do).

    Args:
        table: `[s, c]` for `before`, rows [pre | patches, row by row | post].
        own: `[s', c]`, rows for special tokens that `before` does not have.
        before: the configuration of `table`.
        after: the configuration that the result is for.

    Returns:
        `[s', c]`; special tokens keep their rows.
    """
    pre, patches, post = table.split([before.pre_len, before.num_patches, before.post_len])
    own_pre, _, own_post = own.to(table).split([after.pre_len, after.num_patches, after.post_len])
    image = patches.float().T.reshape(1, -1, *before.grid)
    image = F.interpolate(image, size=after.grid, mode="bicubic", align_corners=False)
    rows = image.reshape(-1, after.num_patches).T.to(table.dtype)
    begin = [pre[: after.pre_len], own_pre[before.pre_len :]]
    return torch.cat([*begin, rows, post[: after.post_len], own_post[before.post_len :]])
