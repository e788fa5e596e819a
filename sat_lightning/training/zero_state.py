"""The state of a DeepSpeed engine, parameter by parameter: what a rank has of each, for saving, loading and gathering.

DeepSpeed keeps flat buffers whose layout depends on the stage, the precision and the number of ranks. Here they become
`Fragment`s: views of those buffers, each with the name of its parameter. What is written in them is trained on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sat_lightning.checkpoint.split import full_shape, local_part
from sat_lightning.errors import CheckpointError
from sat_lightning.training.zero_shards import AVERAGE, WEIGHT, Part, Shards


@dataclass(frozen=True)
class Fragment:
    """What this rank has of one trained parameter."""

    name: str
    parameter: nn.Parameter
    start: int
    """Where it begins in the flattened parameter."""
    master: Tensor
    """`[n]`, a view of what the optimizer updates: fp32, or bf16 throughout."""
    flat: Tensor
    """The tensor the optimizer knows, of which `master` is a part."""
    offset: int
    """Where `master` begins in `flat`."""
    state: dict[str, Any] = field(repr=False)
    """What the optimizer keeps of `flat`; empty before its first step."""

    @property
    def moments(self) -> dict[str, Tensor]:
        """Views of what the optimizer keeps for each element."""
        shape = self.flat.shape
        return {
            kind: value.view(-1)[self.offset : self.offset + self.master.numel()]
            for kind, value in self.state.items()
            if torch.is_tensor(value) and value.shape == shape and value.dim() > 0
        }

    @property
    def scalars(self) -> dict[str, float]:
        """What the optimizer keeps beside that: the number of its steps."""
        moments = self.moments
        return {kind: float(value) for kind, value in self.state.items() if kind not in moments}


def find_fragments(engine: Any) -> list[Fragment]:  # noqa: ANN401
    """Return what this rank has of every parameter that trains.

    Args:
        engine: a `DeepSpeedEngine`.

    Returns:
        In the order of the module; a parameter of which this rank has nothing is left out. Stage 0 splits nothing:
        there every rank has all of it.

    Raises:
        CheckpointError: DeepSpeed has wrapped the optimizer in a way that this does not know.
    """
    owner = engine.optimizer
    places = _find_places(owner)
    states = getattr(owner, "optimizer", owner).state
    fragments = []
    for name, parameter in engine.module.named_parameters():
        if parameter in places:
            flat, offset, start, length = places[parameter]
            if length > 0:
                master = flat.detach().view(-1)[offset : offset + length]
                fragments.append(Fragment(name, parameter, start, master, flat, offset, states.get(flat, {})))
    return fragments


def _find_places(owner: Any) -> dict[nn.Parameter, tuple[Tensor, int, int, int]]:  # noqa: ANN401
    """Return for each parameter: its flat tensor, where in it, where in the parameter, and how many elements."""
    if hasattr(owner, "fp32_partitioned_groups_flat"):  # stage 3
        found = {}
        for group in owner.fp16_groups:
            for parameter in group:
                index, offset, length = owner.grad_position[owner.get_param_id(parameter)]
                start = length * torch.distributed.get_rank(parameter.ds_process_group)
                length = max(0, min(length, parameter.ds_numel - start))  # the last ranks' parts end in padding
                found[parameter] = (owner.fp32_partitioned_groups_flat[index], offset, start, length)
        return found
    for groups, flats in (
        ("bit16_groups", "single_partition_of_fp32_groups"),  # stages 1 and 2
        ("bf16_groups", "fp32_groups_flat_partition"),  # stage 1 in bf16
    ):
        if hasattr(owner, flats):
            return {
                parameter: (
                    flat,
                    place.hp_fragment_address.start,
                    place.lp_fragment_address.start,
                    place.hp_fragment.numel(),
                )
                for group, flat in zip(getattr(owner, groups), getattr(owner, flats), strict=True)
                for parameter in group
                if (place := parameter._hp_mapping) is not None
            }
    if hasattr(owner, "fp32_groups"):  # stage 0 in half precision
        pairs = zip(owner.fp16_groups, owner.fp32_groups, strict=True)
        return {p: (master, 0, 0, p.numel()) for half, full in pairs for p, master in zip(half, full, strict=True)}
    if isinstance(owner, torch.optim.Optimizer):  # stage 0 in fp32
        return {p: (p, 0, 0, p.numel()) for group in owner.param_groups for p in group["params"]}
    raise CheckpointError(f"The state of a {type(owner).__name__} cannot be taken apart. Use zero_1, zero_2 or zero_3.")


def master_dtype(owner: Any) -> torch.dtype:  # noqa: ANN401
    """Return the precision of what the optimizer updates.

    Args:
        owner: the optimizer of a `DeepSpeedEngine`.
    """
    for flats in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(owner, flats):
            return getattr(owner, flats)[0].dtype
    return torch.float32


def parts_of(
    engine: Any,  # noqa: ANN401
    module: nn.Module,
    rank: int,
    averages: Mapping[str, Tensor] = MappingProxyType({}),
    skips_frozen: bool = False,
) -> Iterator[Part]:
    """Yield what this rank writes to a checkpoint: every element is written by one rank at least.

    Args:
        engine: a `DeepSpeedEngine`.
        module: the LightningModule in it.
        rank: of this process.
        averages: of the weights, by name, in the same parts.
        skips_frozen: leave out frozen parameters, which the resumed run brings along.
    """
    trained = find_fragments(engine)
    is_split = engine.zero_optimization()
    for fragment in trained if is_split or rank == 0 else []:
        tensors = {WEIGHT: fragment.master, **fragment.moments}
        tensors |= {AVERAGE: averages[fragment.name]} if fragment.name in averages else {}
        yield Part(fragment.name, full_shape(fragment.parameter), fragment.start, tensors, fragment.scalars)
    for name, tensor in untrained(engine, module, skips_frozen):
        start, piece = local_part(tensor)
        if (piece.numel() or not prod(full_shape(tensor))) and (rank == 0 or hasattr(tensor, "ds_tensor")):
            yield Part(name, full_shape(tensor), start, {WEIGHT: piece}, {})


def untrained(engine: Any, module: nn.Module, skips_frozen: bool = False) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Yield frozen parameters and persistent buffers by name, each tensor once.

    Args:
        engine: a `DeepSpeedEngine` that trains; None if nothing is trained, and all parameters are wanted.
        module: its module.
        skips_frozen: leave out frozen parameters.
    """
    seen = {id(p) for p in module.parameters() if (engine if p.requires_grad else skips_frozen)}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def load_training_state(
    engine: Any,  # noqa: ANN401
    module: nn.Module,
    shards: Shards,
    skips_frozen: bool = False,
    skips_moments: bool = False,
) -> None:
    """Put weights and moments of a checkpoint into an engine; every rank has to call this.

    Args:
        engine: a `DeepSpeedEngine`, fresh or not.
        module: the LightningModule in it.
        shards: of the checkpoint, written by any number of ranks in any stage.
        skips_frozen: leave frozen parameters as they are.
        skips_moments: let the optimizer begin anew.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
    """
    owner = engine.optimizer
    states = getattr(owner, "optimizer", owner).state
    with torch.no_grad():
        for fragment in find_fragments(engine):
            _check(shards, fragment.name, full_shape(fragment.parameter))
            stop = fragment.start + fragment.master.numel()
            fragment.master.copy_(shards.read(fragment.name, WEIGHT, fragment.start, stop))
            if skips_moments:
                continue
            state = states[fragment.flat]
            for kind in (kind for kind in shards.kinds(fragment.name) if kind not in (WEIGHT, AVERAGE)):
                value = shards.read(fragment.name, kind, fragment.start, stop)
                if kind not in state:
                    state[kind] = torch.zeros_like(fragment.flat, dtype=value.dtype).detach()
                state[kind].view(-1)[fragment.offset : fragment.offset + value.numel()] = value
            for kind, number in shards.scalars(fragment.name).items():
                like = state.get(kind, torch.zeros((), device=_step_device(owner, fragment.flat)))
                state[kind] = torch.full_like(like, number) if torch.is_tensor(like) else type(like)(number)
        load_untrained(engine, module, shards, skips_frozen)
        refresh_weights(owner)


