"""Score several continuations of one prompt, which is read once: its keys and values are kept.

Legend: b continuations at once, s length, c hidden size, n tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sat_lightning.generation.perplexity import IGNORED_TARGET, evaluating, token_losses
from sat_lightning.generation.scoring import pad_rows
from sat_lightning.hooks import computes_loss, non_conflict
from sat_lightning.mixins import KeyValueCache, PromptTuningMixin, StaticCacheMixin
from sat_lightning.model import BaseMixin, BaseModel

#: Tokens of a prompt from which on keeping it costs less than reading it again.
SHORTEST_PROMPT = 32


class _ReadingMixin(BaseMixin):
    """Score nothing while the prompt is read: of its logits none is wanted."""

    @computes_loss
    @non_conflict
    def final_forward(
        self,
        logits: Tensor,
        *,
        old_impl: Callable[..., Any],
        reads_only: bool = False,
        **kw: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return hidden states `[b, s, c]` as they are while reading."""
        return logits if reads_only else old_impl(logits, **kw)


def can_share(model: Any) -> bool:  # noqa: ANN401
    """Tell whether a model reads a text in two parts as it reads it whole.

    It is causal, counts positions from 0, and puts no tokens of its own in front.

    Args:
        model: any model.
    """
    if not isinstance(model, BaseModel) or model.default_mask != "causal":
        return False
    if any(isinstance(mixin, PromptTuningMixin) and mixin.enabled for mixin in model.mixins.values()):
        return False
    own = (BaseModel.make_attention_mask, BaseModel.make_position_ids, BaseModel.read_attention_mask)
    return all(getattr(type(model), hook.__name__) is hook for hook in own)


def shared_losses(
    model: BaseModel, prompt: Sequence[int], answers: Sequence[Sequence[int]], batch_size: int
) -> list[Tensor] | None:
    """Return the losses of the tokens of each answer behind one prompt.

    Args:
        model: `can_share` says yes.
        prompt: n ids, at least one.
        answers: at least one id each.
        batch_size: answers at once.

    Returns:
        Nats on the CPU; None if a layer of the model does not use the cache.
    """
    device, held, found = next(model.parameters()).device, len(prompt) - 1, []
    cache = KeyValueCache(held + max(map(len, answers)))
    with evaluating(model), _with_cache(model):
        if held:
            _read(model, torch.tensor([prompt[:-1]], device=device), cache)
            if len(cache.layers) < model.config.num_layers:
                return None
        for start in range(0, len(answers), batch_size):
            part = answers[start : start + batch_size]
            # Nothing is advanced: each part begins behind the prompt, which the first row still holds.
            cache.reorder(torch.zeros(len(part), dtype=torch.int64, device=device))
            # The prompt's last token predicts the first of each answer: it is read with them.
            input_ids = pad_rows([[prompt[-1], *answer[:-1]] for answer in part], 0).to(device)
            target_ids = pad_rows(part, IGNORED_TARGET).to(device)
            places = torch.arange(held, held + input_ids.shape[1], device=device)[None]
            call: dict[str, Any] = {"position_ids": places, "attention_mask": "causal", "cache": cache}
            losses = token_losses(model, input_ids, target_ids, **call)
            found += [row[: len(answer)].float().cpu() for row, answer in zip(losses, part, strict=True)]
    return found


def _read(model: BaseModel, input_ids: Tensor, cache: KeyValueCache) -> None:
    places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    model(input_ids, places, "causal", cache=cache, reads_only=True)
    cache.advance(input_ids.shape[1])


@contextmanager
def _with_cache(model: BaseModel) -> Iterator[None]:
    """Give a model a cache for a while, and leave it as it was."""
    lent: dict[str, BaseMixin] = {"scoring-reading": _ReadingMixin()}
    if not any(isinstance(mixin, StaticCacheMixin) for mixin in model.mixins.values()):
        lent["scoring-cache"] = StaticCacheMixin()
    added = []
    try:
        for name, mixin in lent.items():
            model.add_mixin(name, mixin.eval())
            added.append(name)
        yield
    finally:
        for name in added:
            model.del_mixin(name)
