"""Fill the slots of one text, as SAT's `filling_sequence`: given tokens stay, -1 is written.

Legend: b rows, n tokens and slots of the text, v vocabulary.

    seq     [ 20, 29, -1, -1,  7, -1 ]
    step 0    feed 20 29                      -> writes seq[2]
    step 1    feed seq[2]       on top of mems -> writes seq[3], and 7 follows as it is given
    step 2    feed seq[3] 7     on top of mems -> writes seq[5], which is never fed
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation.lent_cache import LentCache
from sat_lightning.generation.memory import Memory
from sat_lightning.generation.runner import find_model
from sat_lightning.generation.slots import Slots, get_masks_and_position_ids_default
from sat_lightning.generation.state import NO_TOKEN, DecodingState
from sat_lightning.generation.strategies import BaseStrategy
from sat_lightning.model import EncoderDecoderModel
from sat_lightning.nn.masks import read_padding

Step = tuple[Tensor, Tensor | None]


def filling_sequence(
    model: Any,  # noqa: ANN401 - a model, or a function of the same call
    seq: Tensor,
    batch_size: int = 1,
    strategy: Any = None,  # noqa: ANN401
    max_memory_length: int = 100000,
    log_attention_weights: Tensor | None = None,
    get_masks_and_position_ids: Callable[..., Any] = get_masks_and_position_ids_default,
    mems: Tensor | None = None,
    *,
    num_forgotten: int = 0,
    seed: int | None = None,
    **kw: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Write every slot of a text, and return the text and the memory of it.

    The model is called in eval mode; if it has no `CachedAutoregressiveMixin`, it has one during its calls.

    Args:
        model: a `BaseModel`, a task that holds one, or an `EncoderDecoderModel` with `enc_input_ids` (and
            `enc_attention_mask`) or `encoder_outputs` among `kw`: `seq` is the decoder's text.
        seq: `[n]` ids, and -1 in the slots to fill; at least the first is given.
        batch_size: how many texts to write, b; each is drawn by itself.
        strategy: a `BaseStrategy`, or an object written for SAT, with `forward(logits, tokens, mems)`, `is_done` and
            `finalize(tokens, mems)`, of which each call runs a copy. Default: `BaseStrategy()`, which draws.
        max_memory_length: how many of the newest positions later steps see. Positions are not moved by it.
        log_attention_weights: added to the scores, `[.., n|1, n|1]`.
        get_masks_and_position_ids: of `seq` to `(tokens [1, n], attention_mask [1, 1, n, n], position_ids)`; the mask
            is in the model's own words. Default: causal, or what the family makes of the ids itself.
        mems: of an earlier call: the model then is fed from `seq[mems.shape[2]]` on.
        num_forgotten: how many positions that call forgot, if `max_memory_length` was shorter than its text.
        seed: of the draws. Default: one from torch's global generator.
        **kw: reach every call of the model.

    Returns:
        Tokens `[b, n]`, given ones included, shorter if every row has ended before, -1 behind the end of a row; and
        mems `[num_layers, b, t, w]` of all but the last token. Of beam search: a list of texts `[length]`, best first,
        and None; with `consider_end=False` the running beams and their mems.

    Raises:
        InputError: for a text that is empty, not 1-D, begins with a slot or has none, is longer than the model, or has
            ids outside the vocabulary; for mems that do not fit; for logits that are not finite.
    """
    memory = Memory(mems, max_memory_length, num_forgotten)
    model, kw = _writer(model, kw)
    slots = Slots.read(getattr(model, "_orig_mod", model), seq, get_masks_and_position_ids, log_attention_weights)
    filling = _Filling(model, slots, memory, strategy, batch_size, seed, kw)
    for _ in filling.steps():
        pass
    return filling.finish()


