"""Cuda2d, which refines images (CogView2; Ding et al. 2022, arXiv:2204.14217).

What differs from the plain transformer:
- a sequence has two parts: text with a small image of l0 x l0 tokens, which is plain and causal, and a large image of
  l1 x l1 tokens, row by row;
- the large image has positions of its own (`mixins.extra_position_embedding`), numbered from 0;
- the large image has projections of its own (`mixins.attention_plus`), and each of its tokens sees a window of the
  small image around its place, and what of a window of the large one was written before it, itself among it;
- the mask `[s0, s0]`, and `log_attention_weights`, are about the first part only.

Legend: b batch, h heads, d head size, c hidden size, s0 and s1 lengths of the two parts, l0 and l1 sides of the images,
k rows of a window, n keys that a row of the large image reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.model import BaseMixin, BaseModel, register_model
from sat_lightning.nn import Transformer
from sat_lightning.nn.attention import dropout_of, merge_heads, split_into_heads
from sat_lightning.nn.attention_fn import attention_fn_default
from sat_lightning.nn.linear import Embedding, Linear, normal_init, run_linear, scaled_normal_init
from sat_lightning.nn.masks import MaskLike

Bands = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Cuda2dConfig(TransformerConfig):
    """Cuda2d's options.

    Raises:
        ConfigError: if the layout holds no two square images, or a table is too short for it.
    """

    layout: list[int] = field(default_factory=lambda: [64, 464, 4064])
    """Where text, small image and large image end, in tokens; `"64,464,4064"` is read too."""
    new_sequence_length: int = 4112
    """Rows of both position tables together."""
    kernel_size: int = 9
    """Columns of the window in the large image; it has as many rows, the token's own the last."""
    kernel_size2: int = 5
    """Side of the window in the small image."""

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out."""
        layout: Any = self.layout
        if isinstance(layout, str):
            object.__setattr__(self, "layout", [int(end) for end in layout.split(",")])
        super().__post_init__()
        sizes = [self.layout[0], *(end - start for start, end in zip(self.layout, self.layout[1:], strict=False))]
        if len(sizes) != 3 or sizes[0] < 0 or any(size <= 0 or isqrt(size) ** 2 != size for size in sizes[1:]):
            raise ConfigError(
                f"layout is {self.layout}: it must be the ends of the text, of a square image and of a larger one, "
                "such as [64, 464, 4064] (64, 20 x 20 and 60 x 60 tokens)."
            )
        tables = [self.max_sequence_length, self.new_sequence_length - self.max_sequence_length]
        if tables[0] < self.layout[1] or tables[1] < sizes[2]:
            raise ConfigError(
                f"layout {self.layout} needs {self.layout[1]} + {sizes[2]} positions, there are {tables[0]} "
                f"(max_sequence_length) + {tables[1]} (new_sequence_length - max_sequence_length)."
            )
        if self.kernel_size < 1 or self.kernel_size2 < 1:
            raise ConfigError(f"kernel sizes are {self.kernel_size} and {self.kernel_size2}, they must be above 0.")

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of the two images, in tokens."""
        return isqrt(self.layout[1] - self.layout[0]), isqrt(self.layout[2] - self.layout[1])


