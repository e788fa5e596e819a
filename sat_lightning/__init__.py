"""One backbone for every transformer; write only the difference, as a mixin; train it anywhere with Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sat_lightning.checkpoint import AutoModel
    from sat_lightning.config import TransformerConfig
    from sat_lightning.hooks import computes_loss, non_conflict, replacable, replaceable
    from sat_lightning.model import BaseMixin, BaseModel
    from sat_lightning.training import SATDataModule, SATLightningModule

__version__ = "0.1.0"

__all__ = [
    "AutoModel",
    "BaseMixin",
    "BaseModel",
    "SATDataModule",
    "SATLightningModule",
    "TransformerConfig",
    "computes_loss",
    "non_conflict",
    "replacable",
    "replaceable",
]

# Every name is loaded when first asked for: `--help` needs none, and the model needs no lightning.
_LAZY = {
    "AutoModel": "sat_lightning.checkpoint",
    "BaseMixin": "sat_lightning.model",
    "BaseModel": "sat_lightning.model",
    "SATDataModule": "sat_lightning.training",
    "SATLightningModule": "sat_lightning.training",
    "TransformerConfig": "sat_lightning.config",
    "computes_loss": "sat_lightning.hooks",
    "non_conflict": "sat_lightning.hooks",
    "replacable": "sat_lightning.hooks",
    "replaceable": "sat_lightning.hooks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sat_lightning' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
