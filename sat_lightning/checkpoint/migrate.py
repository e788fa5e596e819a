"""Old files in today's names: SAT's formats before their changes, and versions of our own.

What SAT's changelog describes is recognised by its names and repaired with a note in the report:

- mixins numbered in place of named (before v0.1): `mixins.0.x` becomes `mixins.<name>.x`, by the names the caller
  gives, or where the weights of each number fit just one mixin of the model;
- `word_embeddings.weight` outside of `transformer` (older still).
- adapters: SAT runs the layers under its AdapterMixin in post order, whatever `layernorm_order` says;
- LoRA: SAT's LoraMixin puts `original`, `matrix_A` and `matrix_B` in the place of a linear, its LoRAMixin has
  `lora_linear.<layer>.Q_A`; ours keeps the base as it is, and has all under `mixins.<name>.layers.`

ChatGLM-6B files written before v0.4.1 keep q, k and v head by head under today's names and shapes: no file says so, so
the caller must (`interleaved_qkv=True`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError
from sat_lightning.mixins.adapter import AdapterMixin
from sat_lightning.model.keymap import blocks_from_heads
from sat_lightning.model.registry import AnyModel

FORMAT_VERSION = 1
"""Of the native folders written now."""

#: Version -> what makes the `model_config.json` of that version one of the next.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    0: lambda values: {"added_mixins": [], "removed_mixins": [], **values},
}

_NUMBERED = re.compile(r"^mixins\.(\d+)\.(.+)$")
_ORIGINAL = re.compile(r"^(.*transformer\.layers\..+)\.original\.(weight|bias)$")
_MATRIX = re.compile(r"^(.*)transformer\.(layers\..+\.matrix_[AB]\.\d+)$")
_LORA = re.compile(r"^(.*mixins\.[^.]+)\.lora_linear\.(\d+)\.([QKVO])_([AB])$")
_LORA_PLACES = {
    "Q": ("query_key_value", 0),
    "K": ("query_key_value", 1),
    "V": ("query_key_value", 2),
    "O": ("dense", 0),
}
_QKV = re.compile(r"attention\.query_key_value\.(weight|bias)$")


def migrate_native(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Bring the `model_config.json` of a native folder up to date.

    Args:
        values: as read.
        what: the file, for messages.

    Returns:
        Values of version `FORMAT_VERSION`.

    Raises:
        CheckpointError: if it was written by a newer version of this package.
    """
    version, result = int(values.get("format_version", 0)), dict(values)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{what} has format version {version}, this sat_lightning reads up to {FORMAT_VERSION}. Upgrade it: "
            "pip install -U sat_lightning."
        )
    while version < FORMAT_VERSION:
        result = MIGRATIONS[version](result)
        version += 1
    return result | {"format_version": FORMAT_VERSION}


class RenamedTensors(Mapping[str, Tensor]):
    """Tensors under other names, and in another order of rows where `interleaved` says so.

    Args:
        tensors: as they are in the file.
        names: today's name -> name in the file.
        config: of the model.
        interleaved: whether q, k and v are fused head by head.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str], config: TransformerConfig, interleaved: bool
    ) -> None:
        self._tensors, self._names, self._config, self._interleaved = tensors, names, config, interleaved

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[self._names[name]]
        if self._interleaved and _QKV.search(name):
            order = blocks_from_heads(self._config.num_attention_heads, self._config.head_size)
            return tensor.index_select(0, order)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def migrate_sat(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    config: TransformerConfig,
    *,
    mixin_names: Mapping[int | str, str] | None = None,
    interleaved_qkv: bool = False,
    prefix: str = "",
    what: str = "the checkpoint",
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Find old names among those of a SAT checkpoint, and give it today's.

    Args:
        tensors: of the checkpoint.
        own: the state dict of the model that will take them.
        config: of the model.
        mixin_names: names of mixins by their numbers.
        interleaved_qkv: whether q, k and v are fused head by head (ChatGLM-6B before v0.4.1).
        prefix: of the part of the checkpoint to read ("encoder."); it is cut off, and all else left out.
        what: the checkpoint, for messages.

    Returns:
        The tensors by today's names, and notes for the report.

    Raises:
        CheckpointError: if numbered mixins cannot be told apart, or nothing has the prefix.
    """
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    if not names:
        raise CheckpointError(f"{what}: no name begins with '{prefix}'; the first is '{next(iter(tensors), '')}'.")
    notes = [f"{prefix}* -> *"] if prefix else []
    table = "transformer.word_embeddings.weight"
    if "word_embeddings.weight" in names and table not in names:
        names[table] = names.pop("word_embeddings.weight")
        notes.append(f"word_embeddings.weight -> {table}")
    numbers = sorted({int(found[1]) for name in names if (found := _NUMBERED.match(name))})
    if numbers and not any(_NUMBERED.match(name) for name in own):
        given = {int(number): name for number, name in (mixin_names or {}).items()}
        chosen = {number: given.get(number) or _guess(number, names, tensors, own, what) for number in numbers}
        for name in list(names):
            if found := _NUMBERED.match(name):
                names[f"mixins.{chosen[int(found[1])]}.{found[2]}"] = names.pop(name)
        notes += [f"mixins.{number}.* -> mixins.{name}.*" for number, name in chosen.items()]
    notes += _rename_lora(names, tensors, own, what)
    if interleaved_qkv:
        notes.append("query_key_value: head by head -> [q|k|v]")
    return (RenamedTensors(tensors, names, config, interleaved_qkv) if notes else tensors), notes


