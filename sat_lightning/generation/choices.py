"""Choosing among given continuations by their likelihood, as multiple-choice evaluations do.

Legend: n tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.generation.perplexity import IGNORED_TARGET, evaluating, token_losses
from sat_lightning.generation.scoring import Text, batched_losses, pad_rows, refuse_seeing, to_ids
from sat_lightning.generation.shared_prompt import SHORTEST_PROMPT, can_share, shared_losses

Normalisation = Literal["sum", "token", "byte", "unconditional"]
#: Logits that are built at a time where answers share a row.
_NUM_LOGITS = 1 << 28
NORMALISATIONS = ("sum", "token", "byte", "unconditional")


@dataclass(frozen=True)
class ChoiceScores:
    """How likely each choice of one question is."""

    token_losses: list[Tensor]
    """Nats of each token of each choice, `[n]`, fp32, on the CPU."""
    scores: Tensor
    """The logarithm of each choice's probability, normalised as asked, `[choices]`, fp64; the highest is the answer."""

    @property
    def best(self) -> int:
        """The index of the choice with the highest score, the first of equals."""
        return int(self.scores.argmax())


def score_choices(
    model: Any,  # noqa: ANN401
    questions: Sequence[tuple[Text, Sequence[Text]]],
    *,
    tokenizer: Any = None,  # noqa: ANN401
    normalise: Normalisation = "sum",
    unconditional_prompt: Text | None = None,
    prefix_ids: Sequence[int] | None = None,
    window_length: int | None = None,
    batch_size: int = 8,
    **kw: Any,
) -> list[ChoiceScores]:
    """Score the choices of questions: `log p(choice | prompt)`, in batches by length over all of them.

    Prompt and choice are cut into tokens as one text; what the prompt alone does not begin with is the choice's, as are
    spaces at the prompt's end. Choices of one prompt share what was made of it, as far as the model allows.

    Args:
        model: causal, or an encoder-decoder, whose encoder then reads the prompt.
        questions: of each, the prompt and its choices, as text or ids.
        tokenizer: turns text into ids; see `scoring.score`.
        normalise: "sum" is the logarithm of the probability itself; "token" and "byte" divide it by the choice's
            length, in favour of long ones; "unconditional" subtracts that behind `unconditional_prompt` ("Answer:"),
            in favour of rare ones.
        unconditional_prompt: see `normalise`.
        prefix_ids: stand before every prompt (for an encoder-decoder: the decoder's first tokens). Default: the end of
            a document where a prompt is empty and there is a tokenizer; 0, T5's start, for an encoder-decoder.
        window_length: of a prompt too long the beginning is left out. Default: `max_sequence_length`.
        batch_size: rows that are read at once.
        **kw: keywords of the call.

    Returns:
        One entry a question, in their order.

    Raises:
        InputError: a choice is empty, stands behind nothing or is longer than the window, or `normalise` does not fit.
    """
    _check(normalise, unconditional_prompt, questions)
    refuse_seeing(model, kw)
    reader = _Reader(model, tokenizer, prefix_ids, window_length or model.config.max_sequence_length)
    pairs = [reader.split(prompt, choice) for prompt, choices in questions for choice in choices]
    flat = [choice for _, choices in questions for choice in choices]
    losses = reader.losses(pairs, batch_size, kw)
    sums = [loss.double().sum() for loss in losses]
    if unconditional_prompt is not None:
        alone = [(to_ids(unconditional_prompt, tokenizer), answer) for _, answer in pairs]
        sums = [t - loss.double().sum() for t, loss in zip(sums, reader.losses(alone, batch_size, kw), strict=True)]
    lengths = [_length(choice, normalise, len(loss)) for choice, loss in zip(flat, losses, strict=True)]
    scores = torch.stack([-total / length for total, length in zip(sums, lengths, strict=True)])
    return [ChoiceScores(losses[part], scores[part]) for part in _split(len(choices) for _, choices in questions)]