def stream_filling_sequence(
    model: Any,  # noqa: ANN401
    seq: Tensor,
    batch_size: int = 1,
    strategy: Any = None,  # noqa: ANN401
    max_memory_length: int = 100000,
    log_attention_weights: Tensor | None = None,
    get_masks_and_position_ids: Callable[..., Any] = get_masks_and_position_ids_default,
    mems: Tensor | None = None,
    *,
    num_forgotten: int = 0,
    seed: int | None = None,
    **kw: Any,  # noqa: ANN401
) -> Iterator[Step]:
    """Yield (tokens so far `[b, t + 1]`, mems `[num_layers, b, t, w]`) after every token that is written.

    Between two tokens the model is as it was. `strategy.finalize` is left to the caller.

    Args:
        model: this and all others as in `filling_sequence`.
        seq: see above.
        batch_size: see above.
        strategy: see above.
        max_memory_length: see above.
        log_attention_weights: see above.
        get_masks_and_position_ids: see above.
        mems: see above.
        num_forgotten: see above.
        seed: see above.
        **kw: see above.

    Raises:
        InputError: as `filling_sequence`; for the text and the mems at once.
    """
    memory = Memory(mems, max_memory_length, num_forgotten)
    model, kw = _writer(model, kw)
    slots = Slots.read(getattr(model, "_orig_mod", model), seq, get_masks_and_position_ids, log_attention_weights)
    return _Filling(model, slots, memory, strategy, batch_size, seed, kw).steps()


class _Filling:
    """One call on its way."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        slots: Slots,
        memory: Memory,
        strategy: Any,  # noqa: ANN401
        batch_size: int,
        seed: int | None,
        kw: dict[str, Any],
    ) -> None:
        self.model, self.slots, self.memory, self.kw = model, slots, memory, kw
        self.strategy, self.is_sat_style = _read_strategy(strategy)
        has_beams = hasattr(self.strategy, "num_beams")
        num_rows = max(batch_size, self.strategy.num_beams) if has_beams and self.is_sat_style else batch_size
        prompt = slots.prompt
        prompt = prompt if has_beams and not self.is_sat_style else _expand(prompt, num_rows)
        self.state = DecodingState.create(prompt, len(slots) - prompt.shape[1], seed=seed)
        if not self.is_sat_style:
            self.state = self.strategy.start(self.state)
        slots.check_memory(memory.mems, memory.next, len(self.state.tokens))
        sources = [slots.num_rows, memory.num_rows, _num_rows(kw.get("encoder_outputs"))]
        self.is_shared = max(sources) == 1
        """Whether one row stands for all, as before the first draw."""

    def steps(self) -> Iterator[Step]:
        """Write slot by slot."""
        lent = LentCache(self.model)
        while self.state.length < len(self.slots):
            given = self.slots.ids[self.state.length]
            if given >= 0:
                self._keep(given)
                continue
            with torch.no_grad():
                with lent.speaking():
                    logits = self._score()
                is_over = self._write(logits)
            yield self.state.tokens[:, : self.state.length].clone(), self.memory.mems
            if is_over:
                return

    def finish(self) -> Any:  # noqa: ANN401
        """Return what SAT's strategies return: tokens and mems, or the texts of beams, best first."""
        tokens = self.state.tokens[:, : self.state.length]
        if self.is_sat_style:
            return self.strategy.finalize(tokens, self.memory.mems)
        is_plain = type(self.strategy).finalize is BaseStrategy.finalize
        if is_plain or not getattr(self.strategy, "consider_end", True):  # rows as they run, beams best first
            return tokens, self.memory.mems
        found = self.strategy.finalize(self.state)
        return [hypothesis.tokens for row in found for hypothesis in row], None

    def _keep(self, given: int) -> None:
        """Let a given token follow, in rows that have not ended."""
        state = self.state
        state.tokens[:, state.length] = torch.where(state.is_done, NO_TOKEN, given)
        state.length += 1

    def _score(self) -> Tensor:
        """Feed what is not in the memory yet; returns the logits `[b, v]` of the slot."""
        state, memory = self.state, self.memory
        first, start, stop = memory.first, memory.next, state.length
        tokens = state.tokens[:1] if self.is_shared else state.tokens
        part = self.slots.part(first, start, stop)
        ids = tokens[:, start:stop].clamp(min=0)
        logits, *layers = self.model(input_ids=ids, mems=memory.mems, **part, **self.kw)
        missing = [i for i, layer in enumerate(layers) if "mem_kv" not in layer]
        if missing or not layers:
            raise InputError(
                f"layers {missing} gave no mem_kv: a hook of theirs never reaches the cache's attention_fn."
            )
        memory.extend([layer["mem_kv"] for layer in layers], len(self.slots) - 1 - stop)
        if isinstance(self.kw.get("encoder_outputs"), Tensor):
            self.kw["encoder_outputs"] = [layer.get("mem_cross") for layer in layers]
        self.is_shared = False
        return logits[:, -1].expand(len(state.tokens), -1)

    def _write(self, logits: Tensor) -> bool:
        """Let the strategy choose; returns whether all rows have ended, the one look at the device of a step."""
        state, memory = self.state, self.memory
        state.note_best(logits.max(-1).values)
        if not self.is_sat_style:
            next_tokens, self.state = self.strategy.step(logits, state)
            self.state.append(next_tokens)
            rows = self.state.extras.get("beam_indices")
            if rows is not None:
                memory.reorder(rows)
            return self.state.all_done()
        state.all_done()  # it must not draw from logits that are no numbers
        tokens, mems = self.strategy.forward(logits, state.tokens[:, : state.length], memory.mems)
        if mems is not None and mems is not memory.mems:
            memory.replace(mems)
        state.length = tokens.shape[1]
        state.tokens = F.pad(tokens, (0, len(self.slots) - state.length), value=NO_TOKEN)
        return bool(self.strategy.is_done)


