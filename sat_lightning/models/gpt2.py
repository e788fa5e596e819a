"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

What differs from the plain transformer:
- the mask is causal;
- the head has its own weights (`mixins.gpt2-final.lm_head`), where the paper ties them to the word embeddings.
"""

from __future__ import annotations

from typing import Any

from sat_lightning.config import TransformerConfig
from sat_lightning.mixins import LMHeadMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.nn import Transformer


@register_model
class GPT2Model(BaseModel):
    """A causal decoder with learned positions, norms before each block, tanh-GELU.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    default_mask = "causal"

    def __init__(
        self,
        config: TransformerConfig,
        transformer: Transformer | None = None,
        **transformer_overrides: Any,
    ) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        self.add_mixin("gpt2-final", LMHeadMixin(self.config))
