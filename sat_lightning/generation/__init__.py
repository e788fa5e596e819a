"""From a trained model to new text; each name is loaded when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lightning.generation.beam import BeamSearchStrategy
    from sat_lightning.generation.beam_scoring import PlainBeamScoring, SatBeamScoring
    from sat_lightning.generation.choices import ChoiceScores, score_choices
    from sat_lightning.generation.constraints import AllowedTokens, Grammar, json_schema, regex
    from sat_lightning.generation.engine import generate, stream
    from sat_lightning.generation.entropy_filter import IterativeEntfilterStrategy
    from sat_lightning.generation.filling import filling_sequence, stream_filling_sequence
    from sat_lightning.generation.metrics import PerplexityMetric
    from sat_lightning.generation.options import Generation, GenerationOptions, Streamed
    from sat_lightning.generation.perplexity import evaluate_perplexity
    from sat_lightning.generation.processors import top_k_logits
    from sat_lightning.generation.sampling import draw_token, sample_continuation, sample_token
    from sat_lightning.generation.scoring import TextScore, score
    from sat_lightning.generation.slots import get_masks_and_position_ids_default, get_masks_and_position_ids_glm
    from sat_lightning.generation.speculative import SpeculationCounts, generate_speculatively
    from sat_lightning.generation.state import DecodingState, Hypothesis
    from sat_lightning.generation.strategies import BaseStrategy, greedy

__all__ = [
    "AllowedTokens",
    "BaseStrategy",
    "BeamSearchStrategy",
    "ChoiceScores",
    "DecodingState",
    "Generation",
    "GenerationOptions",
    "Grammar",
    "Hypothesis",
    "IterativeEntfilterStrategy",
    "SpeculationCounts",
    "generate_speculatively",
    "PerplexityMetric",
    "PlainBeamScoring",
    "SatBeamScoring",
    "Streamed",
    "TextScore",
    "draw_token",
    "evaluate_perplexity",
    "filling_sequence",
    "generate",
    "get_masks_and_position_ids_default",
    "get_masks_and_position_ids_glm",
    "greedy",
    "json_schema",
    "regex",
    "sample_continuation",
    "sample_token",
    "score",
    "score_choices",
    "stream",
    "stream_filling_sequence",
    "top_k_logits",
]

# The names of each module.
_LAZY = {
    "beam": "BeamSearchStrategy",
    "beam_scoring": "PlainBeamScoring SatBeamScoring",
    "choices": "ChoiceScores score_choices",
    "constraints": "AllowedTokens Grammar json_schema regex",
    "engine": "generate stream",
    "filling": "filling_sequence stream_filling_sequence",
    "metrics": "PerplexityMetric",
    "entropy_filter": "IterativeEntfilterStrategy",
    "options": "Generation GenerationOptions Streamed",
    "perplexity": "evaluate_perplexity",
    "processors": "top_k_logits",
    "sampling": "draw_token sample_continuation sample_token",
    "scoring": "TextScore score",
    "slots": "get_masks_and_position_ids_default get_masks_and_position_ids_glm",
    "speculative": "SpeculationCounts generate_speculatively",
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
