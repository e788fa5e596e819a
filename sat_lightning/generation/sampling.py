"""Plain sampling: pure functions of logits and a generator.

Legend: b batch, s length, v vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sample_token(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token from each row of logits.

    Args:
        logits: `[b, v]`.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens. Default: all.
        generator: source of chance, on the device of the logits.

    Returns:
        Ids `[b]`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def draw_token(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token from each row with the row's own number, by the inverse of the cumulative distribution.

    Args:
        logits: `[b, v]`; a token of -inf is never drawn.
        uniforms: `[b]` in [0, 1).

    Returns:
        Ids `[b]`: the same for the same row and number, whatever rows are beside it.
    """
    return draw_from(logits.float().softmax(-1), uniforms)


def draw_from(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw as `draw_token` does, from weights `[b, v]` that need not add up to 1."""
    wide = torch.float32 if weights.device.type == "mps" else torch.float64
    cumulative = weights.to(wide).cumsum(-1)
    total = cumulative[:, -1:]
    # The largest number below the total: rounding must not lead behind the last possible token.
    places = torch.minimum(uniforms[:, None].to(wide) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, places, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


@torch.no_grad()
def sample_continuation(
    score: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    num_tokens: int,
    *,
    context_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row token by token, computing every context anew.

    Args:
        score: turns ids `[b, s]` into logits `[b, s, v]`.
        input_ids: `[b, s]`, at least one token.
        num_tokens: how many to add.
        context_length: how many of the latest tokens `score` sees.
        temperature: see `sample_token`.
        top_k: see `sample_token`.
        generator: see `sample_token`.

    Returns:
        Ids `[b, s + num_tokens]`.
    """
    for _ in range(num_tokens):
        logits = score(input_ids[:, -context_length:])[:, -1]
        token_ids = sample_token(logits, temperature=temperature, top_k=top_k, generator=generator)
        input_ids = torch.cat([input_ids, token_ids[:, None]], dim=1)
    return input_ids
