"""What a batch holds and costs, for progress bars and Lightning's `ThroughputMonitor`.

In YAML: `{class_path: ThroughputMonitor, init_args: {batch_size_fn: sat_lightning.training.count_rows,
length_fn: sat_lightning.training.count_tokens}}`; then `items_per_sec` are tokens per second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sat_lightning.model import BaseModel


def count_rows(batch: Any) -> int:  # noqa: ANN401 - a batch is whatever the user's data module gives
    """Return the number of samples in a batch.

    Args:
        batch: a tensor, or a mapping or sequence that holds one; the first tensor's first dimension counts.
    """
    tensor = _find_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def count_tokens(batch: Any) -> int:  # noqa: ANN401
    """Return the number of tokens in a batch.

    Args:
        batch: as for `count_rows`; of a mapping `input_ids` counts. What is no `[b, s]` of ids counts its rows.
    """
    tensor = _find_tensor(batch)
    if tensor is None or tensor.dim() != 2 or tensor.is_floating_point():
        return count_rows(batch)
    return tensor.numel()


def count_flops(model: BaseModel, num_rows: int, length: int, *, is_training: bool) -> int:
    """Estimate the arithmetic of one batch from the shapes, as in Kaplan et al. 2020 plus the attention itself.

    A matrix of n weights costs 2n operations per token forwards, 2n backwards for its input, and 2n for its own
    gradient if it trains; attention costs 4 s times the heads' width per token and layer forwards and twice that
    backwards. Embedding tables are looked up, not multiplied, and cost nothing.

    Args:
        model: gives the sizes.
        num_rows: sequences.
        length: tokens of each.
        is_training: with the backward pass.

    Returns:
        Floating point operations.
    """
    config = model.config
    num_weights, num_trained = 0, 0
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) >= 2 and "embeddings" not in name:
            size = getattr(parameter, "ds_numel", parameter.numel())
            num_weights += size
            num_trained += size if parameter.requires_grad else 0
    attention = 4 * config.num_layers * length * config.num_attention_heads * config.head_size
    per_token = 2 * num_weights + attention
    if is_training:
        per_token += 2 * num_weights + 2 * num_trained + 2 * attention
    return num_rows * length * per_token


def _find_tensor(batch: Any) -> Tensor | None:  # noqa: ANN401
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return next((tensor for item in batch if (tensor := _find_tensor(item)) is not None), None)
    return None
