"""One small example of every method of fine-tuning, for matrices of methods and whatever they must bear.

Import `METHODS`; add a row, and every matrix and the table of pairs tests it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sat_lightning import BaseMixin, TransformerConfig, mixins
from sat_lightning.model import AnyModel, BaseModel, ComposedModel
from tests.families import FAMILIES

#: The families of the matrix, as rows of `FAMILIES`.
MATRIX_FAMILIES = ("gpt2", "bert", "llama", "t5", "vit")
_BY_EACH_PART = ("encoder", "decoder")


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    make: Callable[[TransformerConfig], BaseMixin]
    starts_as_base: bool = True
    """Whether adding it changes no output, bit for bit."""
    starts_near_base: bool = False
    """Whether it changes outputs by rounding only."""
    is_head: bool = False
    """Whether it answers for the model, and trains without freezing: of an encoder and decoder, the decoder has it."""
    replaces_head: bool = False
    """Whether the family's own head has to go."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords of a call."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Family -> a part of the error by which it is refused there."""

    def add(self, model: AnyModel, name: str = "method", seed: int = 0) -> list[str]:
        """Add it wherever it belongs; returns the names under which it stands."""
        torch.manual_seed(seed)
        if not isinstance(model, ComposedModel):
            self._add_to_part(model, name)
            return [name]
        parts = _BY_EACH_PART[1:] if self.is_head else _BY_EACH_PART
        for part in parts:
            self._add_to_part(model.parts[part], name)
        return [f"{part}.{name}" for part in parts]

    def _add_to_part(self, model: BaseModel, name: str) -> None:
        if self.replaces_head:
            for owner in model.hooks.origins["final_forward"]:
                if owner in model.mixins and not hasattr(model.mixins[owner], "is_added_by_test"):
                    model.del_mixin(owner)
        mixin = self.make(model.config)
        mixin.is_added_by_test = True
        model.add_mixin(name, mixin, reinit=True)


def stir(model: AnyModel, names: list[str], seed: int = 1) -> None:
    """Move the parameters of mixins away from their first values, so that a fault shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for parameter in model.get_mixin(name).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


METHODS: dict[str, Method] = {
    "prefix": Method(lambda c: mixins.PrefixTuningMixin(c, prefix_len=3), starts_as_base=False),
    "prefix-mlp": Method(
        lambda c: mixins.PrefixTuningMixin(c, prefix_len=3, projection_size=8), starts_as_base=False
    ),
    "prompt": Method(lambda c: mixins.PromptTuningMixin(c, prompt_len=3), starts_as_base=False),
    "adapter": Method(lambda c: mixins.AdapterMixin(c, adapter_hidden=4)),
    "adapter-parallel": Method(lambda c: mixins.AdapterMixin(c, adapter_hidden=4, is_parallel=True)),
    "ffadd": Method(lambda c: mixins.FFADDMixin(c, r=4)),
    "lora": Method(lambda c: mixins.LoraMixin(c, rank=2)),
    "lora-all": Method(lambda c: mixins.LoraMixin(c, rank=2, target=["attention", "mlp"], use_rslora=True)),
    "pissa": Method(lambda c: mixins.LoraMixin(c, rank=2, init="pissa"), starts_as_base=False, starts_near_base=True),
    "dora": Method(lambda c: mixins.DoraMixin(c, rank=2), starts_as_base=False, starts_near_base=True),
    "ia3": Method(mixins.IA3Mixin),
    "bitfit": Method(
        mixins.BitFitMixin,
        refused={"llama": "LLaMAModel has no parameter", "t5": "BaseModel has no parameter"},
    ),
    "layernorm": Method(mixins.LayerNormTuningMixin),
    "mlp-head": Method(lambda c: mixins.MLPHeadMixin(c, 6, 3), starts_as_base=False, is_head=True, replaces_head=True),
    "lm-head": Method(mixins.LMHeadMixin, starts_as_base=False, is_head=True, replaces_head=True),
    "task-heads": Method(
        lambda c: mixins.TaskHeadsMixin(c, {"topic": 3}, pooling="mean"), starts_as_base=False, is_head=True,
        call={"task": "topic"},
    ),
}  # fmt: skip


def build(family: str, method: str | None = None, **changes: Any) -> tuple[AnyModel, list[str]]:
    """Build a family's tiny model, with a method whose parameters have moved; and the names of its mixins."""
    model = FAMILIES[family].build(**changes)
    if method is None:
        return model, []
    names = METHODS[method].add(model)
    stir(model, names)
    return model, names
