"""A frozen base in 4 bits, under adapters in full precision: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from sat_lightning.errors import ConfigError, HookError
from sat_lightning.mixins.places import choose
from sat_lightning.model import BaseModel


def quantize_base(
    model: BaseModel, target: str | Sequence[str] = r"^layers\.", kind: Literal["nf4", "fp4"] = "nf4"
) -> list[str]:
    """Put linears of a trained model into 4 bits, by bitsandbytes; they are frozen, and add adapters afterwards.

    Their modules become `bitsandbytes.nn.Linear4bit`, which dequantise for every product. A method that is merged makes
    the linears it adapts dense again, of the dequantised weight: what the rounding to 4 bits lost stays lost, nothing
    more is, and `unmerge` brings the 4 bits back.

    Args:
        model: with its trained weights; changed in place. Of a composed model, a part (`model.decoder`).
        target: regular expressions over the names of linears, see `mixins.places`; tables stay as they are.
        kind: the 16 values: those of a normal distribution, or a float of 4 bits.

    Returns:
        The names of the linears.

    Raises:
        ConfigError: if bitsandbytes is not installed, or `target` matches nothing.
        HookError: if an adapter stands on a linear already.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ConfigError(
            f"quantize_base needs bitsandbytes, which cannot be imported ({error}). Run pip install bitsandbytes."
        ) from error
    names = []
    for place, _ in choose(model, target):
        old: Any = place.module
        if isinstance(old, nn.Embedding) or is_quantized(old):
            continue
        if holders := [name for name, mixin in model.mixins.items() if old in getattr(mixin, "_adapters", ())]:
            raise HookError(f"'{holders[0]}' adapts {place.name} already. Quantise the base before adapters are added.")
        new = Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, quant_type=kind, device="meta")
        new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type=kind)
        new.bias = old.bias if old.bias is None else nn.Parameter(old.bias.data, requires_grad=False)
        # On a CPU it would lay its weight out anew in the middle of a forward, for good, and lose small blocks.
        new.support_avx512bf16_for_cpu = False
        replace_linear(model, old, new.to(old.weight.device).train(old.training))
        names.append(place.name)
    return names


def dequantize_base(model: BaseModel) -> list[str]:
    """Make linears of 4 bits dense again, of what the 4 bits say, so that a folder or another library can hold them.

    Args:
        model: changed in place; adapters stay. Of a composed model, a part.

    Returns:
        The names of the linears.
    """
    names = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized(module):
            weight, bias = dense_weight(module), module.bias
            dense = make_dense(module, weight)
            dense.weight.data = weight.to(dense.weight.dtype)
            dense.bias = bias
            replace_linear(model, module, dense)
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


def make_dense(module: Any, like: Tensor) -> nn.Linear:  # noqa: ANN401
    """Return an empty linear of the sizes of a quantised one, in the precision that it computes in."""
    state, has_bias = module.weight.quant_state, module.bias is not None
    dense = nn.Linear(module.in_features, module.out_features, has_bias, device=like.device, dtype=state.dtype)
    return dense.requires_grad_(False).train(module.training)


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
