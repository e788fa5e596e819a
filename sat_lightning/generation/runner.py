"""One batch on its way through a model with a cache: the prompts at once, then token by token.

Legend: b rows, s columns of the prompts, n columns in all, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sat_lightning.errors import InputError
from sat_lightning.generation.layout import Visibility, lay_out
from sat_lightning.generation.packed import PackedWeights
from sat_lightning.generation.prompts import pad_left, pad_right
from sat_lightning.hooks import non_conflict
from sat_lightning.mixins import KeyValueCache, LocalAttentionMixin, StaticCacheMixin
from sat_lightning.model import BaseMixin, BaseModel, ComposedModel, EncoderDecoderModel
from sat_lightning.model.unfinished_kernels import drop_unfinished_kernels
from sat_lightning.nn.linear import Embedding

#: The name under which a model that is prepared has it.
_LAST_TOKEN = "generation-last-token"


class LastTokenMixin(BaseMixin):
    """Score only the last tokens: the head is the largest linear, and of a prompt one row of its result is read.

    Args:
        multiply: see `nn.head.project`. Default: its own.
    """

    def __init__(self, multiply: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.how = {} if multiply is None else {"multiply": multiply}
        self.num_users, self.modes, self.added = 0, dict[torch.nn.Module, bool](), list[str]()  # see `prepared`

    @non_conflict
    def final_forward(self, logits: Tensor, *, old_impl: Callable[..., Any], num_logits: int = 1, **kw: Any) -> Any:  # noqa: ANN401
        """Cut `[b, s, c]` to `[b, num_logits, c]` first."""
        return old_impl(logits[:, -num_logits:], **kw, **self.how)


@dataclass
class CallOptions:
    """How the model is called."""

    cache_dtype: torch.dtype | None = None
    prefill_chunk: int | None = None
    visibility: Visibility = None
    compiled: str | None = None
    num_spare: int = 0  # slots of the cache for tokens that are read and may be forgotten
    model_kw: dict[str, Any] = field(default_factory=dict)
    row_kw: dict[str, Tensor] = field(default_factory=dict)  # one value a row
    prompt_kw: dict[str, Any] = field(default_factory=dict)


def find_model(model: Any) -> BaseModel | EncoderDecoderModel:  # noqa: ANN401
    """Look for the model inside what wraps it: a task, a compiled or a parallel module.

    Raises:
        InputError: if there is none that writes text.
    """
    found = model
    while not isinstance(found, (BaseModel, ComposedModel)):
        inner = [getattr(found, name, None) for name in ("_orig_mod", "module", "model")]
        found = next((part for part in inner if isinstance(part, torch.nn.Module)), None)
        if found is None:
            raise InputError(f"A {type(model).__name__} is no model, and holds none as `model` or `module`.")
    if isinstance(found, ComposedModel) and not isinstance(found, EncoderDecoderModel):
        raise InputError(f"A {type(found).__name__} writes no text; of composed models an EncoderDecoderModel does.")
    return found


def writer_of(model: BaseModel | EncoderDecoderModel) -> BaseModel:
    """Return the part that writes: the decoder, where there is an encoder."""
    return model.decoder if isinstance(model, EncoderDecoderModel) else model


def longest_of(model: BaseModel) -> int | None:
    """Return how many positions a model can number, None where there is no limit."""
    has_table = isinstance(model.transformer.position_embeddings, Embedding)
    return model.config.max_sequence_length if has_table else None


def windows_of(model: BaseModel) -> dict[int, int]:
    """Return by layer how many keys a query sees, where that is a window."""
    found: dict[int, int] = {}
    for mixin in model.mixins.values():
        if isinstance(mixin, LocalAttentionMixin):
            found |= {i: min(window, found.get(i, window)) for i, window in enumerate(mixin.windows) if window}
    return found


def kept_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """Return in which dtype keys and values are best kept: on a CPU attention in bf16 takes far longer than in fp32."""
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" and parameter.dtype is torch.bfloat16 else None


@contextmanager
def prepared(model: BaseModel | EncoderDecoderModel, packed: PackedWeights | None = None) -> Iterator[None]:
    """Put a model in eval mode with a cache, and leave it afterwards as it was, whatever happens.

    Where several generations run over one model in turns, the first prepares it and the last leaves it as it was.

    Args:
        model: the model.
        packed: serves its linears, if there is one.
    """
    writer = writer_of(model)
    found: Any = writer.mixins[_LAST_TOKEN] if _LAST_TOKEN in writer.mixins else None
    last = found if found is not None else LastTokenMixin(None if packed is None else packed.function)
    for module in model.modules():
        last.modes.setdefault(module, module.training)
    last.num_users += 1
    try:
        if last.num_users == 1:
            _add_mixins(writer, last)
        model.eval()
        with nullcontext() if packed is None else packed.serve(writer):
            yield
    finally:
        last.num_users -= 1
        if last.num_users == 0:
            for name in last.added:
                writer.del_mixin(name)
            for module, mode in last.modes.items():
                module.training = mode


def _add_mixins(writer: BaseModel, last: LastTokenMixin) -> None:
    own: dict[str, BaseMixin] = {_LAST_TOKEN: last}
    if not any(isinstance(mixin, StaticCacheMixin) for mixin in writer.mixins.values()):
        own["generation-cache"] = StaticCacheMixin()
    for name, mixin in own.items():
        writer.add_mixin(name, mixin.eval())
        last.added.append(name)


def _forward(call: Any, ids: Tensor, places: Tensor | None, mask: Any, cache: KeyValueCache, kw: Any) -> Tensor:  # noqa: ANN401
    """Run the model: ids `[b, s]` to logits `[b, v]` of the last."""
    return call(ids, position_ids=places, attention_mask=mask, cache=cache, **kw)[0][:, -1]


@functools.cache
def compiled_forward(backend: str) -> Any:  # noqa: ANN401
    """Return the forward compiled once for all lengths; the compiler keeps what it made for each model."""
    if backend == "inductor":
        drop_unfinished_kernels()
    # A step is short: to verify the sizes of each of its tensors takes a few percent of it.
    options: dict[str, Any] | None = {"size_asserts": False} if backend == "inductor" else None
    return torch.compile(_forward, dynamic=True, fullgraph=True, backend=backend, options=options)


class Runner:
    """The calls of one batch.

    Args:
        model: prepared by `prepared`.
        rows: the prompts (the encoder's, where there is one).
        max_new_tokens: how many tokens are written at most.
        options: how to call.
        start: what an encoder-decoder's decoder begins with.
    """

    def __init__(
        self,
        model: BaseModel | EncoderDecoderModel,
        rows: Sequence[list[int]],
        max_new_tokens: int,
        options: CallOptions,
        start: Sequence[int] = (0,),
    ) -> None:
        self.model, self.writer, self.options = model, writer_of(model), options
        self.device = next(model.parameters()).device
        self.sources = list(rows)
        self.rows = [list(start)] * len(rows) if isinstance(model, EncoderDecoderModel) else list(rows)
        self.prompts = pad_left(self.rows, self.device)
        """`[b, s]` ids, -1 where there is padding."""
        self.num_prompt = self.prompts.shape[1]
        capacity = self.num_prompt + max_new_tokens
        visibility = "causal" if isinstance(model, EncoderDecoderModel) else options.visibility
        self.layout = lay_out(self.writer, self.rows, capacity, visibility)
        lengths = torch.tensor([len(row) for row in self.rows])
        padding = None if min(map(len, self.rows)) == self.num_prompt else (self.num_prompt - lengths).to(self.device)
        self.cache = KeyValueCache(
            capacity + options.num_spare,
            dtype=options.cache_dtype, padding=padding, windows=windows_of(self.writer), num_spare=options.num_spare,
        )  # fmt: skip
        self.cross: dict[str, Any] = {}
        self.row_kw = {name: value.to(self.device) for name, value in options.row_kw.items()}
        self.positions = self.layout.position_ids
        self._step = compiled_forward(options.compiled) if options.compiled else _forward

    def read(self) -> Tensor:
        """Read the prompts; returns logits `[b, v]` of what follows."""
        prompt_kw = self.options.prompt_kw
        if isinstance(self.model, EncoderDecoderModel):
            self._encode(self.model, prompt_kw)
            prompt_kw = {}
        ids = self.prompts.clamp(min=0)
        mask, size = self.layout.prompt_mask, self.options.prefill_chunk or self.num_prompt
        if isinstance(mask, Tensor) or mask is None or prompt_kw:
            size = self.num_prompt  # the prompt sees itself, also what a later part would bring
        logits = ids
        for start in range(0, self.num_prompt, size):
            logits = self._call(ids[:, start : start + size], mask, prompt_kw)
        missing = [i for i in range(self.writer.config.num_layers) if i not in self.cache.layers]
        if missing:
            raise InputError(
                f"{type(self.writer).__name__}: attention of layers {missing} never reached the cache, so nothing can "
                f"be generated with it. attention_forward: {self.writer.hook_origins['attention_forward']}."
            )
        if self.cross:
            self.cross["encoder_outputs"] = self.cache.cross
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each row, `[b]`; returns logits `[b, v]` of what follows."""
        return self._call(tokens[:, None], self.layout.later_mask, {}, forward=self._step)

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from row `rows[i]`, `[b]`; their number may change."""
        self.cache.reorder(rows)
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = self.positions.index_select(0, rows)
        self.row_kw = {name: value.index_select(0, rows) for name, value in self.row_kw.items()}
        if self.cross:
            mask = self.cross["cross_attention_mask"]
            mask = None if mask is None else mask.index_select(0, rows)
            self.cross = {"cross_attention_mask": mask, "encoder_outputs": self.cache.cross}

    @property
    def keywords(self) -> dict[str, Any]:
        """What every call of the writing model is given."""
        return {**self.options.model_kw, **self.row_kw, **self.cross}

    def _call(self, ids: Tensor, mask: Any, more: dict[str, Any], forward: Any = None) -> Tensor:  # noqa: ANN401
        start, stop = self.cache.length, self.cache.length + ids.shape[1]
        places = None if self.positions is None else self.positions[..., start:stop]
        call: Any = self.model.decode if isinstance(self.model, EncoderDecoderModel) else self.model
        kw = {**self.keywords, **more}
        logits = (forward or _forward)(call, ids, places, mask, self.cache, kw)
        self.cache.advance(ids.shape[1])
        return logits

    def _encode(self, model: EncoderDecoderModel, prompt_kw: dict[str, Any]) -> None:
        ids, is_token = pad_right(self.sources, self.device)
        mask = None if is_token is None else is_token[:, None, None, :]
        outputs = model.encode(ids, attention_mask=mask, **self.keywords, **prompt_kw)
        self.cross = {"encoder_outputs": outputs, "cross_attention_mask": mask}