def adapters_in_post_order(model: AnyModel, tensors: Mapping[str, Tensor]) -> dict[str, AdapterMixin]:
    """Return the adapters that a SAT checkpoint fills and whose layers would run in another order than in SAT."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterMixin)
        and any(tensor.startswith(f"{name}.ff") for tensor in tensors)
        and module.transformer.config.layernorm_order != "post"
    }


def _rename_lora(
    names: dict[str, str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str
) -> list[str]:
    """Give the weights of SAT's LoRA our names, in place; returns notes."""
    notes: dict[str, None] = {}
    for name in list(names):
        if name in own:
            continue
        if found := _ORIGINAL.match(name):
            today, note = f"{found[1]}.{found[2]}", "<linear>.original.* -> <linear>.*"
        elif found := _MATRIX.match(name):
            start, tail = f"{found[1]}mixins.", f".{found[2]}"
            fitting = [other for other in own if other.startswith(start) and other.endswith(tail)]
            fitting = [other for other in fitting if other.count(".layers.") == 1]
            if len(fitting) != 1:
                raise CheckpointError(
                    f"{what} holds LoRA weights of rank {min(tensors[names[name]].shape)} ('{name}'), and "
                    f"{len(fitting)} mixins of the model could take them. Add one before loading: add_mixin('lora', "
                    "LoraMixin(model.config, rank=..., alpha=...)); SAT's alpha is 1 unless it was given."
                )
            today, note = fitting[0], f"transformer.<linear>.matrix_* -> {fitting[0][: -len(tail)]}.<linear>.matrix_*"
        elif found := _LORA.match(name):
            place, number = _LORA_PLACES[found[3]]
            today = f"{found[1]}.layers.{found[2]}.attention.{place}.matrix_{found[4]}.{number}"
            note = f"{found[1]}.lora_linear.* -> {found[1]}.layers.*"
        else:
            continue
        names[today] = names.pop(name)
        notes[note] = None
    return list(notes)


def _guess(
    number: int, names: Mapping[str, str], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str
) -> str:
    """Return the one mixin of the model whose parameters have the names and shapes of a numbered one."""
    wanted = {
        found[2]: tensors[old].shape
        for name, old in names.items()
        if (found := _NUMBERED.match(name)) and int(found[1]) == number
    }
    mixins: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in own.items():
        parts = name.split(".")
        if parts[0] == "mixins":
            mixins.setdefault(parts[1], {})[".".join(parts[2:])] = tensor.shape
    fitting = [name for name, shapes in mixins.items() if shapes == wanted]
    if len(fitting) == 1:
        return fitting[0]
    raise CheckpointError(
        f"{what} numbers its mixins, as SAT did before v0.1, and mixins.{number} "
        f"({', '.join(sorted(wanted)[:3])}, ...) fits {' and '.join(fitting) or 'none'} of "
        f"{', '.join(mixins) or 'no mixins'}. Say which it is: "
        f'mixin_names={{{number}: "{(fitting or [*mixins, "name"])[0]}"}}.'
    )
