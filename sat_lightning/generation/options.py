"""What a call of `generate` or `stream` may be told, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal

import torch

from sat_lightning.errors import ConfigError, nearest
from sat_lightning.generation.layout import Visibility
from sat_lightning.generation.strategies import BaseStrategy

CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}

_COUNTS = ("max_new_tokens", "batch_size", "prefill_chunk", "check_every")

Finish = Literal["end", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Everything about a generation but the model, the prompts and the strategy.

    Raises:
        ConfigError: if a value is out of its range.
    """

    max_new_tokens: int | None = None
    """Tokens written for each prompt, at most. Default: 256, or what the model has positions for."""
    end_tokens: Sequence[int] | int | None = None
    """One id or several that end a row, beside the strategy's. Default: the tokenizer's `end_of_document_id`."""
    stop_strings: Sequence[str] = ()
    """Texts that end a row; the result ends before them. They need a tokenizer."""
    seed: int | None = None
    """Of strategies that draw: each row draws by the seed and its own place among the prompts. Default: a new one."""
    row_ids: Sequence[int] | None = None
    """A number for each prompt in the place of its place, so that calls that share prompts out draw as one would."""
    adapter_ids: Sequence[int] | torch.Tensor | None = None
    """For each prompt the method of fine-tuning that writes it, by its `adapter_id`; -1: none. Default: all."""
    batch_size: int | None = None
    """Prompts that are read together; those of like length go together. Default: all."""
    prefill_chunk: int | None = None
    """Tokens of the prompts read at once, to bound memory. Default: all; so are prompts that see all of themselves."""
    cache_dtype: str | torch.dtype | None = None
    """In which keys and values are kept: fp32, fp16, bf16 or int8. Default: as computed; on a CPU fp32 for bf16."""
    check_every: int = 1
    """Look every this many tokens whether all rows have ended: each look makes the host wait for the device."""
    pack_weights: bool | None = None
    """Copy weights in the layout that a CPU multiplies fastest. Default: from 32 new tokens on, up to 2 GiB of them."""
    compile: bool | str = False
    """Compile the step that reads one token, by inductor or the backend named: for many tokens, as it takes long.
    On a GPU, too, kernels are launched one by one: a step whose keys grow in number is no CUDA graph."""
    visibility: Visibility = None
    """What the prompt's tokens see: "causal" those before them, "full" all of it. Default: the family's own."""
    allowed_tokens: Callable[[list[int]], Sequence[int] | None] | None = None
    """Given the ids of a row, prompt and all: those that may follow, or None for all. See `AllowedTokens`."""
    decoder_start: Sequence[int] = (0,)
    """Ids that the decoder of an encoder-decoder begins with. Default: 0, T5's padding."""
    model_kw: dict[str, Any] = field(default_factory=dict)
    """Keywords of every call of the model."""
    prompt_kw: dict[str, Any] = field(default_factory=dict)
    """Keywords of the one call that reads the prompts, such as images; all prompts are then one batch."""

    def __post_init__(self) -> None:
        """Check every value."""
        for name, least in (*((name, 1) for name in _COUNTS), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < least):
                raise ConfigError(f"{name} is {value!r}, it must be a whole number of at least {least}.")
        if isinstance(self.cache_dtype, str) and self.cache_dtype not in CACHE_DTYPES:
            raise ConfigError(
                f"cache_dtype is {self.cache_dtype!r}, known are {', '.join(CACHE_DTYPES)}."
                f"{nearest(self.cache_dtype, CACHE_DTYPES)}"
            )
        stored = self.stored_dtype
        if stored is not None and not (stored is torch.int8 or stored.is_floating_point):
            raise ConfigError(f"cache_dtype is {stored}; it is a floating dtype or torch.int8.")
        if not isinstance(self.decoder_start, Sequence) or not self.decoder_start:
            raise ConfigError(
                f"decoder_start is {self.decoder_start!r}; it is the ids that a decoder begins with: [0]."
            )
        if self.row_ids is not None and any(row < 0 for row in self.row_ids):
            raise ConfigError(f"row_ids holds {min(self.row_ids)}; they are at least 0.")
        if self.visibility not in (None, "causal", "full"):
            raise ConfigError(f"visibility is {self.visibility!r}; it is 'causal', 'full' or None (the family's own).")
        if isinstance(self.stop_strings, str) or "" in self.stop_strings:
            raise ConfigError("stop_strings is a list of texts, none of them empty.")
        if self.prompt_kw and self.batch_size is not None:
            raise ConfigError("prompt_kw belongs to all prompts at once: leave batch_size out.")

    @classmethod
    def read(cls, options: GenerationOptions | None, changes: dict[str, Any]) -> GenerationOptions:
        """Return `options` (or the defaults) with some fields changed.

        Raises:
            ConfigError: for a name that is no field, with the nearest one.
        """
        names = [f.name for f in fields(cls)]
        for name in changes:
            if name in names:
                continue
            is_of_strategy = name in {f.name for f in fields(BaseStrategy)}
            cure = f" It belongs to the strategy: strategy=BaseStrategy({name}=...)." if is_of_strategy else ""
            raise ConfigError(f"There is no option '{name}' of a generation.{cure or nearest(name, names)}")
        given = {} if options is None else {name: getattr(options, name) for name in names}
        return cls(**(given | changes))

    @property
    def backend(self) -> str | None:
        """Who compiles, or None."""
        return "inductor" if self.compile is True else self.compile or None

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """`cache_dtype` as torch's."""
        return CACHE_DTYPES[self.cache_dtype] if isinstance(self.cache_dtype, str) else self.cache_dtype


@dataclass(frozen=True, eq=False)
class Generation:
    """What was written for one prompt."""

    prompt_tokens: list[int]
    """The prompt, without padding."""
    tokens: list[int]
    """What follows it, the end token included."""
    finish: Finish
    """What ended it: an end token, a stop string, or the number of tokens."""
    text: str | None = None
    """`tokens` as text, without the end token or a stop string; None without a tokenizer."""
    score: float | None = None
    """What the strategy ranks by, if it does."""
    alternatives: tuple[Generation, ...] = ()
    """Further results of a strategy that gives several, the next best first."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """One token of one row, as `stream` yields it."""

    index: int
    """Which prompt it belongs to."""
    token: int
    """Its id."""
    text: str
    """The text that became certain with it; empty without a tokenizer, or inside a character of several tokens."""
    finish: Finish | None
    """What ended the row with it, if it was the last."""
