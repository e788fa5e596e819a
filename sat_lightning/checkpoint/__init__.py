"""Bytes to weights and back."""

import sys

from sat_lightning.checkpoint.adapters import load_adapter, save_adapter
from sat_lightning.checkpoint.hub import known_models, sat_home
from sat_lightning.checkpoint.huggingface import save_huggingface
from sat_lightning.checkpoint.loading import load_checkpoint
from sat_lightning.checkpoint.merge import merge_adapters
from sat_lightning.checkpoint.native import save_pretrained
from sat_lightning.checkpoint.peft import load_peft, save_peft
from sat_lightning.checkpoint.pretrained import AutoModel, from_pretrained
from sat_lightning.checkpoint.report import LoadReport
from sat_lightning.checkpoint.sat import save_sat
from sat_lightning.model.persistence import provide_persistence

__all__ = [
    "AutoModel",
    "LoadReport",
    "from_pretrained",
    "known_models",
    "load_adapter",
    "load_checkpoint",
    "load_peft",
    "merge_adapters",
    "sat_home",
    "save_adapter",
    "save_huggingface",
    "save_peft",
    "save_pretrained",
    "save_sat",
]

provide_persistence(sys.modules[__name__])
