"""Rotary positions brought by a mixin, for backbones that have none of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.model import BaseMixin
from sat_lightning.nn.rotary import RotaryEmbedding, rotate

Angles = tuple[Tensor, Tensor]


class RotaryMixin(BaseMixin):
    """Rotate queries and keys by their positions (Su et al. 2021, arXiv:2104.09864).

    Args:
        config: gives base, pairing, scaling and, unless told, the rotated features of a head.
        dim: rotated features for each axis of positions. Default: `rotary_dim`, or `hidden_size` /
            `num_attention_heads`.
        num_axes: 1 for positions `[b, s]`; 2 for `[b, 2, s]`, where the first half of a head follows the first row and
            the second half the second.
        name: of the submodule, which is its prefix in the state dict.
        is_fixed: keep the computed frequencies whatever a checkpoint holds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dim: int | None = None,
        num_axes: int = 1,
        name: str = "rotary_emb",
        is_fixed: bool = False,
    ) -> None:
        super().__init__()
        dim = dim or config.rotary_dim or config.hidden_size // config.num_attention_heads
        kind = _FixedRotaryEmbedding if is_fixed else RotaryEmbedding
        self.add_module(name, kind(dim, config.rotary_base, config.rotary_interleaved, config.rope_scaling))
        self.name, self.num_axes = name, num_axes

    def query_key_forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        position_ids: Tensor | None,
        output_cross_layer: dict[str, Any],
        rotary_angles: Angles | None = None,
        **kw: Any,
    ) -> tuple[Tensor, Tensor]:
        """Rotate both; layer 0 makes the angles, later layers receive them."""
        angles = self._angles(position_ids, query) if rotary_angles is None else rotary_angles
        output_cross_layer["rotary_angles"] = angles
        return self._turn(query, angles), self._turn(key, angles)

    def _angles(self, position_ids: Tensor | None, query: Tensor) -> Angles:
        rotary: RotaryEmbedding = getattr(self, self.name)
        wanted = "[length] or [batch, length]" if self.num_axes == 1 else f"[batch, {self.num_axes}, length]"
        if position_ids is None:
            raise InputError(f"position_ids is None, and rotary positions need them: pass {wanted}.")
        if self.num_axes == 1:
            return rotary(position_ids, query.dtype)
        if position_ids.dim() != 3 or position_ids.shape[1] != self.num_axes:
            raise InputError(f"position_ids has shape {list(position_ids.shape)}; this model needs {wanted}.")
        tables = rotary(position_ids.flatten(0, 1), query.dtype)  # [b * axes, 1, s, r/2] both
        cos, sin = (x.unflatten(0, (-1, self.num_axes)).permute(0, 2, 3, 1, 4) for x in tables)
        return cos, sin  # [b, 1, s, axes, r/2]

    def _turn(self, x: Tensor, angles: Angles) -> Tensor:
        rotary: RotaryEmbedding = getattr(self, self.name)
        if self.num_axes == 1:
            return rotate(x, *angles, rotary.interleaved)
        return rotate(x.unflatten(-1, (self.num_axes, -1)), *angles, rotary.interleaved).flatten(-2)


class _FixedRotaryEmbedding(RotaryEmbedding):
    """Frequencies that a checkpoint carries but does not decide: files hold them rounded to half precision."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}inv_freq": self.inv_freq}, prefix, *args)
