"""Nothing, in the place of a mixin."""

from __future__ import annotations

from sat_lightning.config import TransformerConfig
from sat_lightning.model import BaseMixin


class NoMixin(BaseMixin):
    """Among the `mixins` of a task: remove the one of that name, so that another can take its seam.

    Args:
        config: the model's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
