"""Runs two checkpoints of one model on the same input: ours, and Hugging Face's own code for a Hugging Face folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.files import read_json
from sat_lightning.checkpoint.huggingface import find_key_map
from sat_lightning.checkpoint.loading import find_format
from sat_lightning.checkpoint.pretrained import from_pretrained
from sat_lightning.errors import CheckpointError
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.registry import AnyModel


@dataclass(frozen=True)
class Comparison:
    """What was compared, and the largest absolute difference found."""

    difference: float
    description: str


def compare_outputs(source: Path, target: Path, **reading: Any) -> Comparison:
    """Run two checkpoints in float32 on the same random input.

    Args:
        source: a folder of any format.
        target: another of the same model.
        **reading: how `source` is read, see `from_pretrained`.

    Returns:
        The difference of outputs, or of all weights where no example input is known.
    """
    folders = [folder for folder in (source, target) if find_format(folder) == "hf"]
    ours = from_pretrained(None, source, dtype=torch.float32, **reading)
    other = from_pretrained(None, target, dtype=torch.float32)
    differences = [_weights_differ(ours, other)]
    notes = ["all weights of both"]
    key_map = find_key_map(read_json(folders[0] / "config.json"), type(ours))[1] if folders else None
    example = _make_example(ours, key_map)
    if example is not None:
        kwargs, their_kwargs = example
        with torch.no_grad():
            outputs = [_pick_ours(model(**kwargs), key_map) for model in (ours, other)]
            differences.append(_distance(*outputs))
            notes.append("outputs of both here")
            for folder in folders:
                theirs = _load_theirs(folder)
                if theirs is None:
                    notes.append("transformers is not installed")
                    continue
                differences.append(_distance(outputs[0], _pick(theirs(**their_kwargs), key_map)))
                notes.append(f"outputs of {type(theirs).__name__}")
    return Comparison(max(differences), ", ".join(notes))


def _weights_differ(ours: AnyModel, other: AnyModel) -> float:
    mine, others = ours.state_dict(), other.state_dict()
    if mine.keys() != others.keys():
        return float("inf")
    return max((_distance(tensor, others[name]) for name, tensor in mine.items()), default=0.0)


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    difference = (one.float() - other.float()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).amax()) if difference.numel() else 0.0


def _make_example(ours: AnyModel, key_map: KeyMap | None) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the keywords of our call and of theirs; by default a batch of words."""
    generator = torch.Generator().manual_seed(0)
    if key_map is not None and key_map.example is not None:
        return key_map.example(ours.config, generator)
    if list(inspect.signature(ours.forward).parameters)[:1] != ["input_ids"] or not ours.config.vocab_size > 16:
        return None
    length = min(16, ours.config.max_sequence_length)
    # The first ids are where padding usually is, which families count positions around.
    words = {"input_ids": torch.randint(8, ours.config.vocab_size, (2, length), generator=generator)}
    return words, words


def _load_theirs(folder: Path) -> Any:
    try:
        import transformers  # a reference to compare with, where it is installed
    except ImportError:
        return None
    name = (read_json(folder / "config.json").get("architectures") or ["?"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        version = transformers.__version__
        raise CheckpointError(f"{folder}: transformers {version} has no class '{name}' to verify with.")
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def _pick(output: Any, key_map: KeyMap | None) -> Tensor:
    if key_map is not None and key_map.outputs is not None:
        return key_map.outputs[1](output)
    return output.logits if hasattr(output, "logits") else output[0]


def _pick_ours(output: Any, key_map: KeyMap | None) -> Tensor:
    if key_map is not None and key_map.outputs is not None:
        return key_map.outputs[0](output)
    found = output[0] if isinstance(output, (list, tuple)) else output
    return next(iter(found.values())) if isinstance(found, dict) else found