def _writer(model: Any, kw: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
    """Take the model out of a task, and of a pair the decoder, which reads what the encoder made of `enc_input_ids`."""
    if isinstance(model, torch.nn.Module) and not hasattr(model, "_orig_mod"):
        model = find_model(model)
    if not isinstance(model, EncoderDecoderModel):
        return model, kw
    source, mask = kw.pop("enc_input_ids", None), kw.pop("enc_attention_mask", None)
    if source is None and kw.get("encoder_outputs") is None:
        raise InputError("an encoder-decoder model needs what to read: pass enc_input_ids= or encoder_outputs=.")
    if source is not None:
        was_training = model.encoder.training
        try:
            with torch.no_grad():
                model.encoder.eval()
                kw["encoder_outputs"] = model.encode(source, attention_mask=mask)
        finally:
            model.encoder.train(was_training)
        kw.setdefault("cross_attention_mask", read_padding(mask, source))
    return model.decoder, kw


def _read_strategy(strategy: Any) -> tuple[Any, bool]:  # noqa: ANN401
    """Return the strategy, and whether it is written as SAT's are: then a copy, for it keeps its state in itself."""
    strategy = BaseStrategy() if strategy is None else strategy
    has_step, has_forward = hasattr(strategy, "step"), hasattr(strategy, "forward")
    if not (has_step or has_forward):
        raise ConfigError(
            f"strategy is a {type(strategy).__name__}: it has neither step(logits, state), as a BaseStrategy, nor "
            "SAT's forward(logits, tokens, mems)."
        )
    is_ours = isinstance(strategy, BaseStrategy)
    if not (type(strategy).forward is not BaseStrategy.forward if is_ours else has_forward and not has_step):
        return strategy, False
    strategy = copy.copy(strategy)
    if is_ours:
        strategy.forget()
    return strategy, True


def _expand(prompt: Tensor, num_rows: int) -> Tensor:
    if num_rows < 1 or prompt.shape[0] not in (1, num_rows):
        raise InputError(f"batch_size is {num_rows}, the text has {prompt.shape[0]} row(s): pass 1 row, or as many.")
    return prompt.expand(num_rows, -1)


def _num_rows(outputs: Any) -> int:  # noqa: ANN401
    return outputs.shape[0] if isinstance(outputs, Tensor) else 1
