"""Models made of models: an encoder with a decoder, a teacher with a student."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import HookError, nearest
from sat_lightning.hooks import HookTable, explain
from sat_lightning.model.base import BaseModel, read_config
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.mixin import BaseMixin
from sat_lightning.model.persistence import Persistent


class ComposedModel(Persistent, nn.Module):
    """Several models under one roof, each with its backbone, its hooks and its mixins.

    A mixin is named with its part: `model.add_mixin("decoder.lora", mixin)` is `model.decoder.add_mixin("lora",
    mixin)`. A subclass sets its parts as attributes; their names are the prefixes of the state dict.

    Args:
        config: the architecture of the whole.
    """

    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig
    #: How Hugging Face names and lays out this family's tensors.
    key_maps: ClassVar[tuple[KeyMap, ...]] = ()

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = read_config(config, self.config_class)

    @property
    def parts(self) -> dict[str, BaseModel | ComposedModel]:
        """The models this one is made of, by name."""
        return {name: part for name, part in self.named_children() if isinstance(part, (BaseModel, ComposedModel))}

    @property
    def hooks(self) -> HookTable:
        """The table of the part that answers last, which decides what the whole can compute."""
        return list(self.parts.values())[-1].hooks

    @property
    def hook_origins(self) -> dict[str, str]:
        """Who answers at each seam of each part: `{"decoder.attention_fn": "prefix -> default", ...}`."""
        parts = self.parts.items()
        return {f"{name}.{seam}": chain for name, part in parts for seam, chain in part.hook_origins.items()}

    def explain_hooks(self) -> str:
        """Return the table of every seam, part by part."""
        texts = [
            f"{name}\n{part.explain_hooks() if isinstance(part, ComposedModel) else explain(part.hooks)}"
            for name, part in self.parts.items()
        ]
        return "\n\n".join(texts)

    def add_mixin(self, name: str, new_mixin: BaseMixin, reinit: bool = False) -> None:
        """Add a mixin to a part; see `BaseModel.add_mixin`.

        Args:
            name: `<part>.<name>`.
            new_mixin: the mixin.
            reinit: call its `reinit` at once.

        Raises:
            HookError: if there is no such part, or the part refuses the mixin.
        """
        part, rest = self._part_of(name)
        part.add_mixin(rest, new_mixin, reinit=reinit)

    def del_mixin(self, name: str) -> None:
        """Remove the mixin `<part>.<name>`; see `BaseModel.del_mixin`."""
        part, rest = self._part_of(name)
        part.del_mixin(rest)

    def get_mixin(self, name: str) -> Any:
        """Return the mixin `<part>.<name>`; see `BaseModel.get_mixin`."""
        part, rest = self._part_of(name)
        return part.get_mixin(rest)

    def reinit(self, mixin_names: list[str] | None = None) -> None:
        """Call `reinit` of the mixins named `<part>.<name>`, or of all."""
        if mixin_names is None:
            for part in self.parts.values():
                part.reinit()
        for name in mixin_names or ():
            part, rest = self._part_of(name)
            part.reinit([rest])

    def _part_of(self, name: str) -> tuple[BaseModel | ComposedModel, str]:
        part, _, rest = name.partition(".")
        if part not in self.parts or not rest:
            known = [f"{known}.{rest or name}" for known in self.parts]
            raise HookError(
                f"'{name}' names no mixin of a {type(self).__name__}: say of which part, as in "
                f"{', '.join(repr(k) for k in known)}.{nearest(name, known)}"
            )
        return self.parts[part], rest


def owner_of(model: BaseModel | ComposedModel, name: str) -> BaseModel:
    """Return the part that holds, or would hold, the mixin of a name: `decoder.lora` is the decoder's.

    Raises:
        HookError: if there is no such part.
    """
    while isinstance(model, ComposedModel):
        model, name = model._part_of(name)
    return model
