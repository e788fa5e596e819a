"""What a checkpoint without its frozen weights says of them: SHA-256s that any strategy and any precision can check."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn

from sat_lightning.checkpoint.content import add_tensor, with_constants
from sat_lightning.checkpoint.report import some
from sat_lightning.checkpoint.split import full_shape, is_split
from sat_lightning.errors import CheckpointError
from sat_lightning.training.consolidation import gather_tensor

#: Where a checkpoint says that it holds only what was trained.
FROZEN_BASE_KEY = "frozen_base"
#: What ZeRO casts a base to: one that is fp32 elsewhere can still be compared.
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def frozen_names(module: nn.Module) -> set[str]:
    """Return the names of frozen parameters in a state dict, all of them where modules share one.

    Args:
        module: any module.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, _ in with_constants(item for item in parameters if not item[1].requires_grad)}


def describe_base(module: nn.Module, strategy: Strategy | None = None) -> dict[str, Any]:
    """Return what identifies the frozen parameters; every rank has to call this.

    Args:
        module: any module; weights that ZeRO-3 has split are gathered one at a time.
        strategy: of the run.

    Returns:
        `sha256` over names, types, shapes and bytes in the order of the names, `num_tensors`, `precisions` and, for
        each half precision that this base may be cast to, the SHA-256 it would have then (`rounded`).
    """
    parameters = ((name, p) for name, p in module.named_parameters() if not p.requires_grad)
    frozen = sorted(with_constants(parameters), key=lambda item: item[0])
    is_first = strategy is None or strategy.is_global_zero
    precisions = sorted({str(p.dtype).removeprefix("torch.") for _, p in frozen if p.is_floating_point()})
    digests = {"": hashlib.sha256()}
    digests |= {half: hashlib.sha256() for half in _HALVES if set(precisions) <= {"float32", half}}
    for name, parameter in frozen:
        whole = gather_tensor(parameter, strategy) if is_split(parameter) else parameter.detach()
        for half, digest in digests.items() if is_first else ():
            is_rounded = half and parameter.is_floating_point()
            add_tensor(digest, name, whole.to(_HALVES[half]) if is_rounded else whole, full_shape(parameter))
    found = {half: digest.hexdigest() for half, digest in digests.items()}
    if strategy is not None:
        found = strategy.broadcast(found)
    exact = found.pop("")
    return {"sha256": exact, "num_tensors": len(frozen), "precisions": precisions, "rounded": found}


def check_base(saved: dict[str, Any], module: nn.Module, strategy: Strategy | None = None) -> None:
    """Refuse a base that is not the one a checkpoint was trained on; every rank has to call this.

    Args:
        saved: what `describe_base` said.
        module: with its frozen weights.
        strategy: of the run.

    Raises:
        CheckpointError: other tensors are frozen, or they hold other values.
    """
    now = describe_base(module, strategy)
    if now["num_tensors"] != saved["num_tensors"]:
        raise CheckpointError(
            f"The checkpoint was trained with {saved['num_tensors']} frozen tensors, this model has "
            f"{now['num_tensors']}. Freeze what was frozen, or train from the weights alone (init_from)."
        )
    if now["sha256"] == saved["sha256"]:
        return
    then, own = saved["sha256"], now["sha256"]
    if now["precisions"] != saved["precisions"]:
        common = now["rounded"].keys() & saved["rounded"].keys()
        if not common:
            raise CheckpointError(
                f"The frozen weights of the checkpoint were {', '.join(saved['precisions'])}, those of this run are "
                f"{', '.join(now['precisions'])}, and cannot be compared. Resume in the precision of the checkpoint."
            )
        half = min(common)
        if now["rounded"][half] == saved["rounded"][half]:
            return
        then, own = saved["rounded"][half], now["rounded"][half]
    raise CheckpointError(
        f"The checkpoint was trained on another base: its frozen weights have SHA-256 {then}, those of this model "
        f"{own}. Load the base that it was trained on."
    )


def refuse_differing(missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Refuse a checkpoint of another model.

    Args:
        missing: names that it lacks.
        unknown: names that the model lacks.

    Raises:
        CheckpointError: there are such.
    """
    missing, unknown = sorted(missing), sorted(unknown)
    if missing or unknown:
        raise CheckpointError(
            f"The checkpoint does not fit: it lacks {some(missing)}, and the model lacks {some(unknown)}. Build the "
            "model as it was, with the same mixins and the same frozen weights."
        )
