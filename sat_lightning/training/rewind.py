"""What a forward pass leaves behind, taken back."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


@dataclass
class Snapshot:
    """What a forward pass may change, as it was."""

    random: tuple[Any, Tensor, Tensor | None]
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    metrics: list[tuple[Metric, dict[str, Any]]]


class StepRewind:
    """Undoes forward passes: random numbers drawn, buffers changed (BatchNorm), torchmetrics updated.

    Which buffers a forward changes is learned from the first one. Numpy's random numbers and attributes of the user's
    own are left as they are.

    Args:
        module: whose forward it is.
        device: that computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._slots = [(owner, name) for owner in module.modules() for name in owner._buffers]
        self._metrics = [owner for owner in module.modules() if isinstance(owner, Metric)]
        self._has_learned = False

    def remember(self) -> Snapshot:
        """Take note of everything, before a forward pass."""
        device_state = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        buffers = []
        for owner, name in self._slots:
            buffer = owner._buffers.get(name)
            if buffer is not None:
                buffers.append((owner, name, buffer, buffer.detach().clone()))
        metrics = [(metric, _copy_metric(metric)) for metric in self._metrics]
        return Snapshot((random.getstate(), torch.get_rng_state(), device_state), buffers, metrics)

    def learn(self, before: Snapshot) -> None:
        """After the first forward pass: find out which buffers it changed.

        Args:
            before: what was remembered before it.
        """
        if self._has_learned:
            return
        self._has_learned = True
        self._slots = [
            (owner, name)
            for owner, name, buffer, copy in before.buffers
            # By value: BatchNorm's kernels do not count up the version of what they change.
            if owner._buffers.get(name) is not buffer or not torch.equal(buffer, copy)
        ]

    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back.

        Args:
            snapshot: as it was; it can be restored more than once.
        """
        python, host, device = snapshot.random
        random.setstate(python)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self._device)
        with torch.no_grad():
            for owner, name, buffer, copy in snapshot.buffers:
                buffer.copy_(copy)
                owner._buffers[name] = buffer
        for metric, state in snapshot.metrics:
            for name, value in state.items():
                setattr(metric, name, _copy_value(value))


def _copy_metric(metric: Metric) -> dict[str, Any]:
    state = {name: _copy_value(getattr(metric, name)) for name in metric._defaults}
    return {**state, "_update_count": metric._update_count, "_computed": metric._computed}


def _copy_value(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
