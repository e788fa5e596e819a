"""One family, one file: what differs from the plain transformer."""

from sat_lightning.model import BaseModel
from sat_lightning.models.gpt2 import GPT2Model

__all__ = ["BaseModel", "GPT2Model"]
