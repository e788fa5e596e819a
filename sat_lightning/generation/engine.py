"""Write on from prompts: many at once, of different lengths, each as if it were alone.

    results = generate(model, ["Once upon", "The"], tokenizer=tokenizer, max_new_tokens=64, end_tokens=[0])
    results[0].text, results[0].tokens, results[0].finish

Rows are padded on the left and hidden from each other's padding, so a row's tokens do not depend on its company. The
model is in eval mode with a `StaticCacheMixin` for the time of the call, and left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.constraints import allow_only
from sat_lightning.generation.options import Finish, Generation, GenerationOptions, Streamed
from sat_lightning.generation.packed import PackedWeights, plan_products
from sat_lightning.generation.prompts import Prompt, batches_of, check_lengths, check_rows, read_prompts
from sat_lightning.generation.rules import read_end_tokens
from sat_lightning.generation.runner import CallOptions, Runner, find_model, kept_dtype, longest_of, prepared, writer_of
from sat_lightning.generation.state import DecodingState
from sat_lightning.generation.strategies import greedy
from sat_lightning.generation.text import RowText
from sat_lightning.model import BaseModel, EncoderDecoderModel
from sat_lightning.model.adapter_ids import refuse_unknown_ids


def generate(
    model: Any,  # noqa: ANN401 - a model, or what wraps one
    prompts: Sequence[Prompt] | Tensor,
    *,
    strategy: Any = None,  # noqa: ANN401
    tokenizer: Any = None,  # noqa: ANN401
    options: GenerationOptions | None = None,
    **changes: Any,  # noqa: ANN401
) -> list[Generation]:
    """Continue every prompt.

    Args:
        model: a `BaseModel`, an `EncoderDecoderModel` (prompts are the encoder's), or a task that holds one.
        prompts: texts, lists of ids, or tensors `[s]`, of any lengths.
        strategy: how tokens are chosen, see `BaseStrategy`. Default: the most likely one.
        tokenizer: has `encode(text)` and `decode(ids)`; needed for texts and stop strings.
        options: see `GenerationOptions`.
        **changes: fields of `GenerationOptions`: `max_new_tokens`, `end_tokens`, `stop_strings`, `seed`, ...

    Returns:
        A result for each prompt, in their order.

    Raises:
        InputError: for an empty prompt, one that does not fit the model, ids outside the vocabulary, or logits that
            are not finite.
        ConfigError: for an option out of its range or unknown.
    """
    job = _Job(model, prompts, strategy, tokenizer, GenerationOptions.read(options, changes))
    results: dict[int, Generation] = {}
    with prepared(job.model, job.packed()):
        for indices in job.batches():
            batch = _Batch(job, indices)
            for _ in batch.steps():
                pass
            results |= zip(indices, batch.results(), strict=True)
    return [results[index] for index in range(len(job.rows))]


def stream(
    model: Any,  # noqa: ANN401
    prompts: Sequence[Prompt] | Tensor,
    *,
    strategy: Any = None,  # noqa: ANN401
    tokenizer: Any = None,  # noqa: ANN401
    options: GenerationOptions | None = None,
    **changes: Any,  # noqa: ANN401
) -> Iterator[Streamed]:
    """Continue every prompt, and yield each token of each row as it comes.

    The model stays prepared until the last token, or until the iterator is closed.

    Args:
        model: this and the others as in `generate`; a strategy that revises what it wrote (beam search) cannot be
            followed.
        prompts: see above.
        strategy: see above.
        tokenizer: see above.
        options: see above; `check_every` is how many tokens of a row come at once.
        **changes: see above.

    Raises:
        InputError: as `generate`, for the prompts at once.
    """
    return _stream(_Job(model, prompts, strategy, tokenizer, GenerationOptions.read(options, changes)))


def _stream(job: _Job) -> Iterator[Streamed]:
    with prepared(job.model, job.packed()):
        for indices in job.batches():
            batch = _Batch(job, indices, is_streamed=True)
            for _ in batch.steps():
                yield from batch.take_new()


class _Job:
    """The checked input of a call."""

    def __init__(
        self,
        model: Any,
        prompts: Any,
        strategy: Any,
        tokenizer: Any,
        options: GenerationOptions,  # noqa: ANN401
    ) -> None:
        self.model: BaseModel | EncoderDecoderModel = find_model(model)
        self.strategy, self.tokenizer, self.options = _read_strategy(strategy), tokenizer, options
        if options.allowed_tokens is not None:
            self.strategy = allow_only(self.strategy, options.allowed_tokens)
        self.rows = read_prompts(prompts, tokenizer)
        check_rows(self.rows, self.model.config.vocab_size)
        self.row_ids = range(len(self.rows)) if options.row_ids is None else options.row_ids
        for name, given in (("row_ids", self.row_ids), ("adapter_ids", options.adapter_ids)):
            if given is not None and len(given) != len(self.rows):
                raise InputError(f"{name} has {len(given)} entries for {len(self.rows)} prompts: give one a prompt.")
        refuse_unknown_ids(self.model, [] if options.adapter_ids is None else list(map(int, options.adapter_ids)))
        if options.stop_strings and tokenizer is None:
            raise InputError("stop_strings are found in text: pass tokenizer=.")
        writer = writer_of(self.model)
        self.is_pair = isinstance(self.model, EncoderDecoderModel)
        self.begun = [list(options.decoder_start)] if self.is_pair else self.rows
        longest = longest_of(writer)
        room = 256 if longest is None else min(256, longest - max(map(len, self.begun), default=0))
        self.max_new_tokens = max(room, 1) if options.max_new_tokens is None else options.max_new_tokens
        check_lengths(self.begun, self.max_new_tokens, longest)
        if self.is_pair:
            check_rows(self.begun, writer.config.vocab_size, "decoder_start")
            check_lengths(self.rows, 0, longest_of(self.model.encoder))  # type: ignore[arg-type]
        own = getattr(tokenizer, "end_of_document_id", None)
        defaults = () if own is None else (own,)
        self.end_tokens = read_end_tokens(defaults if options.end_tokens is None else options.end_tokens)
        self.all_ends = {*self.end_tokens, *read_end_tokens(getattr(self.strategy, "end_tokens", None))}
        self.call = CallOptions(
            cache_dtype=options.stored_dtype or kept_dtype(self.model),
            prefill_chunk=options.prefill_chunk, visibility=options.visibility,
            compiled=options.backend, model_kw=options.model_kw, prompt_kw=options.prompt_kw,
        )  # fmt: skip

    def call_of(self, indices: list[int]) -> CallOptions:
        """Return how the model is called for some of the prompts."""
        ids = self.options.adapter_ids
        chosen = {} if ids is None else {"adapter_ids": torch.tensor([int(ids[index]) for index in indices])}
        return replace(self.call, row_kw=chosen)

    def packed(self) -> PackedWeights | None:
        """Return how the weights are multiplied by, if not as ever."""
        num_rows = min(len(self.rows), self.options.batch_size or len(self.rows))
        wish, backend = self.options.pack_weights, self.options.backend
        return plan_products(self.model, num_rows, self.max_new_tokens, wish, backend)

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of the prompts of each batch."""
        return batches_of(self.rows, self.options.batch_size)


def _read_strategy(strategy: Any) -> Any:  # noqa: ANN401
    if strategy is None:
        return greedy()
    if isinstance(strategy, type) or not all(hasattr(strategy, name) for name in ("start", "step", "finalize")):
        kind = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {type(strategy).__name__}"
        cure = "SAT's forward(logits, tokens, mems) runs in filling_sequence." if hasattr(strategy, "forward") else ""
        raise ConfigError(
            f"strategy is {kind}; it must be an object with start, step and finalize, such as "
            f"BaseStrategy(temperature=0.8). {cure}".rstrip()
        )
    return strategy


class _Batch:
    """Some rows of a job on their way."""

    def __init__(self, job: _Job, indices: list[int], is_streamed: bool = False) -> None:
        self.job, self.indices, self.is_streamed = job, indices, is_streamed
        rows = [job.rows[index] for index in indices]
        self.runner = Runner(job.model, rows, job.max_new_tokens, job.call_of(indices), job.options.decoder_start)
        row_ids = [job.row_ids[index] for index in indices]
        self.state = DecodingState.create(
            self.runner.prompts, job.max_new_tokens, seed=job.options.seed, row_ids=row_ids, end_tokens=job.end_tokens
        )
        self.texts = [self._new_text(row) for row in range(len(rows))]
        self.finishes: list[Finish | None] = [None] * len(rows)
        self.num_read = self.state.length

    @torch.no_grad()
    def steps(self) -> Iterator[None]:
        """Write token by token, and pause where the device is asked whether all have ended."""
        strategy, runner, options = self.job.strategy, self.runner, self.job.options
        logits = runner.read()
        self.state = strategy.start(self.state)
        rows = self.state.extras.get("beam_indices")
        if rows is not None:
            runner.reorder(rows)
            logits = logits.index_select(0, rows)
        while True:
            next_tokens, self.state = strategy.step(logits, self.state)
            state = self.state
            state.append(next_tokens)
            rows = state.extras.get("beam_indices")
            if rows is not None:
                if self.is_streamed:
                    raise InputError(f"{type(strategy).__name__} revises what it wrote: use generate, not stream.")
                runner.reorder(rows)
            is_last = state.length == state.capacity
            if is_last or state.num_generated % options.check_every == 0:
                is_over = state.all_done() or is_last  # which raises before useless tokens are shown
                if self.is_streamed:
                    yield
                elif rows is None and options.stop_strings:
                    for _ in self.take_new():
                        pass
                if is_over or None not in self.finishes:
                    return
            logits = runner.step(next_tokens)

    def take_new(self) -> Iterator[Streamed]:
        """Read the tokens written since, end rows at stop strings, and say what is new."""
        columns = self.state.tokens[:, self.num_read : self.state.length].T.tolist()
        last_column = self.state.capacity - 1
        for column, tokens in enumerate(columns, start=self.num_read):
            for row, token in enumerate(tokens):
                if token < 0 or self.finishes[row] is not None:
                    continue
                text = "" if self.job.tokenizer is None else self._text_of(row, token)
                if token in self.job.all_ends:
                    self.finishes[row] = "end"
                elif self.texts[row].is_stopped:
                    self.finishes[row] = "stop"
                    self.state.is_done[row] = True
                elif column == last_column:
                    self.finishes[row] = "length"
                if self.finishes[row] is not None and self.job.tokenizer is not None:
                    text += self.texts[row].close()
                yield Streamed(self.indices[row], token, text, self.finishes[row])
        self.num_read = self.state.length

    def results(self) -> list[Generation]:
        """Take what the strategy made of each prompt."""
        found = self.job.strategy.finalize(self.state)
        return [
            self._generation(row, [self._read(row, hypothesis) for hypothesis in hypotheses])
            for row, hypotheses in enumerate(found)
        ]

    def _new_text(self, row: int) -> RowText:
        before = [] if self.job.is_pair or self.job.tokenizer is None else self.runner.rows[row]
        return RowText(self.job.tokenizer, self.job.options.stop_strings, before)

    def _text_of(self, row: int, token: int) -> str:
        return "" if token in self.job.all_ends else self.texts[row].add([token])

    def _read(self, row: int, hypothesis: Any) -> Generation:  # noqa: ANN401
        tokens = hypothesis.tokens.tolist()[len(self.runner.rows[row]) :]
        prompt, finish, text = self.job.rows[self.indices[row]], "length", None
        if tokens and tokens[-1] in self.job.all_ends:
            finish = "end"
        if self.job.tokenizer is not None:
            reader = self._new_text(row)
            text = reader.add(tokens[:-1] if finish == "end" else tokens) + reader.close()
            if reader.is_stopped:
                tokens, finish = tokens[: reader.num_tokens], "stop"
        return Generation(prompt, tokens, finish, text, hypothesis.score)  # type: ignore[arg-type]

    @staticmethod
    def _generation(row: int, found: list[Generation]) -> Generation:
        best, *others = found
        return Generation(**{**vars(best), "alternatives": tuple(others)})
