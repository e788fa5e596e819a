"""From a trained model to new text."""

from sat_lightning.generation.sampling import sample_continuation, sample_token

__all__ = ["sample_continuation", "sample_token"]
