"""Training with Lightning: tasks, data, optimisation and callbacks; loaded name by name, when first asked for.

Importing this package makes its strategies known to Lightning, by the names in `sat_lightning.training.strategies`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sat_lightning.training.strategies import register_strategies

if TYPE_CHECKING:
    from sat_lightning.training.callbacks import (
        EMA,
        AttentionPlotter,
        ConfusionPlotter,
        CurvePlotter,
        ExactResume,
        ExportModel,
        GradientNorm,
        ImageGrid,
        MixtureMonitor,
        PredictionWriter,
        RunMonitor,
        SampleText,
        SaveOnSignal,
        SkipNonFinite,
        TrainableOnly,
        TrainingProgressBar,
    )
    from sat_lightning.training.checkpoints import AtomicCheckpointIO, find_resume_checkpoint
    from sat_lightning.training.classification import (
        ImageClassificationTask,
        MultipleChoiceTask,
        SequenceClassificationTask,
        TokenClassificationTask,
    )
    from sat_lightning.training.confusion import ConfusionCounts
    from sat_lightning.training.datamodule import SATDataModule
    from sat_lightning.training.dataoptions import DataOptions
    from sat_lightning.training.deepspeed import SATDeepSpeedStrategy
    from sat_lightning.training.distillation import DistillationTask
    from sat_lightning.training.groups import ParameterRule
    from sat_lightning.training.masked_lm import MaskedLanguageModelingTask
    from sat_lightning.training.module import SATLightningModule
    from sat_lightning.training.optim import OptimConfig
    from sat_lightning.training.sequence_to_sequence import SequenceToSequenceTask
    from sat_lightning.training.stream import StreamDataModule
    from sat_lightning.training.tasks import LanguageModelingTask
    from sat_lightning.training.throughput import count_rows, count_tokens
    from sat_lightning.training.zero_config import ZeroOptions

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "AttentionPlotter",
    "ConfusionCounts",
    "ConfusionPlotter",
    "CurvePlotter",
    "DataOptions",
    "DistillationTask",
    "ExactResume",
    "GradientNorm",
    "ExportModel",
    "ImageClassificationTask",
    "ImageGrid",
    "LanguageModelingTask",
    "MaskedLanguageModelingTask",
    "MixtureMonitor",
    "MultipleChoiceTask",
    "OptimConfig",
    "ParameterRule",
    "PredictionWriter",
    "RunMonitor",
    "SATDataModule",
    "SATDeepSpeedStrategy",
    "SATLightningModule",
    "SampleText",
    "SaveOnSignal",
    "SequenceToSequenceTask",
    "SequenceClassificationTask",
    "SkipNonFinite",
    "StreamDataModule",
    "TokenClassificationTask",
    "TrainableOnly",
    "TrainingProgressBar",
    "ZeroOptions",
    "count_rows",
    "count_tokens",
    "find_resume_checkpoint",
]

_MODULES = {
    "callbacks": (
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
    ),
    "checkpoints": ("AtomicCheckpointIO", "find_resume_checkpoint"),
    "classification": (
        "ImageClassificationTask",
        "MultipleChoiceTask",
        "SequenceClassificationTask",
        "TokenClassificationTask",
    ),
    "confusion": ("ConfusionCounts",),
    "datamodule": ("SATDataModule",),
    "dataoptions": ("DataOptions",),
    "deepspeed": ("SATDeepSpeedStrategy",),
    "distillation": ("DistillationTask",),
    "groups": ("ParameterRule",),
    "masked_lm": ("MaskedLanguageModelingTask",),
    "module": ("SATLightningModule",),
    "optim": ("OptimConfig",),
    "sequence_to_sequence": ("SequenceToSequenceTask",),
    "stream": ("StreamDataModule",),
    "tasks": ("LanguageModelingTask",),
    "throughput": ("count_rows", "count_tokens"),
    "zero_config": ("ZeroOptions",),
}
_LAZY = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


register_strategies()
