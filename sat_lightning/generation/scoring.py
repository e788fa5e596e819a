"""Scores of texts: the loss of every token, in windows where a text is longer than the model reads at once.

Legend: b batch, s length, n tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.generation.perplexity import IGNORED_TARGET, evaluating, token_losses
from sat_lightning.model import BaseModel

Text = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class TextScore:
    """How likely a model finds one text."""

    token_losses: Tensor
    """Nats of each scored token, `[n]`, fp32, on the CPU."""
    num_bytes: int | None = None
    """Bytes that the scored tokens stand for, where they are known."""

    @property
    def num_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.token_losses)

    @property
    def loss(self) -> float:
        """Nats of the whole text: the negative logarithm of its probability."""
        return float(self.token_losses.double().sum())

    @property
    def mean_loss(self) -> float:
        """Nats per token; NaN if none was scored."""
        return self.loss / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp` of the nats per token; infinite where a float ends."""
        return float(torch.tensor(self.mean_loss, dtype=torch.float64).exp())

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which compares across tokenizers; None if the bytes are not known."""
        return self.loss / (math.log(2) * self.num_bytes) if self.num_bytes else None


def score(
    model: Any,  # noqa: ANN401
    texts: Sequence[Text],
    *,
    tokenizer: Any = None,  # noqa: ANN401
    prefix_ids: Sequence[int] | None = None,
    num_bytes: Sequence[int] | None = None,
    window_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    **kw: Any,
) -> list[TextScore]:
    """Score texts by a causal model, in batches by length.

    Long texts are read in windows that overlap: each scores what no window before it has, so that every token is scored
    once, behind the first window with at least `window_length - stride` tokens before it.

    Args:
        model: called as `model(input_ids, **kw)`; its first output is the logits.
        texts: ids, or text where there is a tokenizer. All lengths may differ; an empty text has no tokens.
        tokenizer: anything with `encode`, and with `end_of_document_id` unless `prefix_ids` is given.
        prefix_ids: stand before every text, not scored; without any, the first token of a text is not. Default: the
            tokenizer's end of a document, behind which a model expects a new one; nothing without a tokenizer.
        num_bytes: of each text's scored part. Default: counted where a text is given as text and scored from its first
            token on, that is, behind a prefix.
        window_length: tokens that the model reads at once. Default: its `max_sequence_length`.
        stride: by how much a window moves on. Default: half a window.
        batch_size: windows that are read at once.
        **kw: keywords of the call.

    Returns:
        One score a text, in their order.

    Raises:
        InputError: a setting or a text cannot be used, or the model sees the tokens that it is to predict.
    """
    refuse_seeing(model, kw)
    window_length = window_length or model.config.max_sequence_length
    stride = -(-window_length // 2) if stride is None else stride
    if not 1 <= stride <= window_length:
        raise InputError(f"stride is {stride}; choose 1 to {window_length}, the length of the window.")
    if prefix_ids is None:
        prefix_ids = [] if tokenizer is None else [tokenizer.end_of_document_id]
    rows = [[*prefix_ids, *to_ids(text, tokenizer)] for text in texts]
    num_unscored = max(1, len(prefix_ids))
    losses = _score_rows(model, rows, num_unscored, window_length, stride, batch_size, kw)
    sizes = [_count_bytes(text) if prefix_ids else None for text in texts] if num_bytes is None else list(num_bytes)
    if len(sizes) != len(rows):
        raise InputError(f"num_bytes has {len(sizes)} entries for {len(rows)} texts. Give one a text.")
    return [TextScore(found, size) for found, size in zip(losses, sizes, strict=True)]


def to_ids(text: Text, tokenizer: Any = None) -> list[int]:  # noqa: ANN401
    """Return the ids of a text.

    Args:
        text: text, or ids.
        tokenizer: anything with `encode`.

    Returns:
        Its ids.

    Raises:
        InputError: text comes without a tokenizer, or ids are negative.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("A text was given, and no tokenizer that turns it into ids. Pass tokenizer=..., or ids.")
        return [int(token) for token in tokenizer.encode(text)]
    ids = text.tolist() if isinstance(text, Tensor) else [int(token) for token in text]
    if any(token < 0 for token in ids):
        raise InputError(
            f"A text holds the id {min(ids)}; ids are not negative. Leave padding out: lengths may differ."
        )
    return ids


def batched_losses(
    model: Any,  # noqa: ANN401
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    kw: dict[str, Any],
) -> list[Tensor]:
    """Return the loss of every target of many rows, in batches of rows of like length, longest first.

    Args:
        model: causal, so that padding behind a row changes nothing before it.
        rows: ids, and at each place the word to predict or -100.
        batch_size: rows at once.
        kw: keywords of the call.

    Returns:
        For each row the losses of its targets, without the places that have none, on the CPU.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted((i for i, (ids, _) in enumerate(rows) if ids), key=lambda i: -len(rows[i][0]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids = pad_rows([rows[i][0] for i in batch], 0).to(device)
            target_ids = pad_rows([rows[i][1] for i in batch], IGNORED_TARGET).to(device)
            losses = token_losses(model, input_ids, target_ids, **kw).float().cpu()
            for row, i in zip(losses, batch, strict=True):
                found[i] = row[: len(rows[i][1])][torch.tensor(rows[i][1]) != IGNORED_TARGET]
    return found


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows of different lengths as one tensor, `[b, s]`, filled up behind.

    Args:
        rows: of ids.
        value: that fills them up.
    """
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def refuse_seeing(model: Any, kw: dict[str, Any]) -> None:  # noqa: ANN401
    """Refuse a call in which the answer is seen.

    Args:
        model: to be called.
        kw: keywords of the call.

    Raises:
        InputError: no mask is given, and the family's own shows every token.
    """
    is_of_family = isinstance(model, BaseModel) and type(model).make_attention_mask is BaseModel.make_attention_mask
    if is_of_family and model.default_mask is None and "attention_mask" not in kw:
        raise InputError(
            f"{type(model).__name__} lets every token see every token, also the one it is to predict. Pass "
            'attention_mask="causal" if it was trained to write.'
        )


def _score_rows(
    model: Any,  # noqa: ANN401
    rows: list[list[int]],
    num_unscored: int,
    window_length: int,
    stride: int,
    batch_size: int,
    kw: dict[str, Any],
) -> list[Tensor]:
    if num_unscored > window_length:
        raise InputError(f"prefix_ids has {num_unscored} tokens, more than the window of {window_length}. Shorten it.")
    owners, windows = [], []
    for index, ids in enumerate(rows):
        for start, stop, first in _windows(len(ids) - 1, window_length, stride):
            first = max(first, num_unscored - 1)
            targets = [IGNORED_TARGET] * (first - start) + ids[first + 1 : stop + 1]
            owners.append(index)
            windows.append((ids[start:stop], targets))
    parts: list[list[Tensor]] = [[torch.empty(0)] for _ in rows]
    for index, losses in zip(owners, batched_losses(model, windows, batch_size, kw), strict=True):
        parts[index].append(losses)
    return [torch.cat(part) for part in parts]


def _windows(num_targets: int, window_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield the windows of a text: where each starts and stops, and the first place whose next token it scores.

    The last window reaches back, so that all are full.
    """
    done = 0
    while done < num_targets:
        stop = min(done + (stride if done else window_length), num_targets)
        yield max(0, stop - window_length), stop, done
        done = stop


def _count_bytes(text: Text) -> int | None:
    return len(text.encode("utf-8", errors="surrogatepass")) if isinstance(text, str) else None
