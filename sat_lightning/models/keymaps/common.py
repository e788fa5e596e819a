"""What several Hugging Face families write alike: fields, heads, rotary positions, fused projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sat_lightning.config import ROPE_TYPES, TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.model.keymap import Fused, Rule
from sat_lightning.nn.rotary import RotaryEmbedding

Values = Mapping[str, Any]
Part = Callable[[Any], TransformerConfig]
Fields = Mapping[str, tuple[str, Any]]
"""Their name -> our name, and what theirs means where config.json leaves it out (None: it must be there)."""

_ROPE_SETTINGS = (
    "factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast beta_slow attention_factor"
).split()


def read_fields(values: Values, fields: Fields) -> dict[str, Any]:
    """Read plain fields of a config.json.

    Raises:
        ConfigError: if one without a default is missing.
    """
    found = {}
    for theirs, (ours, default) in fields.items():
        if theirs not in values and default is None:
            raise ConfigError(f"config.json of a '{values.get('model_type')}' lacks {theirs}. Add it.")
        found[ours] = values.get(theirs, default)
    return found


def write_fields(config: TransformerConfig, fields: Fields) -> dict[str, Any]:
    """Write plain fields of a config.json, a default of ours as the number it stands for."""
    values = {theirs: getattr(config, ours) for theirs, (ours, _) in fields.items()}
    return values | {theirs: config.inner_size for theirs, (ours, _) in fields.items() if ours == "inner_hidden_size"}


def read_heads(values: Values) -> dict[str, Any]:
    """Read key/value heads and the size of a head."""
    num_heads, size = values["num_attention_heads"], values["hidden_size"]
    groups, head_size = values.get("num_key_value_heads") or num_heads, values.get("head_dim")
    usual = size // num_heads if size % num_heads == 0 else None
    found = {"num_multi_query_heads": 0 if groups == num_heads else groups}
    if head_size is None or head_size == usual:
        return found
    return found | {"hidden_size_per_attention_head": head_size, "rotary_dim": head_size}


def write_heads(config: TransformerConfig) -> dict[str, Any]:
    """Write key/value heads and the size of a head."""
    return {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_size}


def read_rope(values: Values, default_base: float = 10000.0) -> dict[str, Any]:
    """Read rotary base and scaling, from today's `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Raises:
        ConfigError: for a rule or a setting that we do not have.
    """
    rule = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    base = rule.pop("rope_theta", None) or values.get("rope_theta", default_base)
    rule.pop("partial_rotary_factor", None)
    name = rule.pop("rope_type", None) or rule.pop("type", None) or "default"
    rule.pop("type", None)
    if name == "default":
        return {"rotary_base": base, "rope_scaling": None}
    strange = sorted(key for key in rule if key not in _ROPE_SETTINGS and rule[key] is not None)
    if name not in ROPE_TYPES or name == "ntk" or strange:
        raise ConfigError(
            f"config.json has rotary scaling '{name}' with {strange or 'its settings'}; known are linear, llama3 and "
            f"yarn with {', '.join(_ROPE_SETTINGS)}. The weights would load and give other numbers."
        )
    if name in ("llama3", "yarn"):
        rule.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return {"rotary_base": base, "rope_scaling": {"rope_type": name, **rule}}


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """Write rotary base and scaling, for transformers before and after 5."""
    rule = dict(config.rope_scaling or {"rope_type": "default"})
    if rule.get("rope_type") == "llama3":
        rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **rule}
    return {
        "rope_theta": config.rotary_base,
        "rope_scaling": rule if config.rope_scaling else None,
        "rope_parameters": {"rope_theta": config.rotary_base, **rule},
    }


def inv_freq_of(config: TransformerConfig) -> Tensor:
    """Return the rotary frequencies that old files carry."""
    dim = config.rotary_dim or config.hidden_size // config.num_attention_heads
    return RotaryEmbedding(dim, config.rotary_base).inv_freq


def fused_query_key_value(
    ours: str, theirs: str, names: tuple[str, str, str], kind: str = "{kind}", part: Part = lambda config: config
) -> Rule:
    """Return the rule of a fused self-attention projection.

    Args:
        ours: our module.
        theirs: what their three names begin with.
        names: of query, key and value.
        kind: weight, bias, or a placeholder for both.
        part: returns, of the configuration of the whole, that of the part which has this projection.
    """
    sizes = Fused(lambda config: _sizes(part(config)))
    return Rule(f"{ours}.query_key_value.{kind}", tuple(f"{theirs}.{name}.{kind}" for name in names), sizes)


def _sizes(config: TransformerConfig) -> tuple[int, int, int]:
    queries, groups = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    return queries, groups, groups
