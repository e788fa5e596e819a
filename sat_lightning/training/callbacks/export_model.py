"""A model folder beside the training state, whatever the strategy."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sat_lightning.checkpoint.native import refuse_quantized
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
    """

    def __init__(self, folder_name: str = "model") -> None:
        super().__init__()
        self.folder_name = folder_name

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, before a run of hours, whether a folder can hold the model.

        Raises:
            CheckpointError: linears are in 4 bits.
        """
        if isinstance(model := getattr(pl_module, "model", None), AnyModel):
            refuse_quantized(model)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what the checkpoint holds; every rank has to call this."""
        self._export(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what came of the run."""
        if not is_trial(trainer):
            rank_zero_info(f"Model: {self._export(trainer)}")

    def _export(self, trainer: L.Trainer) -> Path:
        folder = run_folder(trainer) / self.folder_name
        save_consolidated(trainer, folder)
        return folder
