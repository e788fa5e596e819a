"""Bytes to weights and back."""

from sat_lightning.checkpoint.pretrained import AutoModel, LoadReport, load_checkpoint, save_pretrained

__all__ = ["AutoModel", "LoadReport", "load_checkpoint", "save_pretrained"]
