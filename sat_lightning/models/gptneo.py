"""GPT-Neo (Black et al. 2021, doi:10.5281/zenodo.5297715).

What differs from the plain transformer:
- causal whatever the mask; a caller's mask hides more;
- layers of type "local" see `window_size` keys, their own among them;
- scores are not divided by sqrt(d);
- `token_type_ids`, if given, are looked up in the table of words and added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.mixins import LocalAttentionMixin
from sat_lightning.model import BaseModel, register_model
from sat_lightning.models.keymaps.gptneo import KEY_MAPS
from sat_lightning.nn import Transformer


@dataclass(frozen=True, kw_only=True)
class GPTNeoConfig(TransformerConfig):
    """GPT-Neo's options."""

    attention_types: list[str] = field(default_factory=list)
    """For each layer "global" or "local". Default: the two in turn."""
    window_size: int = 256
    """How many keys a local layer's query sees, its own among them."""
    has_qkv_bias: bool = True
    """A bias on `query_key_value`, as SAT has; Hugging Face's files have none."""

    def __post_init__(self) -> None:
        """Fill in and check the list of layers."""
        super().__post_init__()
        object.__setattr__(self, "window_size", int(self.window_size))  # SAT's command line gave a string
        if not self.attention_types:
            types = ["local" if i % 2 else "global" for i in range(self.num_layers)]
            object.__setattr__(self, "attention_types", types)
        if len(self.attention_types) != self.num_layers or not set(self.attention_types) <= {"global", "local"}:
            raise ConfigError(
                f"attention_types is {self.attention_types}; give each of the {self.num_layers} layers 'global' or "
                "'local'."
            )


@register_model
class GPTNeoModel(BaseModel):
    """A causal decoder whose layers look far and near in turn.

    Args:
        config: the architecture.
        transformer: a backbone to share. Default: a new one.
        **transformer_overrides: see `BaseModel`.
    """

    config_class: ClassVar[type[TransformerConfig]] = GPTNeoConfig
    default_mask = "causal"
    key_maps = KEY_MAPS
    config: GPTNeoConfig

    def __init__(
        self, config: GPTNeoConfig, transformer: Transformer | None = None, **transformer_overrides: Any
    ) -> None:
        super().__init__(config, transformer=transformer, **transformer_overrides)
        if not self.config.has_qkv_bias:
            for layer in self.transformer.layers:
                layer.attention.query_key_value.register_parameter("bias", None)
        windows = [self.config.window_size if kind == "local" else None for kind in self.config.attention_types]
        self.add_mixin("causal-window", LocalAttentionMixin(windows, is_causal=True))

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, old_impl: Callable[..., Tensor], token_type_ids: Tensor | None = None, **kw: Any
    ) -> Tensor:
        """Add the words of `token_type_ids` `[b, s]`."""
        words = old_impl(input_ids, **kw)
        return words if token_type_ids is None else words + old_impl(token_type_ids, **kw)

    @non_conflict
    @passes_mask
    def attention_fn(self, *args: Any, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        """Leave the scores unscaled."""
        return old_impl(*args, **(kw | {"scaling_attention_score": False}))
