"""From what a caller gives to rows of ids, and from rows to batches padded on the left.

Legend: b rows, s columns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.generation.state import NO_TOKEN

Prompt = str | Sequence[int] | Tensor
Row = list[int]


def read_prompts(prompts: Iterable[Prompt] | Tensor | str, tokenizer: Any = None) -> list[Row]:  # noqa: ANN401
    """Turn prompts into rows of ids.

    Args:
        prompts: texts, lists of ids, tensors or arrays `[s]`, or one `[b, s]` in which negative ids are padding.
        tokenizer: turns texts into ids: it has `encode(text)` and `decode(ids)`.

    Returns:
        The ids of each prompt.

    Raises:
        InputError: for a prompt that is no such thing, a text without a tokenizer, or an empty prompt.
    """
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts is a {type(prompts).__name__}; pass a list of texts, or of lists of ids.")
    found = list(prompts)
    if isinstance(prompts, str) or (found and (isinstance(found[0], Number) or getattr(found[0], "ndim", 1) == 0)):
        raise InputError("prompts is a single one; pass a list of prompts, such as [prompt].")
    rows = [_read_prompt(prompt, index, tokenizer) for index, prompt in enumerate(found)]
    for index, row in enumerate(rows):
        if not row:
            raise InputError(
                f"prompt {index} is empty; give it at least one token, such as the one that begins a text."
            )
    return rows


def _read_prompt(prompt: Prompt, index: int, tokenizer: Any) -> Row:  # noqa: ANN401
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(f"prompt {index} is a text; pass tokenizer=, which turns it into ids.")
        return [int(token) for token in tokenizer.encode(prompt)]
    is_array = isinstance(prompt, (Tensor, np.ndarray))
    try:
        ids = [operator.index(token) for token in (prompt.tolist() if is_array else prompt)]  # type: ignore[union-attr]
    except TypeError as error:
        kind = f"{prompt.dtype} {list(prompt.shape)}" if is_array else f"a {type(prompt).__name__}"  # type: ignore[union-attr]
        raise InputError(
            f"prompt {index} is {kind} of what are no ids; it must be a text, or whole numbers [length]: a list of "
            "them, or a tensor."
        ) from error
    return [token for token in ids if token >= 0] if is_array else ids


def check_rows(rows: Sequence[Row], vocab_size: int, name: str = "prompt") -> None:
    """Refuse ids that the model has no word for.

    Args:
        rows: the prompts.
        vocab_size: v.
        name: of a row.

    Raises:
        InputError: naming the prompt, the id and the vocabulary.
    """
    for index, row in enumerate(rows):
        for token in row:
            if not 0 <= token < vocab_size:
                raise InputError(f"{name} {index} holds the id {token}; the model has {vocab_size} words, from 0 on.")


def check_lengths(rows: Sequence[Row], max_new_tokens: int, longest: int | None) -> None:
    """Refuse what the model cannot number.

    Args:
        rows: the prompts.
        max_new_tokens: how many tokens follow each; 0 where an encoder reads them.
        longest: how many positions the model has; None is no limit.

    Raises:
        InputError: naming the prompt, the numbers and the cure.
    """
    for index, row in enumerate(rows if longest is not None else ()):
        room = longest - len(row)  # type: ignore[operator]
        if room < min(1, max_new_tokens):
            raise InputError(
                f"prompt {index} has {len(row)} tokens, and the model has {longest} positions (max_sequence_length)"
                f"{': nothing can follow' if max_new_tokens else ''}. Shorten the prompt."
            )
        if max_new_tokens > room:
            raise InputError(
                f"prompt {index} has {len(row)} tokens and max_new_tokens is {max_new_tokens}: "
                f"{len(row) + max_new_tokens} positions, the model has {longest} (max_sequence_length). Shorten the "
                f"prompt, or lower max_new_tokens to {room}."
            )


def batches_of(rows: Sequence[Row], batch_size: int | None) -> Iterator[list[int]]:
    """Yield the indices of each batch: all rows at once, or `batch_size` rows of like length, the longest first."""
    order = list(range(len(rows)))
    if batch_size is not None and batch_size < len(rows):
        order.sort(key=lambda index: -len(rows[index]))
    size = batch_size or len(order)
    for start in range(0, len(order), max(size, 1)):
        yield order[start : start + size]


def pad_left(rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
    """Align rows to the right: `[b, s]` ids, -1 where a row has none."""
    longest = max(map(len, rows))
    return torch.tensor([[NO_TOKEN] * (longest - len(row)) + list(row) for row in rows], device=device)


def pad_right(rows: Sequence[Row], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Align rows to the left: `[b, s]` ids, 0 where a row has none, and `[b, s]`, True for a token (None: all are)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return ids, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]
