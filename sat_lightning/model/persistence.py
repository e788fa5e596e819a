"""Where a model finds who saves and loads it.

`model.save_pretrained(folder)` must be a method, and the code that knows file formats lies above this layer and knows
the families. So the layer above fills a slot: a `Persistence` is what it must be able to do, and `PROVIDER` names the
package that fills the slot when it is imported, which happens at the first use, never while a model is built. Without
that package everything but saving and loading works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from sat_lightning.errors import CheckpointError

if TYPE_CHECKING:
    from sat_lightning.model.base import BaseModel

PROVIDER = "sat_lightning.checkpoint"


class Persistence(Protocol):
    """Saves and loads models."""

    def from_pretrained(self, model_class: type[BaseModel], name: Any, **options: Any) -> BaseModel:
        """Build a class from a checkpoint and load it."""

    def save_pretrained(self, model: BaseModel, folder: Any, **options: Any) -> None:
        """Write a model folder."""


_slot: list[Persistence] = []


def provide_persistence(persistence: Persistence) -> None:
    """Fill the slot; a later call replaces the earlier one."""
    _slot[:] = [persistence]


def persistence() -> Persistence:
    """Return who saves and loads.

    Raises:
        CheckpointError: if no such package is installed.
    """
    if not _slot:
        try:
            importlib.import_module(PROVIDER)
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"Nothing here saves or loads models: {error}. Reinstall sat_lightning whole."
            ) from error
    return _slot[0]
