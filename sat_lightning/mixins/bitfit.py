"""BitFit: the biases train, and nothing else."""

from __future__ import annotations

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins.tuning import BaseTuningMixin


class BitFitMixin(BaseTuningMixin):
    """Train the biases of the base (Ben Zaken et al. 2021, arXiv:2106.10199); a model without any refuses it.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tuned_parameters = (r"(^|\.)bias$",)