class ExtraPositionsMixin(BaseMixin):
    """Number the second part of the sequence by a table of its own.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: Cuda2dConfig) -> None:
        super().__init__()
        self.first_length, rows = config.layout[1], config.new_sequence_length - config.max_sequence_length
        self.position_embeddings = Embedding(rows, config.hidden_size, normal_init(config.init_method_std))

    def position_embedding_forward(self, position_ids: Tensor, **kw: Any) -> Tensor:
        """Look `[s0 + s1]` or `[b|1, s0 + s1]` up."""
        table: Any = self.transformer.position_embeddings
        first, second = position_ids[..., : self.first_length], position_ids[..., self.first_length :]
        return torch.cat([table(first), self.position_embeddings(second)], dim=-2)


class TwoImagesMixin(BaseMixin):
    """Let the first part attend as ever, and the large image by windows.

    A row of the large image reads a band: the k rows of each image that its windows touch, with a mask of the windows.

    Args:
        config: gives the sizes.
    """

    runs_linears = True

    def __init__(self, config: Cuda2dConfig) -> None:
        super().__init__()
        self.layout, self.sides = config.layout, config.sides
        self.kernel_sizes = config.kernel_size, config.kernel_size2
        width = config.num_attention_heads * config.head_size
        rows = width + 2 * config.num_key_value_heads * config.head_size
        init, std = normal_init(config.init_method_std), config.init_method_std

        def linears(inputs: int, outputs: int, has_bias: bool, init: Any) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(Linear(inputs, outputs, has_bias, init) for _ in range(config.num_layers))

        has_bias = config.use_bias or config.use_qkv_bias
        self.query_key_value = linears(config.hidden_size, rows, has_bias, init)
        self.dense = linears(width, config.hidden_size, config.use_bias, scaled_normal_init(std, config.num_layers))

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Begin with the projections of the first part."""
        for layer_id, layer in enumerate(self.transformer.layers):
            attention: Any = layer.attention
            self.query_key_value[layer_id].load_state_dict(attention.query_key_value.state_dict())
            self.dense[layer_id].load_state_dict(attention.dense.state_dict())

    @non_conflict
    def attention_forward(
        self, hidden_states: Tensor, mask: Tensor, *, old_impl: Callable[..., Tensor], **kw: Any
    ) -> Tensor:
        """Attend in both parts: `[b, s0 + s1, c]` to the same."""
        first, second = hidden_states.split([self.layout[1], self.layout[2] - self.layout[1]], dim=1)
        mask, known = _cut_masks(mask, self.layout[1], kw)
        heads: list[Tensor] = []
        output = old_impl(first, mask, first_part_heads=heads, **(kw | known))
        return torch.cat([output, self._attend_to_windows(second, *heads, **kw)], dim=1)

    @non_conflict
    @passes_mask
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        old_impl: Callable[..., Tensor],
        first_part_heads: list[Tensor],
        **kw: Any,
    ) -> Tensor:
        """Attend in the first part, and keep its keys and values for the second."""
        first_part_heads += [key, value]
        return old_impl(query, key, value, *args, **kw)

    def _attend_to_windows(self, hidden_states: Tensor, near_key: Tensor, near_value: Tensor, **kw: Any) -> Tensor:
        """Attend in the large image, `[b, s1, c]`; keys and values of the first part are `[b, h, s0, d]`."""
        layer_id, layers = kw["layer_id"], self.transformer.layers
        attention: Any = layers[layer_id].attention
        mixed = run_linear(self.query_key_value[layer_id], "query_key_value_plus", hidden_states, **kw)
        size = attention.hidden_size_per_attention_head
        query, key, value = split_into_heads(mixed, attention.sizes, size)
        bands = kw.get("image_bands") or self._make_bands(query)
        kw["output_cross_layer"]["image_bands"] = bands
        tokens, mask = bands[0], bands[1].to(query.dtype)
        small = slice(*self.layout[:2])
        context = attention_fn_default(
            query.unflatten(2, (self.sides[1], -1)).flatten(0, 1).transpose(0, 1),  # [l1, b * h, l1, d]
            self._gather(near_key[:, :, small], key, tokens),
            self._gather(near_value[:, :, small], value, tokens),
            mask,
            dropout_of(attention),
            binary_masks=(mask,),
            attention_backend="eager" if self.transformer.config.attention_backend == "eager" else "sdpa",
        )
        context = context.transpose(0, 1).flatten(1, 2).unflatten(0, (len(query), -1))  # [b, h, s1, d]
        output = run_linear(self.dense[layer_id], "dense_plus", merge_heads(context), **kw)
        return attention.output_dropout(output)

    def _gather(self, near: Tensor, far: Tensor, tokens: Tensor) -> Tensor:
        """Gather what every band reads: `[b, h, l0 * l0, d]` and `[b, h, l1 * l1, d]` to `[l1, b * h, n, d]`."""
        both = torch.cat([near, far], dim=2).flatten(0, 1)
        return both.index_select(1, tokens.flatten()).unflatten(1, tokens.shape).transpose(0, 1)

    def _make_bands(self, like: Tensor) -> Bands:
        """Return which tokens of both images each band reads `[l1, n]`, and which its queries see `[l1, 1, l1, n]`."""
        (side0, side1), (size1, size0) = self.sides, self.kernel_sizes
        place = torch.arange(side1, device=like.device)
        centre = place * side0 // side1
        rows0, inside0 = _window(centre, size0, side0)
        columns0 = _window_mask(centre, size0, side0)
        rows1 = place[:, None] + torch.arange(1 - size1, 1, device=like.device)
        columns1 = _window_mask(place, size1, side1)
        written = columns1 & (place[None] <= place[:, None])  # of the token's own row
        columns = torch.stack([*[columns1] * (size1 - 1), written], dim=1)  # [l1, k, l1]
        seen0 = inside0[:, None, :, None] & columns0[None, :, None]  # [l1 rows, l1 queries, k, l0]
        seen1 = (rows1 >= 0)[:, None, :, None] & columns[None]
        tokens0 = rows0[..., None] * side0 + torch.arange(side0, device=like.device)  # [l1, k, l0]
        tokens1 = rows1.clamp(min=0)[..., None] * side1 + place + side0**2
        tokens = torch.cat([tokens0.flatten(1), tokens1.flatten(1)], dim=1)
        return tokens, torch.cat([seen0.flatten(2), seen1.flatten(2)], dim=2)[:, None]


