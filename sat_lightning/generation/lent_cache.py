"""A cache lent to a model while it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sat_lightning.generation.runner import LastTokenMixin
from sat_lightning.hooks import HookTable, resolve_hooks
from sat_lightning.mixins import CachedAutoregressiveMixin
from sat_lightning.model import BaseMixin, BaseModel

#: The name under which SAT's users add the cache.
CACHE_NAME = "auto-regressive"


class LentCache:
    """A model's hooks with a cache among them, for the time of a call only: between two calls the model is its own.

    Of a text that is fed only the last token is scored.

    Args:
        model: one without a cache of its own gets one; one that is no `BaseModel` is left alone.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.own: HookTable | None = None
        self.table: HookTable | None = None

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Put the hooks in place, and the model in eval mode; leave it as it was, also after an error."""
        model = self.model
        if not isinstance(model, BaseModel):
            yield
            return
        if model.hooks is not self.own:
            self.own, self.table = model.hooks, self._with_cache(model)
        training = [module for module in model.modules() if module.training] if model.training else []
        try:
            object.__setattr__(model, "hooks", self.table)
            for module in training:
                module.training = False
            yield
        finally:
            object.__setattr__(model, "hooks", self.own)
            for module in training:
                module.training = True

    @staticmethod
    def _with_cache(model: BaseModel) -> HookTable:
        own: dict[str, Any] = dict(model.mixins.items())
        mixins = {name: mixin for name, mixin in own.items() if not mixin._is_silent}
        lent: dict[str, BaseMixin] = {"generation-last-token": LastTokenMixin()}
        if CACHE_NAME not in mixins and not any(isinstance(x, CachedAutoregressiveMixin) for x in mixins.values()):
            lent[CACHE_NAME] = CachedAutoregressiveMixin()
        for mixin in lent.values():
            object.__setattr__(mixin, "transformer", model.transformer)
        return resolve_hooks(model.transformer, model, {**mixins, **lent})
