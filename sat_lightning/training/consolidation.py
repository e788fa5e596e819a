"""Whole weights from whatever strategy a run has: gathered to rank 0, one tensor at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from safetensors.torch import save_file
from torch import Tensor, nn

from sat_lightning.checkpoint import save_pretrained
from sat_lightning.checkpoint.split import full_shape, local_part
from sat_lightning.model import AnyModel
from sat_lightning.training.zero_state import find_fragments, master_dtype


def consolidated_state_dict(module: Any, strategy: Strategy | None = None) -> dict[str, Tensor]:  # noqa: ANN401
    """Gather all weights to rank 0; every rank has to call this.

    The weights are those that the optimizer updates: fp32 also where the model computes in half precision. Tied weights
    stand under each of their names and share memory; frozen weights and persistent buffers are there too.

    Args:
        module: a LightningModule in a run, its Trainer, or any module outside of a run.
        strategy: of the run. Default: that of the module's trainer.

    Returns:
        On rank 0 the tensors on the host, in the names of the module's `state_dict`; on the others nothing.
    """
    module = getattr(module, "lightning_module", module)
    return dict(_gather(module, strategy or _strategy_of(module)))


def save_consolidated(
    module: Any,  # noqa: ANN401
    folder: str | os.PathLike[str],
    strategy: Strategy | None = None,
    part: str | None = None,
) -> None:
    """Write the whole weights of a run as `AutoModel.from_pretrained` reads them; every rank has to call this.

    A model of ours in the attribute `model` becomes a model folder, `model.safetensors` and `model_config.json`, in its
    own names. Of any other LightningModule the first of the two is written, in the names of its `state_dict`. Where the
    run has an `EMA`, its average is written too, as a set of its own in the folder `ema` inside.

    Args:
        module: a LightningModule in a run, or its Trainer.
        folder: made where it is missing.
        strategy: of the run. Default: that of the module's trainer.
        part: of a model made of models, the one that is written. Default: all of it.
    """
    # Late, since a strategy writes with this and the callback knows the strategy.
    from sat_lightning.training.callbacks.ema import EMA

    module = getattr(module, "lightning_module", module)
    _write_whole(module, folder, strategy, part)
    trainer: Any = getattr(module, "_trainer", None)
    for callback in trainer.callbacks if trainer is not None else ():
        if isinstance(callback, EMA) and callback.has_average:
            with callback.averaged(trainer):
                _write_whole(module, Path(folder) / "ema", strategy, part)


def _write_whole(
    module: Any,  # noqa: ANN401
    folder: str | os.PathLike[str],
    strategy: Strategy | None,
    part: str | None,
) -> None:
    tensors = consolidated_state_dict(module, strategy)
    if not tensors:
        return
    model, prefix = getattr(module, "model", None), "model."
    if part is not None:
        model, prefix = getattr(model, part), f"model.{part}."
    if isinstance(model, AnyModel):
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        with _holding(model, own):
            save_pretrained(model, folder)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    unshared = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(unshared, Path(folder) / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def _holding(model: AnyModel, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Let a model answer with weights gathered elsewhere: who writes model folders need not know of sharding."""
    model.__dict__["state_dict"] = lambda *args, **kwargs: tensors
    try:
        yield
    finally:
        del model.__dict__["state_dict"]


def _strategy_of(module: Any) -> Strategy | None:  # noqa: ANN401
    trainer = getattr(module, "_trainer", None)
    return None if trainer is None else trainer.strategy


def _gather(module: nn.Module, strategy: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    engine: Any = strategy.model if strategy is not None and hasattr(strategy.model, "zero_optimization") else None
    is_training = getattr(engine, "basic_optimizer", None) is not None
    mine = {id(f.parameter): (f.start, f.master) for f in find_fragments(engine)} if is_training else {}
    trained = {id(p) for p in module.parameters() if p.requires_grad} if is_training else set()
    is_first = strategy is None or strategy.is_global_zero
    done: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor):
            continue
        if id(tensor) not in done:
            if id(tensor) in trained:
                start, piece = mine.get(id(tensor), (0, torch.empty(0, dtype=master_dtype(engine.optimizer))))
                is_split = engine.zero_optimization()
            else:
                (start, piece), is_split = local_part(tensor), hasattr(tensor, "ds_tensor")
            whole = _assemble(prod(full_shape(tensor)), start, piece, strategy) if is_split else piece
            done[id(tensor)] = whole.detach().to("cpu", copy=True).view(full_shape(tensor)) if is_first else piece
        if is_first:
            yield name, done[id(tensor)]


def gather_tensor(tensor: Tensor, strategy: Any) -> Tensor:  # noqa: ANN401
    """Gather a tensor that ZeRO-3 has split; every rank has to call this.

    Args:
        tensor: a parameter or a buffer.
        strategy: of the run.

    Returns:
        On rank 0 the flattened whole, bit for bit; on the others of the same size.
    """
    return _assemble(prod(full_shape(tensor)), *local_part(tensor), strategy)


def _assemble(size: int, start: int, piece: Tensor, strategy: Any) -> Tensor:  # noqa: ANN401
    whole = torch.zeros(size, dtype=piece.dtype, device=strategy.root_device)
    whole[start : start + piece.numel()] = piece
    if strategy.world_size > 1:
        # Each element is on one rank: added as bytes, nothing is rounded and the sign of a zero stays.
        torch.distributed.reduce(whole.view(torch.uint8), 0)
    return whole
