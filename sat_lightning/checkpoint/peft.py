"""Adapters of PEFT's, in and out: `adapter_config.json` and `adapter_model.safetensors`.

LoRA, DoRA and (IA)^3 here, prompts in `peft_prompts`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sat_lightning.checkpoint.files import found_beside, open_tensors, read_json, write_json, written_whole
from sat_lightning.checkpoint.peft_layout import Module, Rows, owners, read_modules, table_names
from sat_lightning.checkpoint.peft_prompts import PROMPTS, read_prompt, write_prompt
from sat_lightning.checkpoint.peft_writing import write_factors, write_products
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.dora import DoraMixin, DoraWeights
from sat_lightning.mixins.ia3 import Factors, IA3Mixin
from sat_lightning.mixins.lora import LoraMixin, LoraWeights
from sat_lightning.mixins.places import Slot
from sat_lightning.mixins.prefix_tuning import PrefixTuningMixin
from sat_lightning.mixins.prompt_tuning import PromptTuningMixin
from sat_lightning.mixins.weight_tuning import WeightTuningMixin
from sat_lightning.model.registry import AnyModel

CONFIG_NAME, WEIGHTS_NAME, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_KEY = re.compile(
    r"^(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l|base_layer)(\.weight)?$"
)
#: Options of theirs that change the forward, and the values under which ours is the same.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "modules_to_save": (None, []), "lora_bias": (False, None),
    "alora_invocation_tokens": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "use_qalora": (False, None), "layer_replication": (None, []), "use_bdlora": (None, False),
    "monteclora_config": (None,), "arrow_config": (None,), "kasa_config": (None,),
    # Others change the base itself, which a file of an adapter does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "pissa"),
}  # fmt: skip
_PROMPT_MIXINS = (PrefixTuningMixin, PromptTuningMixin)


@dataclass
class _Found:
    """What a file says about rows of one linear of ours."""

    slot: Slot
    tensors: dict[str, Tensor]
    rank: int = 0
    alpha: float = 0.0
    reads: bool = False
    pattern: str = field(default="")


def load_peft(model: AnyModel, folder: str | os.PathLike[str], name: str = "peft") -> list[str]:
    """Add an adapter of PEFT's to a model.

    Args:
        model: the base that it was trained on, of a family that Hugging Face has; nothing is added if this fails.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: of the mixin; in a model of parts each gets its own, `encoder.<name>`.

    Returns:
        The names of the mixins.

    Raises:
        CheckpointError: if a file is missing, the method is none of LoRA, DoRA, IA3, prefix tuning, prompt tuning and
            P-tuning, or it does not fit the model.
    """
    folder = Path(folder)
    found: dict[str, list[_Found]] = {}
    try:
        values, tensors = _open(folder)
        if values["peft_type"] in PROMPTS:
            mixins: dict[str, Any] = {**read_prompt(model, values, tensors)}
        else:
            found = _sort(_by_module(tensors), values, model)
            mixins = {prefix: _make(o.config, values, found[prefix]) for prefix, o in owners(model) if prefix in found}
        if not mixins:
            raise CheckpointError("it holds no weights.")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    added = []
    try:
        for prefix, mixin in mixins.items():
            model.add_mixin(prefix + name, mixin, reinit=prefix in found)
            added.append(prefix + name)
            if prefix in found:
                _fill(mixin, found[prefix])
    except BaseException:
        for one in added:
            model.del_mixin(one)
        raise
    return added


def save_peft(model: AnyModel, folder: str | os.PathLike[str], name: str, base: str | None = None) -> None:
    """Write a mixin as an adapter that PEFT loads upon the Hugging Face model of the same weights.

    Args:
        model: of a family that Hugging Face has.
        folder: made where it is missing; files of these names in it are replaced.
        name: of a `LoraMixin`, `DoraMixin` or `IA3Mixin`, in a model of parts the one that each part has by that name;
            or of a `PrefixTuningMixin` or `PromptTuningMixin`.
        base: what `base_model_name_or_path` says.

    Raises:
        CheckpointError: if there is no such mixin, or it adapts what theirs cannot.
    """
    parts: dict[str, Any] = {prefix: owner.mixins[name] for prefix, owner in owners(model) if name in owner.mixins}
    kinds = {type(mixin) for mixin in parts.values()}
    if len(kinds) != 1 or not issubclass(kind := next(iter(kinds)), (LoraMixin, IA3Mixin, *_PROMPT_MIXINS)):
        named = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise CheckpointError(
            f"save_peft: '{name}' is {named} here; it must be one LoraMixin, DoraMixin, IA3Mixin, PrefixTuningMixin or "
            "PromptTuningMixin."
        )
    if issubclass(kind, _PROMPT_MIXINS):
        values, tensors = write_prompt(model, parts)
    else:
        values, tensors = _write_adapters(model, parts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / WEIGHTS_NAME) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
    write_json(folder / CONFIG_NAME, values | {"base_model_name_or_path": base, "inference_mode": True})


def _write_adapters(model: AnyModel, parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    adapters = {(prefix, a.place_name): (a, m.scale) for prefix, m in parts.items() for a in m._adapters.values()}
    mixin, modules = next(iter(parts.values())), read_modules(model)
    values, tensors = (write_factors if isinstance(mixin, IA3Mixin) else write_products)(modules, adapters, mixin)
    is_transposed = any(modules[target].is_transposed for target in values["target_modules"])
    values |= {"task_type": None, "fan_in_fan_out": is_transposed}
    return values, {PREFIX + key: tensor for key, tensor in tensors.items()}


def _open(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Return the configuration and the tensors of an adapter that can be read."""
    for needed in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / needed).is_file():
            is_ours = (folder / "adapter.json").is_file()
            hint = " It is one of ours: call load_adapter." if is_ours else found_beside(folder / needed)
            raise CheckpointError(f"this is no PEFT adapter: it has no {needed}.{hint}")
    values = read_json(folder / CONFIG_NAME)
    if (kind := values.get("peft_type")) not in ("LORA", "IA3", *PROMPTS):
        raise CheckpointError(f"peft_type is {kind!r}, readable are LORA (with DoRA), IA3, {', '.join(PROMPTS)}.")
    for option, supported in _SUPPORTED.items():
        if (value := values.get(option, supported[0])) not in supported:
            raise CheckpointError(
                f"{option}={value!r} is not supported, only {' and '.join(map(repr, supported))}. Merge the adapter "
                "with PEFT (merge_and_unload), and convert the model."
            )
    return values, open_tensors(folder / WEIGHTS_NAME)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return for each module what was learnt about it."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _KEY.match(key.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(f"'{key}' is no weight of LoRA, DoRA or IA3, and would be lost.")
        found[match[1]][match[2].replace("embedding_", "")] = tensor
    return found


