"""Prompts of PEFT's, in and out: prefix tuning, prompt tuning and P-tuning store one tensor, `prompt_embeddings`.

Legend: n prompt length, l layers, k key/value heads, d head size, c hidden size.

    PREFIX_TUNING              [n, l * 2 * k * d]   keys and values of no words; positions of words begin at n
    PROMPT_TUNING, P_TUNING    [n, c]               words in front; an encoder of them is folded in when PEFT saves

In an encoder with a decoder a prefix is the decoder's. PEFT lays its pairs of keys and values out twice in a row, takes
two for each layer, and drops the second: layer i has pair 2 i, counted on from the first behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.peft_layout import key_map_of, owners
from sat_lightning.checkpoint.report import some
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.local_attention import LocalAttentionMixin
from sat_lightning.mixins.prefix_tuning import PrefixTuningMixin
from sat_lightning.mixins.prompt_tuning import PromptTuningMixin
from sat_lightning.mixins.token_types import TokenTypesMixin
from sat_lightning.model import BaseModel, EncoderDecoderModel
from sat_lightning.model.registry import AnyModel

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
_KEY = "prompt_embeddings"
#: Families whose words PEFT can put a prompt before, as tests have seen it.
_FAMILIES = ("GPT2Model", "GPTNeoModel", "LLaMAModel", "MixtralModel", "BertModel", "T5Model")


@torch.no_grad()
def read_prompt(
    model: AnyModel, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, PrefixTuningMixin | PromptTuningMixin]:
    """Build the mixin that is a prompt of PEFT's.

    Args:
        model: that it is for.
        values: of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`.

    Returns:
        The mixin, by the prefix of the part that it belongs to.

    Raises:
        CheckpointError: if it does not fit the model, or means something else in it.
    """
    if set(tensors) != {_KEY}:
        raise CheckpointError(f"it holds {some(sorted(tensors))}, where a prompt is '{_KEY}' and nothing else.")
    table, length = tensors[_KEY], values["num_virtual_tokens"]
    is_prefix = values["peft_type"] == "PREFIX_TUNING"
    prefix, owner = _part(model, "decoder." if is_prefix else "encoder.")
    config = owner.config
    if is_prefix:
        _refuse_windows(owner)
    elif prefix:
        table = table[:length]  # PEFT makes as many for the decoder, and leaves them
    num_pairs = max(values.get("num_layers") or 0, config.num_layers) if prefix else config.num_layers
    sizes = (num_pairs, 2, config.num_key_value_heads, config.head_size)
    width = math.prod(sizes) if is_prefix else config.hidden_size
    if list(table.shape) != [length, width]:
        raise CheckpointError(
            f"'{_KEY}' is {list(table.shape)}, for this model it must be [{length}, {width}]. Load the base that it "
            "was trained on."
        )
    if is_prefix:
        mixin = PrefixTuningMixin(config, length, first_position=length)
        for layer_id, own in enumerate(mixin.prefix):
            pair = 2 * layer_id % num_pairs if prefix else layer_id
            own.copy_(table.unflatten(1, sizes)[:, pair].permute(1, 2, 0, 3))
        return {prefix: mixin}
    prompt = PromptTuningMixin(config, length, keeps_prompt=bool(prefix))
    prompt.prompt.copy_(table).add_(_first_type(owner))
    return {prefix: prompt}


@torch.no_grad()
def write_prompt(model: AnyModel, parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of PEFT's for a prefix or a prompt.

    Args:
        model: that holds it.
        parts: the mixin, by the prefix of its part.

    Raises:
        CheckpointError: if PEFT has no such thing.
    """
    [(prefix, mixin)] = parts.items() if len(parts) == 1 else [("", None)]
    is_prefix = isinstance(mixin, PrefixTuningMixin)
    expected, owner = _part(model, "decoder." if is_prefix else "encoder.")
    if mixin is None or prefix != expected:
        raise CheckpointError(
            f"save_peft: {', '.join(f'{part[:-1]} has one' for part in parts)}; PEFT has one, in the {expected[:-1]}."
        )
    task = "SEQ_2_SEQ_LM" if prefix else "CAUSAL_LM" if owner.default_mask == "causal" else "FEATURE_EXTRACTION"
    config = owner.config
    values = {
        "task_type": task, "num_layers": config.num_layers, "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1 + (is_prefix and bool(prefix)), "token_dim": config.hidden_size,
    }  # fmt: skip
    if is_prefix:
        _refuse_prefix(owner, mixin)
        heads = config.num_key_value_heads
        values |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": mixin.prefix_len, "prefix_projection": False}
        values |= {"num_attention_heads": heads, "token_dim": heads * config.head_size}
        pairs = torch.stack([mixin.keys_and_values(layer_id) for layer_id in range(config.num_layers)])
        if prefix:
            pairs = torch.stack([pairs, torch.zeros_like(pairs)], dim=1).flatten(0, 1)
        table = pairs.permute(3, 0, 1, 2, 4).flatten(1).cpu()  # of [l, 2, k, n, d]
        return values | {"num_layers": len(pairs)}, {_KEY: table}
    if prefix and not mixin.keeps_prompt:
        raise CheckpointError(
            "save_peft: PEFT's decoder reads what the prompt became in the encoder, and here keeps_prompt is False. "
            "Train with keeps_prompt=True."
        )
    values |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": mixin.prompt_len, "prompt_tuning_init": "RANDOM"}
    return values, {_KEY: (mixin.prompt - _first_type(owner)).cpu()}


def _part(model: AnyModel, prefix: str) -> tuple[str, BaseModel]:
    """Return the part that has the prompt, by its prefix."""
    key_map_of(model)
    if not any(cls.__name__ in _FAMILIES for cls in type(model).__mro__):
        raise CheckpointError(
            f"PEFT puts no prompt before the words of a {type(model).__name__}; of these it does: "
            f"{', '.join(_FAMILIES)}."
        )
    prefix = prefix if isinstance(model, EncoderDecoderModel) else ""
    return prefix, dict(owners(model))[prefix]


def _first_type(owner: BaseModel) -> Tensor:
    """Return what BERT adds to PEFT's prompts, as to words of the first sentence, and not to ours."""
    found = [mixin for mixin in owner.mixins.values() if isinstance(mixin, TokenTypesMixin)]
    return found[0].type_embeddings.weight[0] if found else torch.zeros(owner.config.hidden_size)


def _refuse_windows(owner: BaseModel) -> None:
    for name, mixin in owner.mixins.items():
        if isinstance(mixin, LocalAttentionMixin):
            raise CheckpointError(
                f"'{name}', a {type(mixin).__name__}, hides what is far behind: a prefix of PEFT's then too, one of "
                "ours never. Use prompt tuning."
            )


def _refuse_prefix(owner: BaseModel, mixin: PrefixTuningMixin) -> None:
    _refuse_windows(owner)
    if mixin.first_position != mixin.prefix_len:
        raise CheckpointError(
            f"save_peft: first_position is {mixin.first_position}, and with PEFT's prefix of {mixin.prefix_len} the "
            f"words begin at {mixin.prefix_len}. Train with first_position={mixin.prefix_len}."
        )
    if mixin.scale != 1.0:
        raise CheckpointError(f"save_peft: scale is {mixin.scale:g}, and a prefix of PEFT's has none. Set it to 1.")
