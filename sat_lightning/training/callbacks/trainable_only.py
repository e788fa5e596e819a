"""Checkpoints of fine-tunes without the frozen base, which is recorded by its content."""

from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy

from sat_lightning.errors import ConfigError
from sat_lightning.training.deepspeed import SATDeepSpeedStrategy
from sat_lightning.training.frozen_base import (
    FROZEN_BASE_KEY,
    check_base,
    describe_base,
    frozen_names,
    refuse_differing,
)


class TrainableOnly(L.Callback):
    """Leave the frozen weights out of checkpoints, and record their SHA-256.

    The resumed run has to bring the same frozen weights along, by a model that is loaded or by `init_from`: other ones
    are an error that names both hashes. All that trains and all buffers are saved and restored as ever, on one device,
    under DDP and under ZeRO 0 to 3, and each resumes what another has saved, on any number of ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: tuple[set[str], dict[str, Any]] | None = None
        self._inner: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let a checkpoint without the base be read.

        Raises:
            ConfigError: the strategy writes checkpoints by itself.
        """
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, SATDeepSpeedStrategy):
            name = type(strategy).__name__
            raise ConfigError(f"TrainableOnly: {name} writes all weights. Use zero_1, zero_2 or zero_3, or ddp.")
        self.teardown(trainer, pl_module, stage)  # a run that was refused has not come to it
        pl_module.strict_loading = False
        self._known = None
        if stage != "fit":
            # Only of what is fitted does Lightning show callbacks the checkpoint; the module always sees it.
            self._inner = pl_module.on_load_checkpoint
            pl_module.on_load_checkpoint = partial(self._check_and_load, trainer)  # type: ignore[method-assign]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if self._inner is not None:
            pl_module.__dict__.pop("on_load_checkpoint", None)
            self._inner = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the frozen weights out; every rank has to call this."""
        frozen = frozen_names(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        if self._known is None or self._known[0] != frozen:
            self._known = (frozen, describe_base(pl_module, trainer.strategy))
        checkpoint[FROZEN_BASE_KEY] = self._known[1]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the base, and make sure that all else was restored; every rank has to call this.

        Raises:
            CheckpointError: the base is another one, or weights are missing or unknown.
        """
        if "state_dict" not in checkpoint:
            return  # a ZeRO strategy has compared all, and restored it
        saved, own = checkpoint["state_dict"].keys(), pl_module.state_dict().keys()
        is_partial = FROZEN_BASE_KEY in checkpoint
        refuse_differing(own - saved - (frozen_names(pl_module) if is_partial else set()), saved - own)
        if is_partial:
            check_base(checkpoint[FROZEN_BASE_KEY], pl_module, trainer.strategy)

    def _check_and_load(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        self.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
        self._inner(checkpoint)
