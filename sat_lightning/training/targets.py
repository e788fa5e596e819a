"""What of a batch counts: padding hidden from encoders, and losses over targets."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.model import AnyModel
from sat_lightning.models.bert import EncoderModel


def hide_padding(model: AnyModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's keywords with a mask of its padding, if it is an encoder and has none.

    A causal model needs none: no token sees the padding behind it.

    Args:
        model: about to be called.
        inputs: its keywords; `token_mask` `[b, s]`, 1 for a token and 0 for padding, stays among them.
    """
    if isinstance(model, EncoderModel) and "token_mask" in inputs and "attention_mask" not in inputs:
        return {**inputs, "attention_mask": inputs["token_mask"][:, None, None, :]}
    return dict(inputs)


def mean_over_targets(total: Tensor, is_target: Tensor) -> Tensor:
    """Divide a sum over targets by their number: a batch without any gives 0, and not NaN.

    Args:
        total: scalar.
        is_target: bool, of any shape.
    """
    return total / is_target.sum().clamp(min=1)


def hard_loss(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Return the cross entropy summed over targets.

    Args:
        logits: `[b, v]` or `[b, s, v]`.
        target_ids: `[b]` or `[b, s]`, -100 for none.
    """
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, target_ids.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