def _window(centre: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Return the places of a window around each centre, and which of them are inside of the image."""
    places = centre[:, None] + torch.arange(size, device=centre.device) - size // 2
    return places.clamp(0, side - 1), (places >= 0) & (places < side)


def _window_mask(centre: Tensor, size: int, side: int) -> Tensor:
    """Return for each centre which of all places its window holds, `[l1, side]`."""
    offset = torch.arange(side, device=centre.device) - centre[:, None] + size // 2
    return (offset >= 0) & (offset < size)


def _cut_masks(mask: Tensor, length: int, kw: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Cut a mask to the first part, and keep what is known of it."""
    cut = mask[..., :length, :length]
    known = {name: cut if mask is kw[name] else None for name in ("causal_mask", "full_mask")}
    is_binary = any(mask is one for one in kw["binary_masks"])
    return cut, known | {"binary_masks": (cut,) if is_binary else ()}


@register_model
class Cuda2dModel(BaseModel):
    """A decoder of text, a small image and a large one: `model(input_ids)` with `layout[2]` tokens.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = Cuda2dConfig
    default_mask = "causal"
    config: Cuda2dConfig

    def __init__(
        self, config: Cuda2dConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        self.add_mixin("extra_position_embedding", ExtraPositionsMixin(self.config))
        self.add_mixin("attention_plus", TwoImagesMixin(self.config))

    def forward(self, input_ids: Tensor, *args: Any, **kw: Any) -> list[Any]:
        """Run the model; as `BaseModel`, but a mask is `[s0, s0]` or `[b, 1, s0|1, s0]`."""
        if input_ids.shape[-1] != self.config.layout[2]:
            raise InputError(
                f"input_ids has {input_ids.shape[-1]} tokens, layout {self.config.layout} has {self.config.layout[2]}: "
                "text, small image and large image together."
            )
        return super().forward(input_ids, *args, **kw)

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor:
        """Return 0, 1, 2, ... in each part."""
        _, first, whole = self.config.layout
        return torch.cat([torch.arange(length, device=input_ids.device) for length in (first, whole - first)])[None]

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Read a mask of the first part; rows of the large image are added, which nobody reads."""
        first, whole = self.config.layout[1:]
        if isinstance(attention_mask, Tensor) and attention_mask.dim() > 1 and attention_mask.shape[-2] == first:
            return F.pad(attention_mask, (0, 0, 0, whole - first), value=1)
        return attention_mask
