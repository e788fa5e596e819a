"""Speculative decoding: a small model proposes tokens, the large one reads them at once and keeps what it would write.

The texts are those the large model alone would write: the same ones if greedy, of the same distribution if drawn
(Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023). Rows of a batch keep different
numbers of proposals; caches put their rows one beneath the other again after each round.

Legend: b rows, d proposed tokens, s tokens read at once, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.engine import _Batch, _Job
from sat_lightning.generation.options import Generation, GenerationOptions
from sat_lightning.generation.prompts import Prompt, check_lengths
from sat_lightning.generation.reader import RaggedReader
from sat_lightning.generation.rules import LogitsRules, check_end_tokens, check_range
from sat_lightning.generation.runner import Runner, find_model, longest_of, prepared, writer_of
from sat_lightning.generation.sampling import draw_from
from sat_lightning.generation.state import NO_TOKEN, DecodingState
from sat_lightning.generation.strategies import BaseStrategy
from sat_lightning.model import EncoderDecoderModel


@dataclass
class SpeculationCounts:
    """How well the draft proposes; pass one to `generate_speculatively` to have it filled."""

    num_rounds: int = 0
    """Calls of the large model, beside those that read the prompts."""
    num_proposed: int = 0
    """Tokens proposed to rows that were not done."""
    num_kept: int = 0
    """Of these, tokens kept."""


def generate_speculatively(
    model: Any,  # noqa: ANN401
    draft: Any,  # noqa: ANN401
    prompts: Sequence[Prompt] | Tensor,
    *,
    num_drafts: int = 4,
    strategy: BaseStrategy | None = None,
    tokenizer: Any = None,  # noqa: ANN401
    options: GenerationOptions | None = None,
    counts: SpeculationCounts | None = None,
    **changes: Any,  # noqa: ANN401
) -> list[Generation]:
    """Continue every prompt as `generate` does, in fewer calls of the model.

    Args:
        model: see `generate`.
        draft: a smaller model of the same vocabulary (and tokenizer).
        prompts: see `generate`.
        num_drafts: d, tokens proposed in each round.
        strategy: a `BaseStrategy`; it also chooses the proposals.
        tokenizer: see `generate`.
        options: see `generate`; texts that end by a stop string are cut when all are written.
        counts: is filled.
        **changes: see `generate`.

    Returns:
        A result for each prompt, in their order.

    Raises:
        ConfigError: if the models or the strategy do not go together with it, or as `generate`.
        InputError: as `generate`.
    """
    check_range("num_drafts", num_drafts, 1)
    job = _Job(model, prompts, strategy, tokenizer, GenerationOptions.read(options, changes))
    job.call = dataclasses.replace(job.call, num_spare=num_drafts + 1)
    small = find_model(draft)
    _check(job, small)
    results: dict[int, Generation] = {}
    with prepared(job.model), prepared(small):
        for indices in job.batches():
            batch = _SpeculativeBatch(job, indices, small, num_drafts, counts or SpeculationCounts())
            batch.run()
            results |= zip(indices, batch.results(), strict=True)
    return [results[index] for index in range(len(job.rows))]


def _check(job: _Job, draft: Any) -> None:  # noqa: ANN401
    if not isinstance(job.strategy, BaseStrategy) or type(job.strategy).step is not BaseStrategy.step:
        raise ConfigError(
            f"speculative decoding needs a BaseStrategy with its own step, which says how likely each token is; "
            f"{type(job.strategy).__name__} is none."
        )
    if draft is job.model:
        raise ConfigError("the draft is the model itself: nothing would be gained. Pass a smaller model.")
    if isinstance(draft, EncoderDecoderModel) != job.is_pair:
        raise ConfigError("of the model and its draft, one has an encoder: both must, or none.")
    sizes = job.model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}: they must agree."
        )
    check_lengths(job.begun, job.max_new_tokens, longest_of(writer_of(draft)))


def accept(probs: Tensor, draft_probs: Tensor, drafts: Tensor, chance: Tensor) -> Tensor:
    """Say how many proposals each row keeps: each with probability `min(1, p / q)`, up to the first that is refused.

    Args:
        probs: p, `[b, d + 1, v]`, of the model.
        draft_probs: q, `[b, d, v]`, which the proposals were drawn from.
        drafts: `[b, d]` ids.
        chance: `[b, d]` in [0, 1).

    Returns:
        `[b]`, from 0 to d.
    """
    places = drafts[..., None]
    p, q = (x.gather(-1, places)[..., 0] for x in (probs[:, :-1], draft_probs))
    return (chance * q < p).long().cumprod(1).sum(1)


def rest_after(probs: Tensor, draft_probs: Tensor, num_kept: Tensor) -> Tensor:
    """Take what the token behind the kept ones is drawn from: the part of p above q, or all of p if none was refused.

    Args:
        probs: p, `[b, d + 1, v]`.
        draft_probs: q, `[b, d, v]`.
        num_kept: `[b]`.

    Returns:
        Weights `[b, v]`.
    """
    rows, num_drafts = torch.arange(len(probs), device=probs.device), draft_probs.shape[1]
    p, q = probs[rows, num_kept], draft_probs[rows, num_kept.clamp(max=num_drafts - 1)]
    rest = (p - q.masked_fill((num_kept == num_drafts)[:, None], 0)).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # no rest, or a draft that is not a number


class _SpeculativeBatch(_Batch):
    """Some rows of a job on their way, several tokens a round."""

    def __init__(self, job: _Job, indices: list[int], draft: Any, num_drafts: int, counts: SpeculationCounts) -> None:  # noqa: ANN401
        super().__init__(job, indices)
        self.num_drafts, self.report, self.rules = num_drafts, counts, job.strategy
        sources = [job.rows[index] for index in indices]
        begin = job.options.decoder_start
        self.small = Runner(draft, sources, job.max_new_tokens, job.call, begin)
        self.looks_back = self.rules.looks_back or type(self.rules).process is not LogitsRules.process
        self.begin = self.state.prompt_length
        self.columns = torch.full((len(indices),), self.begin, device=self.state.tokens.device)
        """`[b]`, the first column of each row that is not certain."""
        self.tokens = F.pad(self.state.tokens, (0, num_drafts + 1), value=NO_TOKEN)
        """`[b, n + d + 1]`: each row's own tokens without a gap, proposals behind them."""
        self.generated = [0] * len(indices)
        """How many tokens of each row are certain."""
        self.is_active = [True] * len(indices)

    @torch.no_grad()
    def run(self) -> None:
        """Write until every row has ended."""
        self.state = self.rules.start(self.state)
        check_end_tokens(self.state, self.job.end_tokens, self.job.model.config.vocab_size)
        num_steps = self.tokens.shape[1] - self.begin
        self.chances = [
            torch.zeros(len(self.tokens), num_steps, device=self.tokens.device, dtype=torch.float64)
            if self.rules.is_greedy
            else self.state.more_uniforms(num_steps, stream=stream)
            for stream in (1, 2, 3)
        ]
        first = self.runner.read()[:, None]
        self.small.read()
        self.main, self.draft = RaggedReader(self.runner), RaggedReader(self.small)
        probs, best = self._probs(first, 0)
        self._write(
            draw_from(probs[:, 0], self._chance(2, 0)), torch.zeros(len(self.tokens), device=probs.device).long()
        )
        self._settle(torch.zeros_like(self.state.is_done, dtype=torch.int64), best)
        num_fed = 1
        while any(self.is_active):
            self._round(num_fed)
            num_fed = 2  # the draft has not read its last proposal: it reads one token again, in every row

    def _round(self, num_fed: int) -> None:
        proposals = self._propose(num_fed)
        drafts, draft_probs = (torch.stack(parts, dim=1) for parts in zip(*proposals, strict=True))
        newest = self.tokens.gather(1, self.columns[:, None] - 1)
        probs, best = self._probs(self.main.read(torch.cat([newest, drafts], dim=1)), 0)
        chance = torch.stack([self._chance(1, i) for i in range(self.num_drafts)], dim=1)
        num_kept = accept(probs, draft_probs, drafts, chance)
        places = (self.columns - self.begin + num_kept)[:, None]
        last = draw_from(rest_after(probs, draft_probs, num_kept), self.chances[2].gather(1, places)[:, 0])
        self._write(last, num_kept)
        before, was_active = list(self.generated), list(self.is_active)
        kept = self._settle(num_kept, best)
        self.report.num_rounds += 1
        self.report.num_proposed += self.num_drafts * sum(was_active)
        self.report.num_kept += sum(k for k, active in zip(kept, was_active, strict=True) if active)
        if any(self.is_active):
            added = [new - old for new, old in zip(self.generated, before, strict=True)]
            held = [count + n for count, n in zip(self.main.counts, added, strict=True)]
            self.main.keep(held, self.is_active)
            self.draft.keep([count - 1 for count in held], self.is_active)

    def _propose(self, num_fed: int) -> list[tuple[Tensor, Tensor]]:
        """Let the draft write d tokens behind the certain ones; returns each token `[b]` and what it was drawn from."""
        columns = self.columns[:, None] + torch.arange(-num_fed, 0, device=self.tokens.device)
        fed, found = self.tokens.gather(1, columns), []
        for i in range(self.num_drafts):
            probs, _ = self._probs(self.draft.read(fed.clamp(min=0))[:, -1:], i)
            token = draw_from(probs[:, 0], self._chance(0, i))
            self._write(token, torch.full_like(token, i))
            found.append((token, probs[:, 0]))
            fed = token[:, None]
        return found

    def _chance(self, stream: int, offset: int) -> Tensor:
        """`[b]`: each place of a row has numbers of its own, so that no other row's progress moves them."""
        return self.chances[stream].gather(1, (self.columns - self.begin + offset)[:, None])[:, 0]

    def _write(self, token: Tensor, offset: Tensor) -> None:
        self.tokens.scatter_(1, (self.columns + offset)[:, None], token[:, None])

    def _probs(self, logits: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """What the strategy would draw from, `[b, s, v]`, and the best logit `[b, s]`, s places behind the certain."""
        b, s, v = logits.shape
        if self.looks_back:
            rows = [self._alone(logits[r, i : i + 1], r, offset + i) for r in range(b) for i in range(s)]
            flat = torch.cat(rows)
        else:
            flat = self.rules.process(logits.float().flatten(0, 1), self.state)
        best, place = flat.max(-1)
        if self.rules.is_greedy:
            probs = torch.zeros_like(flat).scatter_(1, place[:, None], 1.0)
        else:
            probs = self.rules.filter(flat).softmax(-1)
        return probs.view(b, s, v), best.view(b, s)

    def _alone(self, logits: Tensor, row: int, offset: int) -> Tensor:
        """Apply rules that look back to one place of one row, as if it had been written up to there."""
        if not self.is_active[row]:
            return logits.float()
        length = self.begin + self.generated[row] + offset
        view = DecodingState(
            tokens=self.tokens[row : row + 1, :length],
            prompt_length=self.begin,
            length=length,
            is_done=self.state.is_done[row : row + 1],
            extras=self.state.extras,
            end_tokens=self.state.end_tokens,
            end_ids=self.state.end_ids,
        )
        return self.rules.process(logits.float(), view)

    def _settle(self, num_kept: Tensor, best: Tensor) -> list[int]:
        """Count what is certain now, the one look at the device in a round; returns how many proposals were kept."""
        device, size = self.tokens.device, best.shape[1]
        places = torch.arange(size, device=device)
        block = self.tokens.gather(1, self.columns[:, None] + places)
        is_end = torch.zeros_like(block, dtype=torch.bool)
        if self.state.end_tokens is not None:
            is_end = torch.isin(block, self.state.end_tokens) & (places <= num_kept[:, None])
        before_end = torch.where(is_end, places + 1, size).amin(1)
        room = self.job.max_new_tokens - (self.columns - self.begin)
        count = torch.minimum(torch.minimum(num_kept + 1, before_end), room).masked_fill(self.state.is_done, 0)
        failed = torch.where(~best.isfinite() & (places < count[:, None]), places, size).amin(1)
        self.state.is_done = self.state.is_done | is_end.any(1) | (count >= room)
        kept = torch.minimum(num_kept, count)
        report = torch.stack([count, self.state.is_done.long(), kept, failed], dim=1).tolist()
        for row, (_, _, _, place) in enumerate(report):
            if place < size:
                step = self.generated[row] + place
                place = self.state.row_ids[row]  # which of all prompts, whatever batch it is in
                raise InputError(f"step {step}, row {place}: the logits are NaN or infinite, or no token is allowed.")
        self.generated = [old + new for old, (new, *_) in zip(self.generated, report, strict=True)]
        self.columns = self.columns + count
        self.is_active = [not is_done for _, is_done, _, _ in report]
        every = torch.arange(self.tokens.shape[1], device=device)
        self.tokens.masked_fill_(every >= self.columns[:, None], NO_TOKEN)
        self.state.length = self.state.capacity
        self.state.tokens = self.tokens[:, : self.state.capacity]
        return [kept for _, _, kept, _ in report]
