"""Callbacks for any Lightning pipeline, ours or a stranger's."""

from sat_lightning.training.callbacks.curves import CurvePlotter
from sat_lightning.training.callbacks.ema import EMA
from sat_lightning.training.callbacks.exact_resume import ExactResume
from sat_lightning.training.callbacks.export_model import ExportModel
from sat_lightning.training.callbacks.gradient_norm import GradientNorm
from sat_lightning.training.callbacks.mixture import MixtureMonitor
from sat_lightning.training.callbacks.monitor import RunMonitor
from sat_lightning.training.callbacks.pictures import AttentionPlotter, ConfusionPlotter, ImageGrid
from sat_lightning.training.callbacks.predictions import PredictionWriter
from sat_lightning.training.callbacks.progress import TrainingProgressBar
from sat_lightning.training.callbacks.sample import SampleText
from sat_lightning.training.callbacks.save_on_signal import SaveOnSignal
from sat_lightning.training.callbacks.skip_nonfinite import SkipNonFinite
from sat_lightning.training.callbacks.trainable_only import TrainableOnly

__all__ = [
    "EMA",
    "AttentionPlotter",
    "ConfusionPlotter",
    "CurvePlotter",
    "ExactResume",
    "GradientNorm",
    "ExportModel",
    "ImageGrid",
    "MixtureMonitor",
    "PredictionWriter",
    "RunMonitor",
    "SampleText",
    "SaveOnSignal",
    "SkipNonFinite",
    "TrainableOnly",
    "TrainingProgressBar",
]