def _step_device(owner: Any, flat: Tensor) -> torch.device:  # noqa: ANN401
    """A fused optimizer keeps the number of steps on the device, the others on the host."""
    groups = getattr(owner, "optimizer", owner).param_groups
    is_on_device = any(group.get("fused") or group.get("capturable") for group in groups)
    return flat.device if is_on_device else torch.device("cpu")


def load_untrained(engine: Any, module: nn.Module, shards: Shards, skips_frozen: bool = False) -> None:  # noqa: ANN401
    """Put the weights of a checkpoint into whatever no optimizer updates; every rank has to call this.

    Args:
        engine: see `untrained`.
        module: the LightningModule in it.
        shards: of the checkpoint.
        skips_frozen: leave frozen parameters as they are.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
    """
    with torch.no_grad():
        for name, tensor in untrained(engine, module, skips_frozen):
            _check(shards, name, full_shape(tensor))
            if hasattr(tensor, "ds_tensor"):
                start, piece = local_part(tensor)
                piece.copy_(shards.read(name, WEIGHT, start, start + piece.numel()))
            if tensor.numel() == prod(full_shape(tensor)):  # ZeRO-3 keeps small ones whole beside their parts
                tensor.copy_(shards.read(name, WEIGHT, 0, tensor.numel()).view_as(tensor))


def refresh_weights(owner: Any) -> None:  # noqa: ANN401
    """Compute with the weights that the optimizer has; every rank has to call this.

    Args:
        owner: the optimizer of a `DeepSpeedEngine`.
    """
    if hasattr(owner, "fp32_partitioned_groups_flat"):
        for index in range(len(owner.fp16_groups)):
            owner._reassign_or_swap_out_partitioned_parameters(index)
        if owner.persistent_parameters:
            owner.persistent_parameters[0].partition(owner.persistent_parameters)
            owner.persistent_parameters[0].all_gather(owner.persistent_parameters)
    elif hasattr(owner, "update_lp_params"):
        owner.update_lp_params()
    elif hasattr(owner, "fp32_groups"):
        for half, full in zip(owner.fp16_groups, owner.fp32_groups, strict=True):
            for parameter, master in zip(half, full, strict=True):
                parameter.copy_(master)


def _check(shards: Shards, name: str, shape: tuple[int, ...]) -> None:
    found = shards.shape(name)
    if found is None:
        raise CheckpointError(
            f"The checkpoint has no '{name}'. Resume with the model and the mixins it was saved with."
        )
    if found != shape:
        raise CheckpointError(f"'{name}' is {list(found)} in the checkpoint, {list(shape)} in the model.")
