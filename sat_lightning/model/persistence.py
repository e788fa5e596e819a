"""Where a model finds who saves and loads it.

`model.save_pretrained(folder)` must be a method, and the code that knows file formats lies above this layer and knows
the families. So the layer above fills a slot: a `Persistence` is what it must be able to do, and `PROVIDER` names the
package that fills the slot when it is imported, which happens at the first use, never while a model is built. Without
that package everything but saving and loading works.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol, TypeVar

from sat_lightning.errors import CheckpointError

PROVIDER = "sat_lightning.checkpoint"


class Persistence(Protocol):
    """Saves and loads models."""

    def from_pretrained(self, model_class: Any, name: Any, **options: Any) -> Any:
        """Build a class from a checkpoint and load it."""

    def save_pretrained(self, model: Any, folder: Any, **options: Any) -> None:
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


T = TypeVar("T", bound="Persistent")


class Persistent:
    """The methods of a model that read and write checkpoints."""

    #: What `from_pretrained` loaded and what it did not; None for a model that was built otherwise.
    load_report: Any = None

    @classmethod
    def from_pretrained(cls: type[T], name: str | os.PathLike[str], **options: Any) -> T:
        """Build this class with the architecture of a checkpoint, and load its weights.

        Args:
            name: a folder (native, SAT's or Hugging Face's) or file, a known name, `hf://organisation/name`, or a URL.
            **options: fields of the configuration to change (as a mapping, too: `overrides`), and:
                build_only: build without reading weights.
                dtype: of the parameters; "auto" is the file's. Default: torch's.
                strict, may_miss, may_mismatch, ignore, reinit: what may differ, see `checkpoint.load_checkpoint`.
                step, prefix, mixin_names, interleaved_qkv: what to read, see `checkpoint.loading.Source`.
                resize_vocab, resize_positions, make_vocab_size_divisible_by: see `checkpoint.resize.Resize`.
                home, url, offline: where to find it, see `checkpoint.hub.locate`.

        Returns:
            The model, in evaluation mode; `model.load_report` says what was loaded.

        Raises:
            CheckpointError: if it cannot be read, or its weights do not fit.
            ConfigError: if an option is neither of these nor a field.
        """
        return persistence().from_pretrained(cls, name, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that `from_pretrained` reads, added mixins included; see `checkpoint.save_pretrained`."""
        persistence().save_pretrained(self, folder, **options)
