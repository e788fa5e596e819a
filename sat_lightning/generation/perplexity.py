"""How likely a model finds given tokens: the losses of single tokens, and SAT's `evaluate_perplexity` upon them.

Legend: b batch, s length, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sat_lightning.errors import InputError
from sat_lightning.model.base import OMITTED
from sat_lightning.nn.masks import MaskLike

IGNORED_TARGET = -100
#: Logits that are turned to fp32 at a time: those of a whole batch may be the largest tensor there is.
_CHUNK = 1 << 24


def evaluate_perplexity(
    model: nn.Module,
    tokens: Tensor,
    attention_mask: MaskLike = OMITTED,
    position_ids: Tensor | None = OMITTED,
    loss_mask: Tensor | None = None,
    invalid_slices: Sequence[Any] = (),
    reduction: str = "mean",
    **kw: Any,
) -> Tensor:
    """Return the negative log-likelihood of tokens, each given those before it; SAT's contract.

    It is not exponentiated: `exp` of a mean is the perplexity. The arguments stay as they are: where `tokens` is
    negative (SAT's padding) zeros are read and nothing is counted, in copies. Gradients flow unless the caller turned
    them off, and dropout acts in a model in training mode.

    Args:
        model: called as `model(tokens, position_ids, attention_mask, **kw)`.
        tokens: `[b, s]` or `[s]`; negative ids are padding.
        attention_mask: of the call. Default: the family's own.
        position_ids: of the call. Default: the family's own.
        loss_mask: `[b, s]`, or `[s]` for all rows: how much each token counts; the first one never does. Default: 1.
        invalid_slices: ids, or slices of ids, that the model is not allowed to give any probability.
        reduction: "mean" over what counts, of each row, or "none".
        **kw: further keywords of the call.

    Returns:
        Nats: `[b]` (NaN for a row in which nothing counts), or with "none" `[b, s - 1]`, weighted by the mask and 0
        where that is 0. A token that counts and lies in `invalid_slices` costs infinitely much.

    Raises:
        InputError: shapes do not fit, there are fewer than two tokens, or an unknown reduction.
    """
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    loss_mask = torch.ones_like(tokens, dtype=torch.float32) if loss_mask is None else loss_mask
    _check(tokens, loss_mask, reduction)
    is_padding = tokens < 0
    weights = loss_mask.expand(tokens.shape).masked_fill(is_padding, 0)[:, 1:]
    weights = weights if weights.is_floating_point() else weights.float()
    input_ids = tokens.masked_fill(is_padding, 0)
    targets = input_ids[:, 1:].masked_fill(weights == 0, IGNORED_TARGET)
    kw |= {"position_ids": position_ids, "attention_mask": attention_mask}
    # The last token predicts nothing, but masks and positions of the caller are made for it too.
    losses = token_losses(model, input_ids, F.pad(targets, (0, 1), value=IGNORED_TARGET), invalid_slices, **kw)
    losses = torch.where(weights == 0, 0.0, losses[:, :-1] * weights)
    return losses if reduction == "none" else losses.sum(1) / weights.sum(1)


def _check(tokens: Tensor, loss_mask: Tensor, reduction: str) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise InputError(f"tokens has shape {list(tokens.shape)}; give [batch, length] with at least two tokens a row.")
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction is '{reduction}'. Choose 'mean' or 'none'.")
    if loss_mask.shape not in (tokens.shape, tokens.shape[1:]):
        raise InputError(
            f"loss_mask has shape {list(loss_mask.shape)}, tokens {list(tokens.shape)}: give one weight a token."
        )


def token_losses(
    model: Any,  # noqa: ANN401
    input_ids: Tensor,
    target_ids: Tensor,
    invalid_slices: Sequence[Any] = (),
    **kw: Any,
) -> Tensor:
    """Return the cross entropy of every target; the logits are not built where the model's head can do without.

    Args:
        model: called as `model(input_ids, **kw)`; its first output is the logits.
        input_ids: `[b, s]`.
        target_ids: `[b, s]`, the word to predict at each place (already shifted), -100 where there is none.
        invalid_slices: ids, or slices of ids, that get no probability.
        **kw: keywords of the call.

    Returns:
        Nats `[b, s]`, fp32 (fp64 for fp64), 0 where there is no target.
    """
    hooks = getattr(model, "hooks", None)
    if len(invalid_slices) == 0 and getattr(hooks, "computes_loss", False):
        losses = model(input_ids, target_ids=target_ids, loss_reduction="none", **kw)[0]
        if losses.shape == target_ids.shape:
            return losses
        # A head that does not pass its keywords on has given the mean.
    return losses_of_logits(model(input_ids, **kw)[0], target_ids, invalid_slices)


def losses_of_logits(logits: Tensor, target_ids: Tensor, invalid_slices: Sequence[Any] = ()) -> Tensor:
    """Return the cross entropy of every target, in the memory of one chunk of fp32 logits beside those given.

    Args:
        logits: `[..., v]` of any dtype; they stay as they are.
        target_ids: `[...]`, -100 where there is none.
        invalid_slices: ids, or slices of ids, that get no probability.

    Returns:
        Nats `[...]`, fp32 (fp64 for fp64), 0 where there is no target.

    Raises:
        InputError: the shapes do not fit.
    """
    if logits.shape[:-1] != target_ids.shape:
        raise InputError(
            f"target_ids has shape {list(target_ids.shape)}, logits {list(logits.shape)}: there must be one target for "
            f"each row of logits, {list(logits.shape[:-1])}."
        )
    num_classes = logits.shape[-1]
    is_ignored = target_ids.flatten() == IGNORED_TARGET
    targets = target_ids.flatten().masked_fill(is_ignored, 0)
    is_invalid = torch.zeros(num_classes, dtype=torch.bool, device=logits.device)
    for ids in invalid_slices:
        is_invalid[ids] = True
    size = max(1, _CHUNK // num_classes)
    losses = []
    for rows, target in zip(logits.reshape(-1, num_classes).split(size), targets.split(size), strict=True):
        wide = rows.float() if rows.dtype.itemsize < 4 else rows
        if len(invalid_slices) > 0:
            wide = wide.masked_fill(is_invalid, -torch.inf)
        losses.append(wide.logsumexp(-1) - wide.gather(1, target[:, None])[:, 0])
    found = torch.cat(losses) if losses else logits.new_empty(0)
    return found.masked_fill(is_ignored, 0).view(target_ids.shape)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn gradients and dropout off, and leave every module in the mode it was in.

    Args:
        model: any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
