"""Checkpoints of fine-tunes without the frozen base, which is recorded by its content."""

import hashlib
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from sat_lightning.checkpoint.report import some
from sat_lightning.errors import CheckpointError, ConfigError

KEY = "frozen_base"


class TrainableOnly(L.Callback):
    """Leave the frozen weights out of checkpoints, and record their SHA-256.

    The resumed run has to bring the same frozen weights along, by a model that is loaded or by `init_from`: other ones
    are an error that names both hashes. All that trains and all buffers are saved and restored as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hash = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let a checkpoint without the base be read.

        Raises:
            ConfigError: the strategy writes checkpoints by itself.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigError("TrainableOnly: ZeRO strategies write all weights. Remove it, or use ddp.")
        pl_module.strict_loading = False
        self._hash = ""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the frozen weights out."""
        frozen = _frozen_names(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        self._hash = self._hash or hash_frozen(pl_module)
        checkpoint[KEY] = {"sha256": self._hash, "num_tensors": len(frozen)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the base, and make sure that all else was restored.

        Raises:
            CheckpointError: the base is another one, or weights are missing or unknown.
        """
        saved, frozen = checkpoint["state_dict"].keys(), _frozen_names(pl_module)
        own = pl_module.state_dict().keys()
        missing, unknown = own - saved - (frozen if KEY in checkpoint else set()), saved - own
        if missing or unknown:
            raise CheckpointError(
                f"The checkpoint does not fit: it lacks {some(sorted(missing))}, and the model lacks "
                f"{some(sorted(unknown))}. Build the model as it was, with the same mixins and the same frozen weights."
            )
        if KEY in checkpoint and (now := hash_frozen(pl_module)) != (then := checkpoint[KEY]["sha256"]):
            raise CheckpointError(
                f"The checkpoint was trained on another base: its frozen weights have SHA-256 {then}, those of this "
                f"model {now}. Load the base that it was trained on."
            )


def hash_frozen(module: nn.Module) -> str:
    """Return the SHA-256 of all frozen parameters: names, types, shapes and bytes, in the order of the names.

    Args:
        module: any module.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
            content = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()


def _frozen_names(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.requires_grad}