def _sort(
    tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], model: AnyModel
) -> dict[str, list[_Found]]:
    """Return what the file says, by the part of the model and in its rows."""
    modules = read_modules(model)
    names, found = table_names(modules, model, list(tensors)), defaultdict(list)
    for name, mine in tensors.items():
        module = modules[names[name]]
        for rows in module.rows:
            slot = _slot(rows, module)
            one = _Found(slot, {}, rank=mine["lora_A"].shape[0] if "lora_A" in mine else 0)
            one.alpha = float(_pattern_value(values.get("alpha_pattern"), name, values.get("lora_alpha", 0)))
            one.reads = _reads(values, name)
            if "base_layer" in mine and not _is_own(mine["base_layer"], rows):
                raise CheckpointError(
                    f"it brings '{name}' of {list(mine['base_layer'].shape)} of its own, other than the model's. "
                    "Resize or replace the model's first (resize_vocab), as it was done in training."
                )
            for kind, tensor in mine.items():
                if kind == "base_layer":
                    continue
                _check_sizes(f"{name}.{kind}", tensor, module, rows, one.reads)
                one.tensors[kind] = _in_our_rows(kind, tensor, rows, slot, one.reads)
            found[rows.owner].append(one)
    return found


def _check_sizes(name: str, tensor: Tensor, module: Module, rows: Rows, reads: bool) -> None:
    """Refuse what was learnt about a linear of other sizes."""
    place, kind = rows.place, name.rpartition(".")[2]
    width = place.in_features if place.name != "word_embeddings" else module.size
    height = module.size if place.name != "word_embeddings" else place.out_features
    size = tensor.shape[1] if kind == "lora_A" else tensor.shape[0] if kind == "lora_B" else tensor.numel()
    if size != (width if kind == "lora_A" or reads else height):
        raise CheckpointError(
            f"'{name}' is {list(tensor.shape)}, and the model's own is a matrix [{height}, {width}]. Load the base "
            "that it was trained on."
        )


