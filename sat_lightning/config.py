"""The shape of a transformer: one frozen dataclass, passed whole, with SAT's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sat_lightning.errors import ConfigError, nearest

LAYERNORM_ORDERS = ("pre", "post", "sandwich")
ATTENTION_BACKENDS = ("auto", "eager", "sdpa", "flash", "flex")
ROPE_TYPES = ("default", "linear", "ntk", "llama3", "yarn")

# model_config.json carries these beside the architecture; they describe the file, not the forward.
_FILE_KEYS = ("model_class", "tokenizer_type")
# SAT always writes these, in this order, and the rest of its own options only where they differ from the default.
_ALWAYS_WRITTEN = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "layernorm_order",
    "model_parallel_size",
    "max_sequence_length",
)
# Training-time options: SAT keeps them out of model_config.json.
_NEVER_WRITTEN = (
    "hidden_dropout",
    "attention_dropout",
    "drop_path",
    "checkpoint_activations",
    "checkpoint_num_layers",
    "checkpoint_skip_layers",
    "attention_backend",
    "extra",
)

ConfigT = TypeVar("ConfigT", bound="TransformerConfig")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Every architecture option of the backbone; a family adds its own by subclassing.

    Names, defaults and meanings are those of SAT's `model_config.json`, which `from_dict` reads and `to_dict` writes.

    Raises:
        ConfigError: if the values contradict each other.
    """

    num_layers: int = 6
    """Depth: how many transformer layers."""
    hidden_size: int = 1024
    """Width of the residual stream, in features."""
    num_attention_heads: int = 16
    """Query heads of each self-attention."""
    vocab_size: int = 1024
    """Rows of the word embedding table."""
    max_sequence_length: int = 512
    """Rows of the learned position table: the longest sequence, in tokens."""
    layernorm_order: Literal["pre", "post", "sandwich"] = "pre"
    """Where the norms of a layer stand; drawn in `sat_lightning.nn.layer`."""
    model_parallel_size: int = 1
    """Into how many partitions the checkpoint of this configuration is cut; a model in memory is always whole."""

    is_decoder: bool | list[bool] = False
    """Whether layers carry cross attention; a list decides layer by layer."""
    cross_attn_hidden_size: int | None = None
    """Width of the encoder outputs that cross attention reads. Default: `hidden_size`."""
    use_bias: bool = True
    """Biases on every linear of attention and MLP (never on the gate)."""
    use_qkv_bias: bool = False
    """A bias on `query_key_value` even where `use_bias` is off."""
    inner_hidden_size: int | None = None
    """Width between the two linears of the MLP. Default: 4 * `hidden_size`."""
    hidden_size_per_attention_head: int | None = None
    """Features of one self-attention head. Default: `hidden_size` / `num_attention_heads`."""
    cross_hidden_size_per_attention_head: int | None = None
    """Features of one cross-attention head. Default: `hidden_size` / `num_attention_heads`."""
    use_final_layernorm: bool = True
    """A norm after the last layer."""
    layernorm_epsilon: float = 1e-5
    """Added to the variance inside every norm."""
    num_multi_query_heads: int = 0
    """Key/value heads of self-attention; 0 means as many as query heads (multi-head), 1 is multi-query."""
    cross_num_multi_query_heads: int = 0
    """Key/value heads of cross attention; 0 means as many as query heads."""
    row_parallel_linear_final_bias: bool = True
    """SAT's rule for biases of split linears; kept for its files, without effect on a whole model."""
    is_gated_mlp: bool = False
    """A third linear `dense_h_to_4h_gate` whose activation multiplies the inner features."""
    is_rotary_emb: bool = False
    """Rotary position embedding instead of a learned table."""
    parallel_output: bool = False
    """SAT's choice to leave logits split over partitions; kept for its files, without effect on a whole model."""
    num_experts: int = 1
    """Experts of each MLP; above 1 a `routing_forward` hook chooses among them."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_dim: int | None = None
    """Features of each head that are rotated. Default: `hidden_size` / `num_attention_heads`."""
    rotary_interleaved: bool = False
    """Rotate neighbouring features (2j, 2j+1) instead of the two halves (j, j + dim/2)."""
    rope_scaling: dict[str, Any] | None = None
    """Rule that stretches the rotary frequencies, as data: `{"rope_type": "llama3", "factor": 8.0, ...}`."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output linears take it divided by sqrt(2 * `num_layers`)."""

    hidden_dropout: float = 0.0
    """Dropout probability after the embedding, the attention output and the MLP output."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights."""
    drop_path: float = 0.0
    """Probability that a residual branch is skipped for a whole sample (stochastic depth)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_num_layers: int = 1
    """How many layers are recomputed as one block."""
    checkpoint_skip_layers: int = 0
    """How many of the last layers keep their activations."""
    attention_backend: Literal["auto", "eager", "sdpa", "flash", "flex"] = "auto"
    """Kernel of the default `attention_fn`; all give the same numbers."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of a `model_config.json` that this class does not know, kept and written back."""

    def __post_init__(self) -> None:
        """Refuse values that contradict each other, naming them and the cure."""
        self._check_choices()
        self._check_sizes()
        self._check_heads()
        self._check_probabilities()
        self._check_layers()

    @property
    def head_size(self) -> int:
        """Features of one self-attention head."""
        return self.hidden_size_per_attention_head or self.hidden_size // self.num_attention_heads

    @property
    def cross_head_size(self) -> int:
        """Features of one cross-attention head."""
        return self.cross_hidden_size_per_attention_head or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads of self-attention."""
        return self.num_multi_query_heads or self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """Width between the two linears of the MLP."""
        return self.inner_hidden_size or 4 * self.hidden_size

    def layer_is_decoder(self, layer_id: int) -> bool:
        """Tell whether layer `layer_id` carries cross attention."""
        return self.is_decoder[layer_id] if isinstance(self.is_decoder, list) else self.is_decoder

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """Return a copy with some fields changed; an unknown name is an error that gives the nearest one."""
        _refuse_unknown(type(self), changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(
        cls: type[ConfigT], values: Mapping[str, Any], *, unknown: Literal["keep", "refuse"] = "keep"
    ) -> ConfigT:
        """Read a configuration from a mapping, such as SAT's `model_config.json`.

        Args:
            values: option names and values.
            unknown: what happens to names this class does not know: `keep` stores them in `extra` (and `to_dict`
                writes them back), `refuse` raises.

        Returns:
            The validated configuration.

        Raises:
            ConfigError: for an unknown name under `refuse`, or values that contradict each other.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        known = {k: v for k, v in values.items() if k in names and k != "extra"}
        extra = dict(values.get("extra") or {}) | {k: v for k, v in values.items() if k not in names}
        if unknown == "refuse":
            _refuse_unknown(cls, {k: v for k, v in extra.items() if k not in _FILE_KEYS})
        return cls(**known, extra=extra)

    def to_dict(self, *, model_class: str | None = None, everything: bool = False) -> dict[str, Any]:
        """Write the mapping that SAT's `model_config.json` holds.

        Args:
            model_class: class name recorded in the file. Default: the one it was read with, if any.
            everything: write defaults and training-time options too, so that the result says all.

        Returns:
            Names and values in SAT's order: the file's own keys, the sizes, what differs from the default, a
            family's own options, unknown keys as they were read.
        """
        file_keys = {k: self.extra[k] for k in _FILE_KEYS if k in self.extra}
        if model_class is not None:
            file_keys = {"model_class": model_class} | {k: v for k, v in file_keys.items() if k != "model_class"}
        base = {f.name for f in dataclasses.fields(TransformerConfig)}
        written: dict[str, Any] = dict(file_keys)
        written |= {name: getattr(self, name) for name in _ALWAYS_WRITTEN}
        for f in dataclasses.fields(self):
            if f.name in _ALWAYS_WRITTEN or f.name == "extra":
                continue
            value = getattr(self, f.name)
            is_default = f.name in base and (value == f.default or f.name in _NEVER_WRITTEN)
            if everything or not is_default:
                written[f.name] = value
        return written | {k: v for k, v in self.extra.items() if k not in _FILE_KEYS}

    def _check_choices(self) -> None:
        for name, choices in (("layernorm_order", LAYERNORM_ORDERS), ("attention_backend", ATTENTION_BACKENDS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name}: unknown value {value!r}, known are {', '.join(choices)}.{nearest(str(value), choices)}"
                )
        if self.rope_scaling is not None:
            rope_type = self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))
            if rope_type not in ROPE_TYPES:
                raise ConfigError(
                    f"rope_scaling: unknown rope_type {rope_type!r}, known are {', '.join(ROPE_TYPES)}."
                    f"{nearest(str(rope_type), ROPE_TYPES)}"
                )

    def _check_sizes(self) -> None:
        positive = (
            "num_layers hidden_size num_attention_heads vocab_size max_sequence_length model_parallel_size num_experts"
            " checkpoint_num_layers layernorm_epsilon rotary_base"
        ).split()
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be above 0.")
        for name in (
            "inner_hidden_size hidden_size_per_attention_head cross_hidden_size_per_attention_head"
            " cross_attn_hidden_size rotary_dim"
        ).split():
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}, it must be above 0, or left out for its default.")
        for name in ("num_multi_query_heads", "cross_num_multi_query_heads", "checkpoint_skip_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it cannot be negative.")

    def _check_heads(self) -> None:
        if self.hidden_size_per_attention_head is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}. "
                "Change one, or set hidden_size_per_attention_head."
            )
        for name in ("num_multi_query_heads", "cross_num_multi_query_heads"):
            groups = getattr(self, name)
            if groups and self.num_attention_heads % groups:
                raise ConfigError(
                    f"num_attention_heads {self.num_attention_heads} is not divisible by {name} {groups}: "
                    "each key/value head serves the same number of query heads."
                )
        if self.is_rotary_emb:
            dim = self.rotary_dim or self.hidden_size // self.num_attention_heads
            if dim % 2 or dim > self.head_size:
                raise ConfigError(
                    f"is_rotary_emb: cannot rotate {dim} features of heads of {self.head_size}. "
                    f"Set rotary_dim to an even number of at most {self.head_size}."
                )

    def _check_probabilities(self) -> None:
        for name in ("hidden_dropout", "attention_dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, a probability from 0 up to (not including) 1.")

    def _check_layers(self) -> None:
        if isinstance(self.is_decoder, list) and len(self.is_decoder) != self.num_layers:
            raise ConfigError(
                f"is_decoder lists {len(self.is_decoder)} layers, num_layers is {self.num_layers}: give one each."
            )
        if self.checkpoint_activations and self.checkpoint_skip_layers >= self.num_layers:
            raise ConfigError(
                f"checkpoint_skip_layers {self.checkpoint_skip_layers} leaves none of {self.num_layers} layers to "
                "checkpoint. Lower it, or set checkpoint_activations to false."
            )


def _refuse_unknown(cls: type, values: Mapping[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise ConfigError(f"{cls.__name__} has no option '{name}'.{nearest(name, names)}")
