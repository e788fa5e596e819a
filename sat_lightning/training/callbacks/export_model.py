"""A model folder beside the training state, whatever the strategy."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sat_lightning.checkpoint.native import refuse_quantized
from sat_lightning.errors import ConfigError, nearest
from sat_lightning.model.registry import AnyModel
from sat_lightning.training.consolidation import save_consolidated
from sat_lightning.training.runs import is_trial, run_folder


class ExportModel(L.Callback):
    """With every checkpoint write the whole weights as a model folder, which `AutoModel.from_pretrained` reads.

    In the run's folder `model/` holds `model.safetensors` and `model_config.json`, in the model's own names; with the
    `EMA` callback `model/ema/` holds the average. They are those of the newest checkpoint, and at the end those of the
    last step.

    Args:
        folder_name: of the folder.
        part: of a model made of models, the one that is written: `student`. Default: all of it.
    """

    def __init__(self, folder_name: str = "model", part: str | None = None) -> None:
        super().__init__()
        self.folder_name, self.part = folder_name, part

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, before a run of hours, whether a folder can hold the model.

        Raises:
            CheckpointError: linears are in 4 bits.
            ConfigError: the model has no such part.
        """
        model: Any = getattr(pl_module, "model", None)
        known = getattr(model, "parts", {})
        if self.part is not None and self.part not in known:
            raise ConfigError(
                f"ExportModel: a {type(model).__name__} has no part '{self.part}', only {', '.join(known) or 'itself'}."
                f"{nearest(self.part, known)}"
            )
        if isinstance(model, AnyModel):
            refuse_quantized(model if self.part is None else known[self.part])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what the checkpoint holds; every rank has to call this."""
        self._export(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what came of the run."""
        if not is_trial(trainer):
            rank_zero_info(f"Model: {self._export(trainer)}")

    def _export(self, trainer: L.Trainer) -> Path:
        folder = run_folder(trainer) / self.folder_name
        save_consolidated(trainer, folder, part=self.part)
        return folder
