"""From a trained model to new text; each name is loaded when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lightning.generation.engine import generate, stream
    from sat_lightning.generation.options import Generation, GenerationOptions, Streamed
    from sat_lightning.generation.processors import top_k_logits
    from sat_lightning.generation.sampling import draw_token, sample_continuation, sample_token
    from sat_lightning.generation.state import DecodingState, Hypothesis
    from sat_lightning.generation.strategies import BaseStrategy, greedy

__all__ = [
    "BaseStrategy",
    "DecodingState",
    "Generation",
    "GenerationOptions",
    "Hypothesis",
    "Streamed",
    "draw_token",
    "generate",
    "greedy",
    "sample_continuation",
    "sample_token",
    "stream",
    "top_k_logits",
]

# The names of each module.
_LAZY = {
    "engine": "generate stream",
    "options": "Generation GenerationOptions Streamed",
    "processors": "top_k_logits",
    "sampling": "draw_token sample_continuation sample_token",
    "state": "DecodingState Hypothesis",
    "strategies": "BaseStrategy greedy",
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names.split():
            return getattr(importlib.import_module(f"sat_lightning.generation.{module}"), name)
    raise AttributeError(f"module 'sat_lightning.generation' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
