"""Embeddings that say which kind of token stands at a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.hooks import non_conflict
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Embedding, normal_init


class TokenTypesMixin(BaseMixin):
    """Add an embedding of each token's type to its word: BERT's sentence A or B.

    Args:
        config: gives the width.
        num_types: rows of the table.
    """

    def __init__(self, config: TransformerConfig, num_types: int) -> None:
        super().__init__()
        self.type_embeddings = Embedding(num_types, config.hidden_size, normal_init(config.init_method_std))

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, old_impl: Callable[..., Tensor], token_type_ids: Tensor | None = None, **kw: Any
    ) -> Tensor:
        """Add types: `token_type_ids` is `[b, s]`; without it every token is of type 0."""
        words = old_impl(input_ids, token_type_ids=token_type_ids, **kw)
        table = self.type_embeddings
        return words + (table.weight[0] if token_type_ids is None else table(token_type_ids))
