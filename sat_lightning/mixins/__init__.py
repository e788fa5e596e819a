"""One idea, one file: changes that fit any model."""

from sat_lightning.mixins.lm_head import LMHeadMixin

__all__ = ["LMHeadMixin"]
