"""What a batch holds and costs, for progress bars and Lightning's `ThroughputMonitor`.

In YAML: `{class_path: ThroughputMonitor, init_args: {batch_size_fn: sat_lightning.training.count_rows,
length_fn: sat_lightning.training.count_tokens}}`; then `items_per_sec` are tokens per second.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


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
    return math.prod(shape_of_ids(batch))


def shape_of_ids(batch: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return how many rows go through the model, and how many tokens each has.

    Args:
        batch: as for `count_tokens`; of `input_ids` with more axes, choices of a row, each is a row.
    """
    tensor = _find_tensor(batch)
    if tensor is None or tensor.is_floating_point():
        return count_rows(batch), 1
    is_named = isinstance(batch, Mapping) and "input_ids" in batch
    if tensor.dim() != 2 and not (is_named and tensor.dim() > 2):
        return count_rows(batch), 1
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _find_tensor(batch: Any) -> Tensor | None:  # noqa: ANN401
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return next((tensor for item in batch if (tensor := _find_tensor(item)) is not None), None)
    return None
