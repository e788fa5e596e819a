"""The trained weights as this rank keeps them: whole, or under ZeRO the part that its optimizer updates in fp32."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sat_lightning.checkpoint.split import full_shape, local_part
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.model import AnyModel
from sat_lightning.training.zero_state import find_fragments, refresh_weights


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where this rank's part lies in a parameter."""

    name: str
    """Of the parameter, in the Lightning module."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the part, counted through the whole."""
    length: int
    """Elements of the part; 0 if this rank has none."""

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole parameter, flat."""
        return whole.reshape(-1)[self.start : self.start + self.length]


class OwnWeights:
    """The trained parameters of a module, whole: on one device, under DDP and in stage 0.

    A parameter that several modules share is there once; frozen ones and integers are not.

    Args:
        module: the Lightning module.
    """

    is_partitioned = False
    """Whether ranks have different parts."""

    def __init__(self, module: nn.Module) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
        self._parameters: list[Any] = [parameter for _, parameter in named]
        self.slots = [self._slot(name, parameter) for name, parameter in named]

    def tensors(self) -> list[Tensor]:
        """Return the parts; what is written into them may not be used before `publish`."""
        return [parameter.detach() for parameter in self._parameters]

    def publish(self) -> None:
        """Give what `tensors` hold to the forward, on all ranks; every rank has to call it."""

    def _slot(self, name: str, parameter: Any) -> Slot:  # noqa: ANN401
        return Slot(name=name, shape=tuple(parameter.shape), start=0, length=parameter.numel())


class _MasterWeights(OwnWeights):
    """What DeepSpeed's optimizer updates: in fp32, and from stage 1 on a part of each parameter, or nothing."""

    def __init__(self, module: nn.Module, engine: Any) -> None:  # noqa: ANN401
        self._optimizer = engine.optimizer
        self._fragments = {fragment.name: fragment for fragment in find_fragments(engine)}
        self.is_partitioned = engine.zero_optimization()
        super().__init__(module)

    def tensors(self) -> list[Tensor]:
        found = (self._fragments.get(slot.name) for slot in self.slots)
        return [torch.empty(0) if fragment is None else fragment.master for fragment in found]

    def publish(self) -> None:
        if hasattr(self._optimizer, "parameter_offload"):  # stage 3
            # Whole copies that are still there would hide the new parts.
            self._optimizer.parameter_offload.partition_all_parameters()
            self._optimizer.invalidate_secondary_tensor()
        refresh_weights(self._optimizer)

    def _slot(self, name: str, parameter: Any) -> Slot:  # noqa: ANN401
        mine = self._fragments.get(name)
        start, length = (mine.start, mine.master.numel()) if mine else (0, 0)
        return Slot(name=name, shape=full_shape(parameter), start=start, length=length)


class _SplitWeights(OwnWeights):
    """Stage 3 without an optimizer: the part of each parameter that the forward gathers."""

    is_partitioned = True

    def __init__(self, module: nn.Module, engine: Any) -> None:  # noqa: ANN401
        self._offload = engine.optimizer
        super().__init__(module)

    def tensors(self) -> list[Tensor]:
        return [local_part(parameter)[1] for parameter in self._parameters]

    def publish(self) -> None:
        self._offload.partition_all_parameters()
        if kept_whole := self._offload.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)

    def _slot(self, name: str, parameter: Any) -> Slot:  # noqa: ANN401
        start, piece = local_part(parameter)
        return Slot(name=name, shape=full_shape(parameter), start=start, length=piece.numel())


