"""Heads of new tasks: one, or several by name.

Legend: b batch, s length, c hidden size, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, InputError, nearest
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins.sat_form import Arguments, accepts_sat_form, sizes
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import Linear, normal_init

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh,
}  # fmt: skip
_POOLINGS = ("first", "last", "mean")


class _Head(BaseMixin):
    """What heads share: linears with an activation between them, on every token or on one vector of a sequence."""

    stays_trainable: ClassVar[bool] = True

    def __init__(self, activation: str, pooling: str | None) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ConfigError(
                f"activation is '{activation}', there are {list(_ACTIVATIONS)}.{nearest(activation, _ACTIVATIONS)}"
            )
        if pooling is not None and pooling not in _POOLINGS:
            raise ConfigError(f"pooling is '{pooling}', there are {list(_POOLINGS)}, and None for every token.")
        self.activation, self.pooling = activation, pooling

    def score(self, layers: Any, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor:
        """Pool, and run the linears."""
        x = hidden_states if self.pooling is None else pool(hidden_states, self.pooling, token_mask)
        for index, layer in enumerate(layers):
            x = layer(_ACTIVATIONS[self.activation](x) if index else x)
        return x


def _sat_form(
    hidden_size: int,
    *output_sizes: int,
    bias: bool = True,
    activation_func: Callable[[Tensor], Tensor] = F.relu,
    init_std: float = 0.005,
    **kw: Any,
) -> Arguments:
    known = [name for name, activation in _ACTIVATIONS.items() if activation is activation_func]
    if not known:
        raise ConfigError(f"activation_func is {activation_func!r}, there are torch.nn.functional's {[*_ACTIVATIONS]}.")
    return (sizes(hidden_size=hidden_size), *output_sizes), {
        "bias": bias, "activation": known[0], "init_std": init_std, **kw,
    }  # fmt: skip


class MLPHeadMixin(_Head):
    """Score by an MLP: `[b, s, c]` to `[b, s, o]`, or to `[b, o]` with `pooling`.

    It takes the place of a head: call `del_mixin` for the one that a family brings. The keyword `token_mask` of a call,
    `[b, s]`, 1 for a token and 0 for padding, tells `last` and `mean` what to leave out; without it nothing is.

    Args:
        config: gives the width.
        *output_sizes: outputs of each linear, the last one's are the scores.
        sizes: the same as a list, where arguments have names (YAML).
        bias: whether the linears have one.
        activation: before every linear but the first: `relu`, `gelu`, `silu` or `tanh`.
        pooling: the token that is scored: `first`, `last`, or `mean` of all. Default: every one.
        init_std: of the weights.

    Raises:
        ConfigError: without an output, or for an unknown activation or pooling.
    """

    @accepts_sat_form(_sat_form)
    def __init__(
        self,
        config: TransformerConfig,
        *output_sizes: int,
        sizes: Sequence[int] = (),
        bias: bool = True,
        activation: str = "relu",
        pooling: str | None = None,
        init_std: float = 0.005,
    ) -> None:
        super().__init__(activation, pooling)
        self.layers = make_layers(config, output_sizes or sizes, bias, init_std)

    def final_forward(self, logits: Tensor, token_mask: Tensor | None = None, **kw: Any) -> Tensor:
        """Return the scores."""
        return self.score(self.layers, logits, token_mask)


class TaskHeadsMixin(_Head):
    """Several heads, of which the keyword `task` of a call chooses one; without it the model's own answers.

    A head that no batch of a step asks for gets no gradient: under DDP set `find_unused_parameters`.

    Args:
        config: gives the width.
        heads: task -> its outputs, one number, or a list of those of each linear.
        activation: see `MLPHeadMixin`.
        pooling: see `MLPHeadMixin`.
        init_std: of the weights.

    Raises:
        ConfigError: without a head, or for an unknown activation or pooling.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: Mapping[str, int | Sequence[int]],
        *,
        activation: str = "relu",
        pooling: str | None = None,
        init_std: float = 0.005,
    ) -> None:
        super().__init__(activation, pooling)
        if not heads:
            raise ConfigError("heads is empty: name at least one task and its outputs, as {'topic': 4}.")
        if unfit := [task for task in heads if "." in task or not task or hasattr(nn.ModuleDict(), task)]:
            raise ConfigError(f"heads: a module cannot be called '{unfit[0]}'. Give the task another name.")
        self.heads = nn.ModuleDict({
            task: make_layers(config, [sizes] if isinstance(sizes, int) else sizes, True, init_std)
            for task, sizes in heads.items()
        })  # fmt: skip

    @non_conflict
    def final_forward(
        self,
        logits: Tensor,
        *,
        old_impl: Callable[..., Tensor],
        task: str | None = None,
        token_mask: Tensor | None = None,
        **kw: Any,
    ) -> Tensor:
        """Return the scores of a task: `[b, s, o]`, or `[b, o]` with `pooling`.

        Raises:
            InputError: if there is no such task.
        """
        if task is None:
            return old_impl(logits, token_mask=token_mask, **kw)
        if task not in self.heads:
            raise InputError(f"task is '{task}', the heads are {list(self.heads)}.{nearest(task, self.heads)}")
        return self.score(self.heads[task], logits, token_mask)


def make_layers(config: TransformerConfig, output_sizes: Sequence[int], bias: bool, std: float) -> nn.ModuleList:
    """Return linears from the hidden size through the given sizes."""
    if not output_sizes or min(output_sizes) < 1:
        raise ConfigError(f"output_sizes is {list(output_sizes)}: give the outputs of each linear, each at least 1.")
    sizes = [config.hidden_size, *output_sizes]
    init = normal_init(std)
    return nn.ModuleList(Linear(a, b, bias, init) for a, b in zip(sizes[:-1], sizes[1:], strict=True))


def pool(hidden_states: Tensor, pooling: str, token_mask: Tensor | None = None) -> Tensor:
    """Return one vector a sequence: `[b, s, c]` to `[b, c]`.

    Args:
        hidden_states: of all tokens.
        pooling: `first`, `last` or `mean`; the first two mean tokens, wherever padding is.
        token_mask: `[b, s]`, 1 for a token, 0 for padding. Default: all are tokens.
    """
    if token_mask is None:
        return hidden_states.mean(1) if pooling == "mean" else hidden_states[:, 0 if pooling == "first" else -1]
    weights = token_mask.to(hidden_states.dtype)
    if pooling == "mean":
        return (hidden_states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    if pooling == "first":
        place = weights.argmax(1)
    else:
        place = weights.shape[1] - 1 - weights.flip(1).argmax(1)
    return hidden_states.gather(1, place[:, None, None].expand(-1, 1, hidden_states.shape[-1]))[:, 0]
