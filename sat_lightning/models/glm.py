"""GLM (Du et al. 2021, arXiv:2103.10360).

What differs from the plain transformer:
- positions have two rows `[b, 2, s]`: the place in the text, and the place inside a blank, which has a table of its own
  (`mixins.block_position_embedding`);
- where `sop_token_id` and `mask_token_ids` are known, positions and mask follow from the ids: context sees context,
  what fills the blank sees the context and what came before. Otherwise a text is all context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.model import BaseMixin, BaseModel, register_model
from sat_lightning.nn import Transformer
from sat_lightning.nn.blank_filling import blank_filling, require_whole_text
from sat_lightning.nn.linear import Embedding, normal_init
from sat_lightning.nn.masks import MaskLike


@dataclass(frozen=True, kw_only=True)
class GLMConfig(TransformerConfig):
    """GLM's options; those of its training data are kept in `extra`."""

    sop_token_id: int | None = None
    """The token after which a blank is filled. Default: unknown, a text is all context."""
    mask_token_ids: tuple[int, ...] = ()
    """Tokens that can be the blank ([gMASK], [MASK], [sMASK]), the one that decides first."""


class BlockPositionMixin(BaseMixin):
    """Add two position embeddings, of the place in the text and of the place inside a blank.

    Args:
        config: gives the sizes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        init = normal_init(config.init_method_std)
        self.block_position_embeddings = Embedding(config.max_sequence_length, config.hidden_size, init)

    def position_embedding_forward(self, position_ids: Tensor | None, **kw: Any) -> Tensor:
        """Look up `[b|1, 2, s]`, to `[b|1, s, c]`."""
        if position_ids is None or position_ids.dim() != 3 or position_ids.shape[1] != 2:
            found = None if position_ids is None else list(position_ids.shape)
            raise InputError(f"position_ids has shape {found}; GLM needs [batch, 2, length]: text row, blank row.")
        text, blank = position_ids.unbind(1)
        return self.transformer.position_embedding_forward(text) + self.block_position_embeddings(blank)


@register_model
class GLMModel(BaseModel):
    """A transformer that fills blanks: positions `[b, 2, s]`, mask `[b, 1, s, s]`.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = GLMConfig
    config: GLMConfig

    def __init__(self, config: GLMConfig, transformer: Transformer | None = None, **transformer_overrides: Any) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        self.add_mixin("block_position_embedding", BlockPositionMixin(self.config))

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor:
        """Return both rows, `[b|1, 2, s]`."""
        if self.config.sop_token_id is not None:
            self.check_length(input_ids.shape[1])
            return self._lay_out(input_ids, kw)[0]
        places = super().make_position_ids(input_ids, **kw)
        assert places is not None
        return torch.stack([places, torch.zeros_like(places)], dim=1)

    def make_attention_mask(self, input_ids: Tensor, **kw: Any) -> MaskLike:
        """Return the mask of the blank where it is known, else full."""
        return None if self.config.sop_token_id is None else self._lay_out(input_ids, kw)[1]

    def _lay_out(self, input_ids: Tensor, kw: dict[str, Any]) -> tuple[Tensor, Tensor]:
        require_whole_text(kw)
        start = self.config.sop_token_id
        assert start is not None
        return blank_filling(input_ids, start_id=start, mask_ids=self.config.mask_token_ids)
