"""What methods share that adapt linears where they stand: which ones, in and out of the weights, and who may go first.

The base keeps its modules and the names of its parameters; an adapter's parameters are
`mixins.<name>.<place>...`, with the place named as in `mixins.places`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, ConfigError, HookError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins.places import Place, Slot, choose, nested
from sat_lightning.mixins.quantized import dense_weight, is_quantized, make_dense, replace_linear
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.model import BaseMixin

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel

Kept = tuple[Tensor, Tensor | None]


class Adapter(nn.Module):
    """What is learnt about one linear.

    Args:
        place: the linear.
        slots: its adapted rows.
    """

    def __init__(self, place: Place, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.place_name, self.slots, self.is_table = place.name, tuple(slots), isinstance(place.module, nn.Embedding)
        self.in_features, self.out_features = place.in_features, place.out_features

    @abstractmethod
    def merged(self, weight: Tensor, bias: Tensor | None, scale: float) -> Kept:
        """Return the weight `[out, in]` and the bias that do in fp32 what base and adapter do."""

    def reset(self, module: nn.Module) -> None:
        """Set initial values that depend on the trained base."""


def learned(place: Place, *shape: int) -> nn.Parameter:
    """Return an empty parameter on the device of a linear; never below fp32, unless that is torch's default."""
    weight: Any = place.module.weight
    is_wide = weight.dtype in (torch.float32, torch.float64)
    dtype = weight.dtype if is_wide else torch.get_default_dtype()
    return nn.Parameter(torch.empty(*shape, device=weight.device, dtype=dtype))


