"""Checkpoints of ZeRO runs: a folder, whole or not there, that any number of ranks and any stage can continue from.

state.ckpt                        what Lightning saves beside weights and optimizer: loops, callbacks, data
engine.json                       steps counted, loss scale, settings of the parameter groups
zero-00000-of-00002.safetensors   weights and moments, a file a rank (see `zero_shards`); no frozen weights where
                                  `TrainableOnly` leaves them out
model.safetensors                 the consolidated weights, with `model_config.json`, where the strategy is told to
complete                          written last
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from sat_lightning.errors import CheckpointError
from sat_lightning.training.checkpoints import COMPLETE_NAME, AtomicCheckpointIO, commit, partial_path
from sat_lightning.training.consolidation import save_consolidated
from sat_lightning.training.frozen_base import FROZEN_BASE_KEY, check_base, refuse_differing
from sat_lightning.training.together import Together
from sat_lightning.training.zero_shards import (
    AVERAGE,
    EMA_KEY,
    PARTS_KEY,
    SHARDS_KEY,
    WEIGHT,
    LightningShards,
    ShardFiles,
    write_shard,
)
from sat_lightning.training.zero_state import (
    load_training_state,
    load_untrained,
    parts_of,
)

STATE_NAME, ENGINE_NAME = "state.ckpt", "engine.json"
_KEPT_ELSEWHERE = ("state_dict", "optimizer_states", PARTS_KEY)
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def save_zero_checkpoint(
    strategy: Any,  # noqa: ANN401
    checkpoint: dict[str, Any],
    path: str | os.PathLike[str],
    consolidates: bool,
) -> None:
    """Write the checkpoint of a run; every rank has to call this, and all write to one file system.

    Args:
        strategy: the `SATDeepSpeedStrategy` of the run.
        checkpoint: what Lightning collected.
        path: of the folder.
        consolidates: whether to write `model.safetensors` too.

    Raises:
        CheckpointError: a rank could not write; on every rank, and what stood at `path` is left.
    """
    target = Path(strategy.broadcast(str(path)))
    partial = partial_path(target)
    module, engine = strategy.lightning_module, strategy.deepspeed_engine
    together = Together(strategy)
    skips_frozen = FROZEN_BASE_KEY in checkpoint
    together.do(lambda: _make_empty(partial), f"{target} could not be written", on_rank=0)

    def write() -> None:
        parts = parts_of(engine, module, strategy.global_rank, checkpoint.get(PARTS_KEY, {}), skips_frozen)
        write_shard(partial, strategy.global_rank, strategy.world_size, parts)
        if strategy.is_global_zero:
            rest = {key: value for key, value in checkpoint.items() if key not in _KEPT_ELSEWHERE}
            torch.save(rest, partial / STATE_NAME)
            facts = read_facts(engine) | {"groups_of": strategy.names_by_group, "aliases": _aliases(module)}
            (partial / ENGINE_NAME).write_text(json.dumps(facts, indent=1), encoding="utf-8")

    try:
        together.do(write, f"{target} could not be written")
        if consolidates:
            save_consolidated(module, partial, strategy)
        together.do(lambda: commit(partial, target), f"{target} could not be written", on_rank=0)
    except CheckpointError:
        if strategy.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise


def load_zero_checkpoint(
    strategy: Any,  # noqa: ANN401
    path: str | os.PathLike[str],
    weights_only: bool | None,
) -> dict[str, Any]:
    """Read a checkpoint into engine and model; every rank has to call this.

    Args:
        strategy: the `SATDeepSpeedStrategy` of this run, which may have other ranks and another stage.
        path: a folder of a ZeRO run, or a file of any other.
        weights_only: False executes what a pickle says; for files that you made yourself.

    Returns:
        What Lightning saved, for it to restore.

    Raises:
        CheckpointError: it is not complete, not safe to read, or does not fit the run.
    """
    folder = Path(path)
    reader, module, resets = AtomicCheckpointIO(), strategy.lightning_module, _resets_optimizer(strategy)
    if not folder.is_dir():
        checkpoint = reader.load_checkpoint(folder, weights_only=weights_only)
        names = [] if resets else [name for group in strategy.names_by_group for name in group]
        shards: Any = LightningShards(checkpoint, names)
        facts = _facts_of(checkpoint)
    else:
        refuse_incomplete(folder)
        checkpoint = reader.load_checkpoint(folder / STATE_NAME, weights_only=weights_only)
        shards = ShardFiles(folder)
        facts = json.loads((folder / ENGINE_NAME).read_text(encoding="utf-8"))
    is_partial = FROZEN_BASE_KEY in checkpoint
    if is_partial or module.strict_loading:
        refuse_differing((), set(shards.names) - module.state_dict().keys())
    if is_partial:
        check_base(checkpoint[FROZEN_BASE_KEY], module, strategy)
    if module.trainer.state.fn == TrainerFn.FITTING:
        load_training_state(strategy.deepspeed_engine, module, shards, is_partial, resets)
        write_facts(strategy.deepspeed_engine, facts, resets)
    else:
        load_untrained(None, module, shards, is_partial)
    rest = {key: value for key, value in checkpoint.items() if key not in _KEPT_ELSEWHERE}
    return rest | ({SHARDS_KEY: shards} if folder.is_dir() else {})


def refuse_incomplete(folder: Path) -> None:
    """Raise if a folder is no checkpoint of a ZeRO run that was written to its end.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: it is not.
    """
    if not (folder / COMPLETE_NAME).is_file():
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has no file '{COMPLETE_NAME}'. Resume from an earlier one."
        )


def read_as_lightning(folder: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
    """Read a ZeRO checkpoint whole, as a single-file checkpoint of Lightning's, for strategies that split nothing.

    Args:
        folder: of the checkpoint.
        weights_only: see `load_zero_checkpoint`.

    Returns:
        With `state_dict` and `optimizer_states`.

    Raises:
        CheckpointError: it is not complete or not safe to read.
    """
    folder = Path(folder)
    refuse_incomplete(folder)
    checkpoint = AtomicCheckpointIO().load_checkpoint(folder / STATE_NAME, weights_only=weights_only)
    facts = json.loads((folder / ENGINE_NAME).read_text(encoding="utf-8"))
    shards = ShardFiles(folder)
    order = [name for group in facts["groups_of"] for name in group]
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(order):
        moments = {kind: shards.whole(name, kind) for kind in shards.kinds(name) if kind not in (WEIGHT, AVERAGE)}
        if moments:
            state[index] = moments | {key: torch.tensor(value) for key, value in shards.scalars(name).items()}
    numbers = iter(range(len(order)))
    groups = [
        {**group, "params": [next(numbers) for _ in names]}
        for group, names in zip(facts["groups"], facts["groups_of"], strict=True)
    ]
    checkpoint["state_dict"] = {name: shards.whole(name) for name in shards.names}
    for alias, name in facts.get("aliases", {}).items():
        if name in checkpoint["state_dict"]:
            checkpoint["state_dict"][alias] = checkpoint["state_dict"][name]
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    if EMA_KEY in checkpoint:
        averages = {name: shards.whole(name, AVERAGE) for name in order if AVERAGE in shards.kinds(name)}
        checkpoint[EMA_KEY] = {"averages": averages} | checkpoint[EMA_KEY]
    return checkpoint


def read_facts(engine: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a checkpoint keeps of an engine beside tensors, as JSON can hold it.

    Args:
        engine: a `DeepSpeedEngine`.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    return {
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "loss_scaler": {k: v for k, v in _scaler(engine.optimizer).items() if isinstance(v, int | float | None)},
        "groups": groups,
    }


def write_facts(engine: Any, facts: dict[str, Any], skips_groups: bool = False) -> None:  # noqa: ANN401
    """Put what `read_facts` returned into an engine.

    Args:
        engine: a `DeepSpeedEngine`.
        facts: as JSON gives them back.
        skips_groups: leave the optimizer the settings that it has.

    Raises:
        CheckpointError: the optimizer had another number of groups.
    """
    for name, value in facts["counters"].items():
        setattr(engine, name, value)
    _scaler(engine.optimizer).update(facts["loss_scaler"])
    if skips_groups:
        return
    groups = engine.optimizer.param_groups
    if len(groups) != len(facts["groups"]):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(facts['groups'])} parameter groups, this run's has {len(groups)}."
        )
    for group, saved in zip(groups, facts["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})


def _scaler(owner: Any) -> dict[str, Any]:  # noqa: ANN401
    scaler = getattr(owner, "loss_scaler", None) or getattr(owner, "loss_scale_config", None)
    return vars(scaler) if hasattr(scaler, "__dict__") else {}


def _facts_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    states = checkpoint.get("optimizer_states") or [{"param_groups": []}]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in states[0]["param_groups"]]
    return {"counters": {"global_steps": checkpoint["global_step"]}, "loss_scaler": {}, "groups": groups}


def _resets_optimizer(strategy: Any) -> bool:  # noqa: ANN401
    # Late, since callbacks know the strategies.
    from sat_lightning.training.callbacks.exact_resume import ExactResume

    callbacks = strategy.lightning_module.trainer.callbacks
    return any("optimizer" in callback.reset for callback in callbacks if isinstance(callback, ExactResume))


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of tensors that modules share, with those under which they are saved."""
    first: dict[int, str] = {}
    tensors = [(n, t) for n, t in module.state_dict(keep_vars=True).items() if torch.is_tensor(t)]
    return {name: kept for name, tensor in tensors if (kept := first.setdefault(id(tensor), name)) != name}


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
