"""What methods share that adapt linears where they stand: which ones, in and out of the weights, and who may go first.

The base keeps its modules and the names of its parameters; an adapter's parameters are
`mixins.<name>.<place>...`, with the place named as in `mixins.places`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError, ConfigError, HookError
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins.linear_adapter import Adapter, Kept
from sat_lightning.mixins.places import Place, Slot, choose, nested
from sat_lightning.mixins.quantized import dense_weight, is_quantized, make_dense, replace_linear
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.model import BaseMixin

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel


class WeightTuningMixin(TuningMixin):
    """Adapts linears through `linear_forward`; which ones is settled when the mixin is added to a model.

    Args:
        config: the model's.
        target: regular expressions over the names of linears; see `mixins.places`.
    """

    is_of_one_model = True
    tells_rows_apart = True
    #: Whether it adds to what the linear gives, so that it stacks with any other in any order.
    is_additive: ClassVar[bool] = True

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
        super().added_to(model)
        # Where no table is adapted the seam stays free, for those who take it whole.
        if not any(adapter.is_table for adapter in built.values()):
            self.word_embedding_forward: Any = None

    def _free_state(self) -> dict[str, Any]:
        return super()._free_state() | ({} if self._kept else {"_adapters": {}})

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
        try:
            for module, adapter in list(self._adapters.items()):
                bias, weight = getattr(module, "bias", None), dense_weight(module)
                values = adapter.merged(_wide(weight), _wide(bias), self.scale)
                self._kept[module] = weight.clone(), None if bias is None else bias.detach().clone()
                _fill(self._dense(module), values)
        except BaseException:
            self._restore()
            raise
        super()._set_silent(True)

    def _dense(self, module: nn.Module) -> nn.Module:
        """Return a linear that can take any weight: itself, or what stands in for one of 4 bits from now on."""
        if not is_quantized(module):
            return module
        weight, bias = values = self._kept.pop(module)
        dense = make_dense(module, weight.clone(), None if bias is None else nn.Parameter(bias.clone(), False))
        self._kept[dense], self._quantized[dense] = values, module
        replace_linear(self._owner, module, dense)  # type: ignore[arg-type]
        return dense

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights of the base, byte by byte, and take part in the forward again.

        Raises:
            HookError: if it is not merged, or the weights were changed since.
        """
        if not self._kept:
            raise HookError(f"This {type(self).__name__} is not merged.")
        if self._owner is None:
            raise HookError(f"This {type(self).__name__} was removed from the model, whose weights hold it for good.")
        for module, (weight, bias) in self._kept.items():
            now: tuple[Any, Any] = module.weight, getattr(module, "bias", None)
            bias = None if bias is None else _wide(bias.to(now[0].device))
            expected = self._adapters[module].merged(_wide(weight.to(now[0].device)), bias, self.scale)
            is_same = all(a is None or torch.equal(a, b.to(a.dtype)) for a, b in zip(now, expected, strict=True))
            if not is_same:
                raise HookError(
                    f"{self._adapters[module].place_name} has changed since the merge: by another merge, which has to "
                    "be undone first, by training or by loading. To unmerge would lose that."
                )
        self._restore()
        self._set_silent(False)

    def _restore(self) -> None:
        """Give the base what it had."""
        for module, values in self._kept.items():
            if module in self._quantized:
                replace_linear(self._owner, module, self._quantized[module])  # type: ignore[arg-type]
            else:
                _fill(module, values)
        self._kept, self._quantized = {}, {}

    @property
    def scale(self) -> float:
        """Factor to what the method adds; see `TuningMixin.scale`."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self._kept:
            raise HookError(f"This {type(self).__name__} is merged at scale {self._scale:g}. Call unmerge() first.")
        self._scale = value

    def _set_silent(self, is_silent: bool) -> None:
        if self._kept:
            raise HookError(
                f"This {type(self).__name__} is merged: the weights of the base hold it. Call unmerge() first."
            )
        super()._set_silent(is_silent)

    def _refuse_merge(self) -> None:
        what = f"This {type(self).__name__}"
        if self._owner is None or self._kept or not self.enabled:
            state = "is disabled: call enable() first" if self._owner else "is not added to a model"
            raise HookError(f"{what} {'is merged already' if self._kept else state}.")
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
        has_table = any(adapter.is_table for adapter in self._adapters.values())
        is_shared = getattr(self._owner.transformer.word_embeddings, "is_shared", False)
        if has_table and (is_shared or self._owner.hooks.origins["final_forward"][-1] == "default"):
            reader, cure = "the head", ", or give the model a head of its own (LMHeadMixin)"
            if is_shared:
                reader, cure = "another part", ""
            raise HookError(
                f"{what} adapts word_embeddings, which {reader} reads too: merged, it would change {reader}. Keep it "
                f"as an adapter{cure}."
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._kept:
            raise CheckpointError(
                f"mixin '{prefix.rstrip('.')}' is merged: saved beside the merged weights it would count twice. Call "
                "unmerge(), or del_mixin for a plain model."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self._kept:
            raise CheckpointError(
                f"mixin '{prefix.rstrip('.')}' is merged: what is loaded would be left out of the forward. Call "
                "unmerge() first."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _wide(x: Any) -> Any:  # noqa: ANN401
    """Return a weight or a bias in the precision in which it is merged."""
    return x if x is None else x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _fill(module: nn.Module, values: Kept) -> None:
    weight, bias = values
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)