class WeightTuningMixin(TuningMixin):
    """Adapts linears through `linear_forward`; which ones is settled when the mixin is added to a model.

    Args:
        config: the model's.
        target: regular expressions over the names of linears; see `mixins.places`.
    """

    #: Whether it adds to what the linear gives, so that it stacks with any other in any order.
    is_additive: ClassVar[bool] = True
    #: The number by which `adapter_ids` of a call means it: how many were added to the model before.
    adapter_id: int = 0

    def __init__(self, config: TransformerConfig, target: str | Sequence[str]) -> None:
        super().__init__()
        self.target = target
        self._adapters: dict[nn.Module, Adapter] = {}
        self._kept: dict[nn.Module, Kept] = {}
        self._quantized: dict[nn.Module, nn.Module] = {}

    @abstractmethod
    def make_adapter(self, place: Place, slots: list[Slot]) -> Adapter:
        """Build the adapter of one linear."""

    def added_to(self, model: BaseModel) -> None:
        """Find the linears, and build an adapter for each the first time.

        Raises:
            ConfigError: if `target` matches nothing, or the adapters were built for another architecture.
            HookConflictError: if another method adapts one of them in a way that does not stack.
        """
        if self._kept:
            raise HookError(f"This {type(self).__name__} is merged into another backbone. Build a new one.")
        chosen = choose(model, self.target)
        others: list[tuple[str, Any]] = list(model.mixins.items())
        for name, other in others:
            held = other._adapters if isinstance(other, WeightTuningMixin) and not other._kept else {}
            self.refuse_beside(name, other, [held[place.module] for place, _ in chosen if place.module in held])
        built = {adapter.place_name: adapter for adapter in self.modules() if isinstance(adapter, Adapter)}
        if not built:
            built = {place.name: self.make_adapter(place, slots) for place, slots in chosen}
            for name, adapter in built.items():
                nested(self, name, adapter)
        shapes = {place.name: (place.in_features, place.out_features) for place, _ in chosen}
        if shapes != {name: (adapter.in_features, adapter.out_features) for name, adapter in built.items()}:
            raise ConfigError(f"This {type(self).__name__} was built for a model of other linears. Build a new one.")
        self._adapters = {place.module: built[place.name] for place, _ in chosen}
        ids = (other.adapter_id for _, other in others if isinstance(other, WeightTuningMixin))
        self.adapter_id = 1 + max(ids, default=-1)
        # Where no table is adapted the seam stays free, for those who take it whole.
        if not any(adapter.is_table for adapter in built.values()):
            self.word_embedding_forward: Any = None

    def refuse_beside(self, name: str, other: BaseMixin, shared: Sequence[Adapter]) -> None:
        """Refuse to be added after another mixin, where the two do not stack.

        Args:
            name: its name.
            other: a mixin that the model has.
            shared: its adapters of linears that this one is to adapt too.

        Raises:
            HookConflictError: with the cure.
        """

    @non_conflict
    def linear_forward(self, x: Tensor, *, linear: nn.Module, old_impl: Any, **kw: Any) -> Tensor:
        """Let the linear's adapter have its say: `[..., in]` to `[..., out]`."""
        adapter = self._adapters.get(linear)
        if adapter is None:
            return old_impl(x, linear=linear, **kw)
        return self.adapt(adapter, x, linear=linear, old_impl=old_impl, **kw)

    @abstractmethod
    def adapt(self, adapter: Any, x: Tensor, *, linear: nn.Module, old_impl: Any, **kw: Any) -> Tensor:
        """Run the linear with its adapter."""

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Set initial values that depend on the base, now that it is loaded."""
        for module, adapter in self._adapters.items():
            adapter.reset(module)

    @property
    def is_merged(self) -> bool:
        """Whether the weights of the base hold what was learnt."""
        return bool(self._kept)

    @torch.no_grad()
    def merge(self) -> None:
        """Put what was learnt, at the present `scale`, into the weights of the base.

        The forward is then that of a plain model. The weights of before are kept for `unmerge`, until `del_mixin`.

        Raises:
            HookError: if it is merged, disabled or not added, or would not be right; the message has the cure.
        """
        self._refuse_merge()
        merged = {}
        for module, adapter in self._adapters.items():
            bias, weight = getattr(module, "bias", None), dense_weight(module)
            merged[module] = adapter.merged(weight.float(), _float(bias), self.scale)
            self._kept[module] = weight.clone(), None if bias is None else bias.clone()
        for module, values in merged.items():
            _fill(self._dense(module), values)
        super()._set_silent(True)

    def _dense(self, module: nn.Module) -> nn.Module:
        """Return a linear that can take any weight: itself, or what stands in for one of 4 bits from now on."""
        if not is_quantized(module):
            return module
        values = self._kept.pop(module)
        dense = make_dense(module, values[0])
        replace_linear(self._owner, module, dense)  # type: ignore[arg-type]
        self._kept[dense], self._quantized[dense] = values, module
        return dense

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights of the base, byte by byte, and take part in the forward again.

        Raises:
            HookError: if it is not merged, or the weights were changed since.
        """
        if not self._kept:
            raise HookError(f"This {type(self).__name__} is not merged.")
        for module, (weight, bias) in self._kept.items():
            expected = self._adapters[module].merged(weight.float(), _float(bias), self.scale)
            now: tuple[Any, Any] = module.weight, getattr(module, "bias", None)
            is_same = all(a is None or torch.equal(a, b.to(a.dtype)) for a, b in zip(now, expected, strict=True))
            if not is_same:
                raise HookError(
                    f"{self._adapters[module].place_name} has changed since the merge: by another merge, which has to "
                    "be undone first, by training or by loading. To unmerge would lose that."
                )
        for module, values in self._kept.items():
            if module in self._quantized:
                replace_linear(self._owner, module, self._quantized[module])  # type: ignore[arg-type]
            else:
                _fill(module, values)
        self._kept, self._quantized = {}, {}
        self._set_silent(False)

    def _set_silent(self, is_silent: bool) -> None:
        if self._kept:
            raise HookError(
                f"This {type(self).__name__} is merged: the weights of the base hold it. Call unmerge() first."
            )
        super()._set_silent(is_silent)

    def _refuse_merge(self) -> None:
        what = f"This {type(self).__name__}"
        if self._owner is None or self._kept or not self.enabled:
            state = "is merged already" if self._kept else "is disabled; enable()" if self._owner else "is not added"
            raise HookError(f"{what} {state}{' it first' if self._owner else ' to a model'}.")
        if any(hasattr(module.weight, "ds_tensor") for module in self._adapters):
            raise HookError(
                f"{what} cannot merge under ZeRO-3, where no rank has a whole weight. Merge the saved file."
            )
        wrapping = list(self._owner.mixins.items())
        before = wrapping[: [mixin for _, mixin in wrapping].index(self)]
        for name, other in before:
            if not isinstance(other, WeightTuningMixin):
                if "linear_forward" in dir(other) and self._adapters:
                    raise HookError(
                        f"{what} adapts what '{name}' makes of the output of linears, which no weight can hold. "
                        "Keep it as an adapter."
                    )
            elif not other._kept and not (self.is_additive and other.is_additive):
                if other._adapters.keys() & self._adapters.keys():
                    raise HookError(
                        f"{what} acts on what '{name}' makes of the same linears. Merge '{name}' first, or remove it."
                    )
        head = self._owner.hooks.origins["final_forward"]
        if any(adapter.is_table for adapter in self._adapters.values()) and head[-1] == "default":
            raise HookError(
                f"{what} adapts word_embeddings, which score the words too: merged, it would change the head. Keep "
                "it as an adapter, or give the model a head of its own (LMHeadMixin)."
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._kept:
            raise CheckpointError(
                f"mixin '{prefix.rstrip('.')}' is merged: saved beside the merged weights it would count twice. Call "
                "unmerge(), or del_mixin for a plain model."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


@contextmanager
def whole(*parameters: Any) -> Iterator[None]:  # noqa: ANN401
    """Have parameters whole that ZeRO-3 has split over the ranks, to read and to fill; every rank must come here."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    for parameter in split:
        parameter.all_gather()
    try:
        yield
    finally:
        for parameter in split:
            parameter.partition(has_been_updated=True)


def rows_of(adapter_ids: Tensor | None, own: int, adapter: Adapter, x: Tensor) -> Tensor | None:
    """Return 1 for the samples of a batch that an adapter is for, 0 for others, to be multiplied with `x`-like tensors.

    Raises:
        ConfigError: where samples cannot be told apart.
    """
    if adapter_ids is None:
        return None
    if x.shape[0] != adapter_ids.shape[0]:
        raise ConfigError(
            f"adapter_ids has {adapter_ids.shape[0]} entries, and {adapter.place_name} reads {list(x.shape)}, without "
            "an axis of samples (tokens of an expert have none). Leave such linears out of target."
        )
    return (adapter_ids == own).view(-1, *[1] * (x.dim() - 1))


def check_patterns(patterns: Mapping[str, Any], used: set[str], option: str) -> None:
    """Refuse patterns that no adapted linear matched."""
    if unused := [text for text in patterns if text not in used]:
        raise ConfigError(f"{option}: '{unused[0]}' matches no linear that `target` chose.")


def _float(bias: Any) -> Tensor | None:  # noqa: ANN401
    return None if bias is None else bias.detach().float()


def _fill(module: nn.Module, values: Kept) -> None:
    weight, bias = values
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)
