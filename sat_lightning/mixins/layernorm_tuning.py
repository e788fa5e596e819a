"""The norms train, and nothing else."""

from __future__ import annotations

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins.tuning import BaseTuningMixin


class LayerNormTuningMixin(BaseTuningMixin):
    """Train weights and biases of all norms of the base (Zhao et al. 2023, arXiv:2312.11420).

    Args:
        config: the model's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tuned_parameters = (r"(norm|ffn_ln)[^.]*(\.\d+)?\.(weight|bias)$",)