def _is_own(tensor: Tensor, rows: Rows) -> bool:
    """Tell whether a copy of the base that PEFT saves with adapted tables is what the model has."""
    weight: Any = rows.place.module.weight
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight)


def _slot(rows: Rows, module: Module) -> Slot:
    """Return the part of ours that the rows are, or the whole."""
    first, last = int(rows.ours.min()), int(rows.ours.max())
    for slot in (rows.place.whole, *rows.place.parts):
        size = rows.place.in_features if rows.place.name == "word_embeddings" else slot.size
        if (slot.start, size) == (first, last + 1 - first) and len(rows.ours) == size:
            return slot
    raise CheckpointError(f"'{module.name}' is rows {first} to {last} of {rows.place.name}, which is no part of it.")


def _in_our_rows(kind: str, tensor: Tensor, rows: Rows, slot: Slot, reads: bool) -> Tensor:
    if kind == "lora_A" or rows.place.name == "word_embeddings" or reads:
        return tensor.flatten() if kind == "ia3_l" else tensor
    tensor = tensor.flatten() if kind in ("ia3_l", "lora_magnitude_vector") else tensor
    result = torch.empty(slot.size, *tensor.shape[1:], dtype=tensor.dtype)
    result[rows.ours - slot.start] = tensor[rows.theirs]
    return result


def _pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:  # noqa: ANN401
    """Look a module's own value up as PEFT does: the pattern has to match the end of its name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _reads(values: Mapping[str, Any], name: str) -> bool:
    chosen = values.get("feedforward_modules") or []
    if isinstance(chosen, str):
        return re.fullmatch(chosen, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in chosen)


def _make(config: Any, values: Mapping[str, Any], found: list[_Found]) -> WeightTuningMixin:  # noqa: ANN401
    """Build the mixin that adapts these rows and no others."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for one in found:
        layer = re.match(r"layers\.(\d+)\.", one.slot.name)
        tail = one.slot.name[layer.end() :] if layer else one.slot.name
        groups[tail, layer is None, one.rank, one.alpha, one.reads].append(layer[1] if layer else "")
    patterns = {}
    for key, layers in groups.items():
        start = "" if key[1] else rf"layers\.({'|'.join(layers)})\."
        patterns[key] = f"^{start}{re.escape(key[0])}$"
    target = list(patterns.values())
    if values["peft_type"] == "IA3":
        return IA3Mixin(config, target=target, feedforward=[p for key, p in patterns.items() if key[4]])
    rank = Counter(one.rank for one in found).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in found).most_common(1)[0][0]
    kind = DoraMixin if values.get("use_dora") else LoraMixin
    # PEFT takes the main singular vectors out of the base each time it loads such a file.
    init: Literal["default", "pissa"] = "pissa" if values.get("init_lora_weights") == "pissa" else "default"
    return kind(
        config,
        rank=rank,
        alpha=alpha,
        target=target,
        dropout=values.get("lora_dropout") or 0.0,
        rank_pattern={pattern: key[2] for key, pattern in patterns.items() if key[2] != rank},
        alpha_pattern={pattern: key[3] for key, pattern in patterns.items() if key[3] != alpha},
        use_rslora=bool(values.get("use_rslora")),
        init=init,
    )


@torch.no_grad()
def _fill(mixin: WeightTuningMixin, found: list[_Found]) -> None:
    adapters = {slot.name: adapter for adapter in mixin._adapters.values() for slot in adapter.slots}
    for one in found:
        adapter, number = adapters[one.slot.name], str(one.slot.index)
        if isinstance(adapter, Factors):
            getattr(adapter.factors, number).copy_(one.tensors["ia3_l"])
        elif isinstance(adapter, LoraWeights):
            for own, theirs in zip(adapter.pair(number), ("lora_A", "lora_B"), strict=True):
                own.copy_(one.tensors[theirs])
        if isinstance(adapter, DoraWeights):
            getattr(adapter.magnitude, number).copy_(one.tensors["lora_magnitude_vector"])
