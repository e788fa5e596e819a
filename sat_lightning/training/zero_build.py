"""Building a model that ZeRO-3 splits: every parameter, and in half precision without blurring what must stay exact."""

from typing import Any

import torch
from torch import nn


def cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast buffers as `module.to(dtype)` would, but no parameter: a rotary embedding keeps its frequencies in fp32.

    Args:
        module: changed in place.
        dtype: of floating-point buffers.
    """
    held = {child: child._parameters for child in module.modules()}
    for child in held:
        child._parameters = {}
    try:
        module.to(dtype)
    finally:
        for child, parameters in held.items():
            child._parameters = parameters


def cast_shards(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, split by ZeRO-3 already or not.

    Building them in half precision at once would cast every other tensor that a constructor makes on its way, as the
    frequencies of a rotary embedding.

    Args:
        module: changed in place.
        dtype: of its parameters.
    """
    for parameter in module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
        if parameter.is_floating_point():  # one that its module got after its constructor is not split yet
            parameter.data = parameter.data.to(dtype)


def split_scalars(init: Any) -> Any:  # noqa: ANN401
    """Let DeepSpeed's context split parameters without an axis too (CLIP's temperature), which it cannot broadcast.

    Args:
        init: changed in place.

    Returns:
        It.
    """
    split = init._zero_init_param

    def split_with_axis(parameter: Any) -> None:  # noqa: ANN401
        shape = parameter.shape
        if not shape:
            parameter.data = parameter.data.reshape(1)
        split(parameter)
        parameter.ds_shape = shape

    init._zero_init_param = split_with_axis
    return init