def _length(choice: Text, normalise: str, num_tokens: int) -> int:
    num_bytes = len(str(choice).encode("utf-8", errors="surrogatepass"))
    return {"token": num_tokens, "byte": num_bytes}.get(normalise, 1)


def _split(counts: Iterable[int]) -> Iterator[slice]:
    stop = 0
    for count in counts:
        start, stop = stop, stop + count
        yield slice(start, stop)


class _Reader:
    """Turns prompts and choices into rows, and rows into losses."""

    def __init__(self, model: Any, tokenizer: Any, prefix_ids: Sequence[int] | None, window_length: int) -> None:  # noqa: ANN401
        self.model, self.tokenizer, self.window_length = model, tokenizer, window_length
        self.has_encoder = hasattr(model, "encode") and hasattr(model, "decode")
        self.prefix_ids = prefix_ids

    def split(self, prompt: Text, choice: Text) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of the choice behind it."""
        if isinstance(prompt, str) and isinstance(choice, str) and not self.has_encoder:
            stem = prompt.rstrip()
            before, whole = to_ids(stem, self.tokenizer), to_ids(prompt + choice, self.tokenizer)
            length = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
            before, answer = whole[:length], whole[length:]
        else:
            before, answer = to_ids(prompt, self.tokenizer), to_ids(choice, self.tokenizer)
        if not answer:
            raise InputError(f"A choice of the prompt {prompt!r} has no tokens. Leave it out, or give it some text.")
        return before, answer

    def with_prefix(self, before: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Put the prefix before a prompt, and leave out the beginning of what is too long."""
        if len(answer) > self.window_length:
            raise InputError(f"A choice has {len(answer)} tokens, the model reads {self.window_length} at once.")
        if self.has_encoder:
            if not before:
                raise InputError("A prompt is empty: the encoder has nothing to read. Give it at least one token.")
            return before[-self.window_length :], answer
        prefix = self.prefix_ids
        if prefix is None:
            prefix = [] if before or self.tokenizer is None else [self.tokenizer.end_of_document_id]
        if not [*prefix, *before]:
            raise InputError("A choice stands behind an empty prompt: nothing predicts it. Pass prefix_ids.")
        # The last token of a choice is predicted, not read.
        room = self.window_length - (len(answer) - 1) - len(prefix)
        before = before[-room:] if room > 0 else []
        return [*prefix, *before][-(self.window_length - len(answer) + 1) :], answer

    def losses(self, pairs: list[tuple[list[int], list[int]]], batch_size: int, kw: dict[str, Any]) -> list[Tensor]:
        """Return the losses of the tokens of every choice."""
        pairs = [self.with_prefix(*pair) for pair in pairs]
        if self.has_encoder:
            return _decoder_losses(self.model, pairs, list(self.prefix_ids or [0]), batch_size, kw)
        found = {} if kw or not can_share(self.model) else self._behind_one_prompt(pairs, batch_size)
        # Of the others, rows that are read alike are read once: the key is all that goes into the model.
        wanted: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for index, (before, answer) in enumerate(pairs):
            if index not in found:
                wanted.setdefault((*before, *answer[:-1]), {})[index] = answer
        found |= _merged_losses(self.model, wanted, batch_size, kw)
        return [found[index] for index in range(len(pairs))]

    def _behind_one_prompt(self, pairs: list[tuple[list[int], list[int]]], batch_size: int) -> dict[int, Tensor]:
        """Score answers of several tokens behind a prompt that is long enough to be worth keeping."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (before, _) in enumerate(pairs):
            groups.setdefault(tuple(before), []).append(index)
        found: dict[int, Tensor] = {}
        for prompt, indices in groups.items():
            answers = [pairs[index][1] for index in indices]
            if len(prompt) >= SHORTEST_PROMPT and len({tuple(answer[:-1]) for answer in answers}) > 1:
                losses = shared_losses(self.model, prompt, answers, batch_size)
                found |= zip(indices, losses or [], strict=losses is not None)
        return found


def _merged_losses(
    model: Any,  # noqa: ANN401
    wanted: dict[tuple[int, ...], dict[int, list[int]]],
    batch_size: int,
    kw: dict[str, Any],
) -> dict[int, Tensor]:
    """Score rows one answer each, and rows that several answers share by their logits at the last places."""
    found: dict[int, Tensor] = {}
    single = [(ids, *item) for ids, answers in wanted.items() if len(answers) == 1 for item in answers.items()]
    rows = [(ids, [IGNORED_TARGET] * (len(ids) - len(answer)) + answer) for ids, _, answer in single]
    for (_, index, _), losses in zip(single, batched_losses(model, rows, batch_size, kw), strict=True):
        found[index] = losses
    shared = sorted((ids for ids, answers in wanted.items() if len(answers) > 1), key=len, reverse=True)
    device = next(model.parameters()).device
    with evaluating(model):
        while shared:
            num_rows = min(batch_size, max(1, _NUM_LOGITS // (len(shared[0]) * model.config.vocab_size)))
            batch, shared = shared[:num_rows], shared[num_rows:]
            logits = model(pad_rows(batch, 0).to(device), **kw)[0]
            for row, ids in zip(logits, batch, strict=True):
                for index, answer in wanted[ids].items():
                    places = row[len(ids) - len(answer) : len(ids)].float().log_softmax(-1)
                    found[index] = -places.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0].cpu()
    return found


def _decoder_losses(
    model: Any,  # noqa: ANN401
    pairs: list[tuple[list[int], list[int]]],
    start_ids: list[int],
    batch_size: int,
    kw: dict[str, Any],
) -> list[Tensor]:
    """Score what a decoder writes; neighbours of one prompt share what the encoder made of it."""
    device, found = next(model.parameters()).device, []
    with evaluating(model):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            prompts = list(dict.fromkeys(tuple(before) for before, _ in batch))
            rows = torch.tensor([prompts.index(tuple(before)) for before, _ in batch], device=device)
            mask = (pad_rows(prompts, -1) >= 0).to(device)
            read = model.encode(pad_rows(prompts, 0).to(device), attention_mask=mask, **kw)[rows]
            targets = [[IGNORED_TARGET] * (len(start_ids) - 1) + answer for _, answer in batch]
            input_ids = pad_rows([start_ids + answer[:-1] for _, answer in batch], 0).to(device)
            cross = {"encoder_outputs": read, "cross_attention_mask": mask[rows][:, None, None]}
            losses = token_losses(
                _Decoder(model), input_ids, pad_rows(targets, IGNORED_TARGET).to(device), **cross, **kw
            )
            found += [
                row[len(start_ids) - 1 : len(target)].float().cpu() for row, target in zip(losses, targets, strict=True)
            ]
    return found


class _Decoder:
    """A decoder as a model that is called."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.decode = model.decode
        self.hooks = model.decoder.hooks

    def __call__(self, input_ids: Tensor, **kw: Any) -> Any:
        return self.decode(input_ids, **kw)


def _check(normalise: str, unconditional_prompt: Text | None, questions: Sequence[tuple[Text, Sequence[Text]]]) -> None:
    if normalise not in NORMALISATIONS:
        raise InputError(f"normalise is '{normalise}'. Choose one of {', '.join(NORMALISATIONS)}.")
    if (normalise == "unconditional") != (unconditional_prompt is not None):
        raise InputError(
            'normalise="unconditional" and unconditional_prompt belong together: the one says how choices are '
            'compared, the other behind what they are as likely as they always are ("Answer:").'
        )
    for prompt, choices in questions:
        if len(choices) == 0:
            raise InputError(f"The prompt {prompt!r} has no choices. Give at least one.")
        if normalise == "byte" and not all(isinstance(choice, str) for choice in choices):
            raise InputError('normalise="byte" counts the bytes of choices: give them as text.')
