"""How Hugging Face names and lays out the tensors of a family: one table, read in both directions.

A family declares its tables as a class attribute, beside the model or in `models/keymaps/<family>.py`::

    class GPT2Model(BaseModel):
        key_maps = (KeyMap(
            model_type="gpt2",
            architectures=("GPT2LMHeadModel",),           # the first one is written
            rules=(
                Rule("transformer.word_embeddings.weight", "wte.weight"),
                Rule("transformer.layers.{i}.attention.dense.weight", "h.{i}.attn.c_proj.weight", Transpose()),
                Rule("transformer.layers.{i}.attention.query_key_value.{kind}",
                     ("model.layers.{i}.q.{kind}", "model.layers.{i}.k.{kind}", "model.layers.{i}.v.{kind}"),
                     Fused(lambda c: (c.hidden_size,) * 3)),
            ),
            config_from_hf=..., config_to_hf=...,
        ),)

A rule says: these tensors of ours *are* those of theirs, through a transform that can be undone. Names are templates:

- `{i}` counts layers, `{e}` experts (ours "", "_1", "_2", ...; theirs 0, 1, 2, ...), `{kind}` is weight and bias; a
  map adds its own in `ranges`. A placeholder on both sides makes one group for each value; on one side only, all its
  values belong to one group, in order.
- A group whose source tensors are all absent does not exist (no bias, another layout); one of which a part is absent is
  an error. So optional biases and two layouts of ours (fused or not) need no condition, only a rule.
- Reading a Hugging Face file, a rule whose target names the model does not have is passed over.

Every source name must be consumed and every target filled. What exists on one side only is said by the map: `derived`
(ours, made by the constructor), `buffers` (theirs, made from the configuration), `tied` (theirs, may be left out of the
file). `sat_lightning.checkpoint.keymap` reads the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.model.layouts import (
    Chain,
    Copies,
    Each,
    Fused,
    Inverse,
    Reordered,
    Same,
    Squeeze,
    Stacked,
    Transform,
    Transpose,
    blocks_from_heads,
    rotary_halves_from_pairs,
)

__all__ = [
    "Chain",
    "Copies",
    "Each",
    "Fused",
    "Inverse",
    "KeyMap",
    "Reordered",
    "Rule",
    "Same",
    "Squeeze",
    "Stacked",
    "Transform",
    "Transpose",
    "blocks_from_heads",
    "require",
    "rotary_halves_from_pairs",
]


@dataclass(frozen=True)
class Rule:
    """These tensors of ours are those of theirs; the module describes templates and groups."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    transform: Transform = Same()


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """One family of Hugging Face files, and what it is here."""

    model_type: str
    """`model_type` in their config.json."""
    architectures: tuple[str, ...]
    """Their classes this map reads, of those that share the `model_type`; the first is written."""
    rules: tuple[Rule, ...]
    """See the module."""
    config_from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Their config.json -> fields of our configuration. A value that we cannot honour must raise ConfigError."""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """Our configuration -> their fields, without `model_type` and `architectures`. Must undo `config_from_hf`."""
    ranges: Mapping[str, Callable[[Any], Iterable[Any]]] = field(default_factory=dict)
    """Values of further placeholders; a value is the text itself, or a pair (ours, theirs)."""
    prefix: str = ""
    """Begins the names of the bare model in a file of the whole one; files of the bare model leave it out."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Their name -> the name of theirs it equals, where files may leave the first out (`lm_head` and the embedding)."""
    tie_fields: tuple[str, ...] = ("tie_word_embeddings",)
    """Fields of config.json that say whether `tied` holds; the first that is there decides."""
    is_tied_by_default: bool = False
    """What a config.json without any of them means; where it is false, nothing of `tied` is tied."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Their name -> the name of theirs it equals whatever config.json says (`encoder.embed_tokens` and `shared`)."""
    derived: tuple[str, ...] = ()
    """Our names, with `*`, that the constructor makes and theirs lack (`*.inv_freq`)."""
    buffers: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """Their names (templates) that old files carry and the configuration determines; compared, not kept."""
    unused: tuple[str, ...] = ()
    """Their names, with `*`, that published files carry and their code never reads: left behind, and reported."""
    fills: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """Their names that are written with a value of their own where our model has nothing to put there."""
    legacy_suffixes: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in old files -> today's (`.gamma` -> `.weight`)."""
    legacy_parts: Mapping[str, str] = field(default_factory=dict)
    """Parts of names in some files -> those in the others."""
    example: Callable[[Any, Any], tuple[dict[str, Any], dict[str, Any]]] | None = None
    """(configuration, torch.Generator) -> keywords of our call and of theirs, to verify with. Default: random words."""
    outputs: tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]] | None = None
    """What our call and theirs return -> the tensors to compare. Default: our first, and their `logits` or first."""
    without: tuple[str, ...] = ()
    """Mixins of the class that these files have no weights for: removed after building."""
    adds: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Mixins to add after building, by name: configuration -> mixin."""

    def is_tied(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a config.json ties the pairs of `tied`."""
        return bool(next((values[name] for name in self.tie_fields if name in values), self.is_tied_by_default))

    def pairs(self, is_tied: bool) -> dict[str, str]:
        """Return what may be left out of a file: name -> the name it equals."""
        return {**self.copies, **(self.tied if is_tied else {})}


def require(values: Mapping[str, Any], **supported: Any) -> None:
    """Refuse options of a config.json that change the forward and that we do not have.

    Args:
        values: their config.json.
        **supported: for each option, the value we honour, or a tuple of them; an absent option passes.

    Raises:
        ConfigError: naming the option, its value and what is supported.
    """
    for name, wanted in supported.items():
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        if name in values and values[name] not in choices:
            raise ConfigError(
                f"config.json of a '{values.get('model_type')}' has {name}={values[name]!r}, supported is "
                f"{' or '.join(map(repr, choices))}. The weights would load and give other numbers."
            )
