"""A frozen base in 4 bits, under adapters in full precision: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, HookError
from sat_lightning.mixins.places import Place, choose, find_places
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.model import BaseModel

Kind = Literal["nf4", "fp4"]
Target = str | Sequence[str] | None


class QuantizedBaseMixin(TuningMixin):
    """Put linears of the base into 4 bits, by bitsandbytes, under methods that are added after it.

    They are quantised when it is added, and again by `reinit` where weights were loaded since (`init_from`). It has no
    parameters, and no file holds more of it than its settings; see `quantize_base`.

    Args:
        config: the model's.
        target: regular expressions over the names of linears, see `mixins.places`. Default: all but routers.
        kind: the 16 values: those of a normal distribution, or a float of 4 bits.

    Raises:
        ConfigError: for an unknown kind; when added to a model, if bitsandbytes is missing or `target` matches nothing.
        HookError: when added to a model in which adapters stand on such linears already.
    """

    tells_rows_apart = None

    def __init__(self, config: TransformerConfig, *, target: Target = None, kind: Kind = "nf4") -> None:
        super().__init__()
        if kind not in ("nf4", "fp4"):
            raise ConfigError(f"QuantizedBaseMixin: kind is '{kind}', there are 'nf4' and 'fp4'.")
        self.target, self.kind = target, kind

    def added_to(self, model: BaseModel) -> None:
        """Quantise the base; see `BaseMixin.added_to`."""
        quantize_base(model, self.target, self.kind)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Quantise what was made dense to be loaded."""
        if self._owner is not None:
            _quantize(self._owner, _find(self._owner, self.target), self.kind)

    def _set_silent(self, is_silent: bool) -> None:
        if is_silent:
            raise HookError(
                "QuantizedBaseMixin cannot be disabled: what 4 bits have lost is lost. dequantize_base(model) makes "
                "dense linears of them."
            )


def quantize_base(model: BaseModel, target: Target = None, kind: Kind = "nf4") -> list[str]:
    """Put linears of a trained model into 4 bits, by bitsandbytes; they are frozen, and add adapters afterwards.

    Their modules become `bitsandbytes.nn.Linear4bit`, which dequantise for every product. A method that is merged makes
    the linears it adapts dense again, of the dequantised weight: what the rounding to 4 bits lost stays lost, nothing
    more is, and `unmerge` brings the 4 bits back.

    Args:
        model: with its trained weights; changed in place. Of a composed model, a part (`model.decoder`).
        target: regular expressions over the names of linears, see `mixins.places`; tables stay as they are. Default:
            all linears but routers, which are small, and choose.
        kind: the 16 values: those of a normal distribution, or a float of 4 bits.

    Returns:
        The names of the linears.

    Raises:
        ConfigError: if bitsandbytes is not installed, `target` matches nothing, or ZeRO-3 has split the weights.
        HookError: if an adapter stands on a linear already.
    """
    places = _find(model, target)
    for place in places:
        if holders := [name for name, mixin in model.mixins.items() if place.module in getattr(mixin, "_adapters", ())]:
            raise HookError(f"'{holders[0]}' adapts {place.name} already. Quantise the base before adapters are added.")
    return _quantize(model, places, kind)


def _find(model: BaseModel, target: Target) -> list[Place]:
    if target is None:
        routers = tuple(f"mixins.{name}." for name, mixin in model.mixins.items() if hasattr(mixin, "routing_forward"))
        found = [place for place in find_places(model) if not place.name.startswith(routers)]
    else:
        found = [place for place, _ in choose(model, target)]
    return [place for place in found if isinstance(place.module, nn.Linear) and not is_quantized(place.module)]


def _quantize(model: BaseModel, places: Sequence[Place], kind: Kind) -> list[str]:
    try:
        from bitsandbytes.nn import Params4bit
    except ImportError as error:
        raise ConfigError(
            f"quantize_base needs bitsandbytes, which cannot be imported ({error}). Run pip install bitsandbytes."
        ) from error
    if split := [place.name for place in places if hasattr(place.module.weight, "ds_tensor")]:
        raise ConfigError(f"{split[0]}: ZeRO-3 has split it, and 4 bits cannot be split. Train under zero_2 or ddp.")
    for place in places:
        old: Any = place.module
        new = _linear_class()(old.in_features, old.out_features, bias=False, quant_type=kind, device="meta")
        new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type=kind)
        new.to(old.weight.device)
        new.bias = old.bias  # trains if it did: BitFit may be beside
        replace_linear(model, old, new.train(old.training))
    return [place.name for place in places]


@functools.cache
def _linear_class() -> Any:  # noqa: ANN401
    """Return the linear of 4 bits; the library is loaded when it is asked for."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    class QuantizedLinear(Linear4bit):
        """Theirs, which reads what its weight needs out of a state dict, and leaves its bias as it is."""

        def forward(self, x: Tensor) -> Tensor:
            # Theirs casts the bias for good, and sums its gradient over the first axis only.
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            output = matmul_4bit(x, self.weight.t(), quant_state=self.weight.quant_state)
            return output if self.bias is None else output + self.bias.to(output.dtype)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            start = f"{prefix}weight."
            given = {key.removeprefix(start): state_dict.pop(key) for key in [*state_dict] if key.startswith(start)}
            if given:
                self.weight.quant_state = QuantState.from_dict(given, self.weight.device)
            super()._load_from_state_dict(state_dict, prefix, *args)

    return QuantizedLinear


def dequantize_base(model: BaseModel) -> list[str]:
    """Make linears of 4 bits dense again, of what the 4 bits say, so that a folder or another library can hold them.

    Args:
        model: changed in place; adapters stay, and a `QuantizedBaseMixin` goes. Of a composed model, a part.

    Returns:
        The names of the linears.
    """
    for name, mixin in list(model.mixins.items()):
        if isinstance(mixin, QuantizedBaseMixin):
            model.del_mixin(name)
    return make_all_dense(model)


def make_all_dense(model: BaseModel) -> list[str]:
    """Make linears of 4 bits dense again, whoever made them; returns their names."""
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(module):
            replace_linear(model, module, make_dense(module, dense_weight(module), module.bias))
            names.append(name)
    return names


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a linear holds its weight in 4 bits."""
    return getattr(module.weight, "quant_state", None) is not None


def dense_weight(module: Any) -> Tensor:  # noqa: ANN401
    """Return the weight of a linear `[out, in]`, dequantised, or of an embedding `[words, features]`."""
    if not is_quantized(module):
        return module.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state).view(module.out_features, module.in_features)


def make_dense(module: Any, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:  # noqa: ANN401
    """Return a frozen linear in the place of a quantised one, in the precision that it computes in."""
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(module.weight.quant_state.dtype), requires_grad=False)
    dense.bias = bias  # type: ignore[assignment]
    return dense.train(module.training)


def replace_linear(model: BaseModel, old: nn.Module, new: nn.Module) -> None:
    """Put a linear in the place of another, for the model and for every adapter on it."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    for mixin in model.mixins.values():
        adapters: dict[nn.Module, Any] = getattr(mixin, "_adapters", {})
        if old in adapters:
            object.__setattr__(mixin, "_adapters", {new if key is old else key: one for key, one in adapters.items()})
