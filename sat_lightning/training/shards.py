"""The trained weights as this rank keeps them: whole, or under ZeRO the part that its optimizer updates in fp32."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from sat_lightning.errors import ConfigError
from sat_lightning.model import AnyModel


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


class _FragmentWeights(OwnWeights):
    """Stages 1 and 2: each rank has a stretch of all parameters laid end to end, in fp32, and whole copies to use."""

    is_partitioned = True

    def __init__(self, module: nn.Module, optimizer: Any) -> None:  # noqa: ANN401
        self._optimizer = optimizer
        super().__init__(module)

    def tensors(self) -> list[Tensor]:
        mappings = [parameter._hp_mapping for parameter in self._parameters]
        return [torch.empty(0) if found is None else found.get_hp_fragment().detach() for found in mappings]

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def _slot(self, name: str, parameter: Any) -> Slot:  # noqa: ANN401
        mapping = parameter._hp_mapping
        start, length = (
            (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        )
        return Slot(name=name, shape=tuple(parameter.shape), start=start, length=length)


class _PartitionWeights(OwnWeights):
    """Stage 3: each rank has an equal part of each parameter; without an optimizer only the copy to use."""

    is_partitioned = True

    def __init__(self, module: nn.Module, optimizer: Any) -> None:  # noqa: ANN401
        if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
            raise ConfigError("EMA cannot average weights that are offloaded to NVMe. Offload them to the CPU.")
        self._optimizer = optimizer
        self._is_trained = hasattr(optimizer, "fp32_partitioned_groups_flat")
        super().__init__(module)

    def tensors(self) -> list[Tensor]:
        return [self._part(p)[: slot.length] for p, slot in zip(self._parameters, self.slots, strict=True)]

    def publish(self) -> None:
        offload = getattr(self._optimizer, "parameter_offload", self._optimizer)
        # Whole copies that are still there would hide the new parts.
        offload.partition_all_parameters()
        if self._is_trained:
            for index in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(index)
            self._optimizer.invalidate_secondary_tensor()
        if offload.persistent_parameters:
            offload.persistent_parameters[0].all_gather(offload.persistent_parameters)

    def _part(self, parameter: Any) -> Tensor:  # noqa: ANN401
        if not self._is_trained:
            return parameter.ds_tensor.detach()
        group, start, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        return self._optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, start, length)

    def _slot(self, name: str, parameter: Any) -> Slot:  # noqa: ANN401
        size = parameter.partition_numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        length = max(0, min(size, parameter.ds_numel - start))
        return Slot(name=name, shape=tuple(parameter.ds_shape), start=start, length=length)


def own_weights(trainer: L.Trainer, module: nn.Module) -> OwnWeights:
    """Find the trained weights that this rank keeps.

    Args:
        trainer: its strategy has been set up.
        module: the Lightning module.

    Returns:
        In fp32 where the strategy keeps such a copy in parts (ZeRO 1 to 3), else as the forward uses them.

    Raises:
        ConfigError: the strategy shards in another way, or keeps weights on NVMe.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
        name = type(trainer.strategy).__name__
        raise ConfigError(f"EMA works on one device, under DDP and under ZeRO, and not under {name}. Use zero_3.")
    engine: Any = trainer.strategy.model
    optimizer = engine.optimizer if hasattr(engine, "zero_optimization_stage") else None
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        return _PartitionWeights(module, optimizer)
    return _FragmentWeights(module, optimizer) if hasattr(optimizer, "update_lp_params") else OwnWeights(module)


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
