"""Rotary position embedding, and the rules that stretch it to longer sequences.

Legend: b batch, h heads, s length, d head size, r rotated features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.errors import ConfigError, InputError

RopeRule = Callable[[Tensor, Mapping[str, Any], float], tuple[Tensor, float]]


def _linear(inv_freq: Tensor, rule: Mapping[str, Any], base: float) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return inv_freq / rule["factor"], 1.0


def _ntk(inv_freq: Tensor, rule: Mapping[str, Any], base: float) -> tuple[Tensor, float]:
    """A larger base, so that the slowest frequency is stretched by the factor and the fastest not at all."""
    dim = 2 * inv_freq.numel()
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return (base * rule["factor"] ** (dim / (dim - 2))) ** -exponent, 1.0


def _llama3(inv_freq: Tensor, rule: Mapping[str, Any], base: float) -> tuple[Tensor, float]:
    """Keep fast frequencies, divide slow ones by the factor, blend between (Llama 3, arXiv:2407.21783)."""
    turns = rule["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rule.get("low_freq_factor", 1.0), rule.get("high_freq_factor", 4.0)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / rule["factor"]), 1.0


def _yarn(inv_freq: Tensor, rule: Mapping[str, Any], base: float) -> tuple[Tensor, float]:
    """Blend by the number of turns within the original length, and warm the scores (Peng et al. 2023, 2309.00071)."""
    dim, factor = 2 * inv_freq.numel(), float(rule["factor"])
    length = rule["original_max_position_embeddings"]

    def feature_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(feature_of(rule.get("beta_fast", 32.0))), 0)
    last = min(math.ceil(feature_of(rule.get("beta_slow", 1.0))), dim - 1)
    slow = ((torch.arange(inv_freq.numel(), dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    warmth = rule.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0)
    return inv_freq * ((1.0 - slow) + slow / factor), warmth


#: Rule name -> (frequencies, settings, base) -> (stretched frequencies, factor on cos and sin).
ROPE_RULES: dict[str, RopeRule] = {
    "default": lambda inv_freq, rule, base: (inv_freq, 1.0),
    "linear": _linear,
    "ntk": _ntk,
    "llama3": _llama3,
    "yarn": _yarn,
}


class RotaryEmbedding(nn.Module):
    """Rotate pairs of features by an angle that grows with the position (Su et al. 2021, arXiv:2104.09864).

    ``angle[j] = position * base^(-2j/r)``; a pair (a, b) becomes (a cos - b sin, a sin + b cos).

    Args:
        dim: r, rotated features of each head; the others pass unchanged.
        base: of the frequencies.
        interleaved: pairs are (2j, 2j+1) instead of (j, j + r/2).
        scaling: rule that stretches the frequencies: `{"rope_type": name, ...}`, see `ROPE_RULES`.

    Raises:
        ConfigError: if the rule lacks one of its settings.
    """

    inv_freq: Tensor
    stretch: Tensor

    def __init__(
        self, dim: int, base: float = 10000.0, interleaved: bool = False, scaling: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        with torch.device("cpu"):  # a few numbers, exact whatever the default device is
            inv_freq = base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            rule = dict(scaling or {"rope_type": "default"})
            name = rule.get("rope_type", rule.get("type", "default"))
            try:
                stretched, self.magnitude = ROPE_RULES[name](inv_freq, rule, base)
            except KeyError as missing:
                raise ConfigError(f"rope_scaling: rule '{name}' needs the setting {missing}.") from missing
        # The unstretched frequencies are what SAT's files hold; the rule stays in the configuration.
        self.register_buffer("inv_freq", inv_freq)
        self.register_buffer("stretch", stretched / inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Follow the module to a device but keep fp32: bf16 frequencies would blur positions beyond a few hundred."""
        before = {name: getattr(self, name) for name in ("inv_freq", "stretch")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            if not exact.is_meta:
                setattr(self, name, exact.to(device=getattr(self, name).device))
        return self

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin for every position, once for all layers.

        Args:
            position_ids: `[s]` or `[b|1, s]`, integers.
            dtype: of queries and keys.

        Returns:
            Two tensors `[b|1, 1, s, r/2]`.
        """
        if position_ids.dim() > 2:
            raise InputError(f"position_ids has shape {list(position_ids.shape)}; rotary positions are [s] or [b, s].")
        positions = position_ids if position_ids.dim() == 2 else position_ids[None]
        with torch.autocast(device_type=positions.device.type, enabled=False):
            angles = positions[:, None, :, None].float() * (self.inv_freq * self.stretch)  # [b, 1, s, r/2]
            return (angles.cos() * self.magnitude).to(dtype), (angles.sin() * self.magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] features of each head.

    Args:
        x: queries or keys, `[b, h, s, d]`.
        cos: `[b|1, 1, s, r/2]`.
        sin: `[b|1, 1, s, r/2]`.
        interleaved: how features pair up, see `RotaryEmbedding`.

    Returns:
        `[b, h, s, d]`.
    """
    half = cos.shape[-1]
    turned, rest = (x, None) if x.shape[-1] == 2 * half else x.split([2 * half, x.shape[-1] - 2 * half], dim=-1)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)