def own_weights(trainer: L.Trainer, module: nn.Module) -> OwnWeights:
    """Find the trained weights that this rank keeps.

    Args:
        trainer: its strategy has been set up.
        module: the Lightning module.

    Returns:
        Under DeepSpeed the fp32 ones that the optimizer updates, else those that the forward uses.

    Raises:
        ConfigError: the strategy shards in another way, or keeps weights on NVMe.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        name = type(trainer.strategy).__name__
        raise ConfigError(f"EMA works on one device, under DDP and under ZeRO, and not under {name}. Use zero_3.")
    engine: Any = trainer.strategy.model
    if not hasattr(engine, "zero_optimization"):
        return OwnWeights(module)
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise ConfigError("EMA cannot average weights that are offloaded to NVMe. Offload them to the CPU.")
    if getattr(engine, "basic_optimizer", None) is not None:
        return _MasterWeights(module, engine)
    is_split = any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())
    return _SplitWeights(module, engine) if is_split else OwnWeights(module)


def join_parts(
    slots: Sequence[Slot], parts: Sequence[Tensor], *, is_partitioned: bool, device: torch.device
) -> Iterator[tuple[Slot, Tensor]]:
    """Put whole parameters together, one at a time; every rank has to go through all of them.

    Args:
        slots: where the parts lie.
        parts: fp32, one for each slot.
        is_partitioned: whether other ranks have the rest.
        device: where ranks meet.

    Yields:
        Each slot with its whole parameter, bit for bit, on every rank.
    """
    for slot, part in zip(slots, parts, strict=True):
        if not is_partitioned:
            yield slot, part.reshape(slot.shape)
            continue
        # Added as integers, nothing is rounded and the sign of a zero stays.
        bits = torch.zeros(math.prod(slot.shape), dtype=torch.int32, device=device)
        slot.cut(bits).copy_(part.view(torch.int32))
        torch.distributed.all_reduce(bits)
        yield slot, bits.view(torch.float32).reshape(slot.shape)


def check_averages(slots: Sequence[Slot], saved: Mapping[str, tuple[int, ...] | None]) -> None:
    """Refuse the averages of other weights.

    Args:
        slots: of the weights that train.
        saved: shapes by name; the same on all ranks, so that all of them refuse.

    Raises:
        CheckpointError: names or shapes differ.
    """
    trained = {slot.name: slot.shape for slot in slots}
    for name in sorted(saved.keys() | trained.keys()):
        if saved.get(name) != trained.get(name):
            raise CheckpointError(
                f"EMA: of {name} the checkpoint averages {saved.get(name, 'nothing')}, and this run trains "
                f"{trained.get(name, 'nothing')} (shapes). Train what was trained, or remove EMA."
            )


def send_wholes(
    trainer: L.Trainer, slots: Sequence[Slot], wholes: Mapping[str, Tensor]
) -> Iterator[tuple[Slot, Tensor]]:
    """Yield whole tensors that were read from a checkpoint; every rank has to go through all of them.

    Args:
        trainer: of DeepSpeed's own checkpoints only its first rank is sure to have read them.
        slots: which tensors.
        wholes: by name.

    Yields:
        Each slot with its tensor.
    """
    is_sent = isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.world_size > 1
    device = trainer.strategy.root_device
    for slot in slots:
        if not is_sent:
            yield slot, wholes[slot.name]
            continue
        whole = wholes[slot.name].to(device) if trainer.is_global_zero else torch.empty(slot.shape, device=device)
        torch.distributed.broadcast(whole, 0)
        yield slot, whole


def move_averages(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """Set every average to `decay * average + (1 - decay) * weight`, all in one launch where dtypes agree.

    Args:
        averages: changed in place.
        weights: of the same shapes.
        decay: how much of the averages stays.
    """
    pairs = [(average, weight) for average, weight in zip(averages, weights, strict=True) if weight.numel()]
    if not pairs:
        return
    old, new = [average for average, _ in pairs], [weight for _, weight in pairs]
    if all(average.dtype == weight.dtype for average, weight in pairs):
        torch._foreach_lerp_(old, new, 1 - decay)
    else:
        torch._foreach_mul_(old, decay)
        torch._foreach_add_(old, new, alpha=1 - decay)


def model_names(module: nn.Module) -> dict[str, list[str]]:
    """Return for the first name of each parameter in a Lightning module all its names in the model.

    Args:
        module: of a task of ours the names of its `model` lose that word; those of compiled parts lose the wrapper's.
    """
    is_task = isinstance(getattr(module, "model", None), AnyModel)
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def plain(name: str) -> str:
        return name.replace("_orig_mod.", "").removeprefix("model." if is_task else "")

    return {group[0]: [plain(name) for name in group] for group in names.values()}
