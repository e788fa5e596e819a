"""The smallest runs: a counting sequence that a tiny model learns in seconds, and a quiet trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.models import GPT2Model
from sat_lightning.training import LanguageModelingTask

SIZES = dict(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=17, max_sequence_length=16)


class ScaleMixin(BaseMixin):
    """Scales the output of every MLP."""

    def __init__(self, config: TransformerConfig, start: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((config.hidden_size,), start))

    @non_conflict
    def mlp_forward(self, hidden_states, old_impl=None, **kw):
        return old_impl(hidden_states, **kw) * self.scale


def make_model(**changes: Any) -> GPT2Model:
    return GPT2Model(TransformerConfig(**{**SIZES, **changes}))


def make_task(model: Any = make_model, **arguments: Any) -> LanguageModelingTask:
    return LanguageModelingTask(model, **arguments)


def counting_rows(num_rows: int = 64, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows that count modulo 17, each from another number."""
    ids = (torch.arange(num_rows)[:, None] * 5 + torch.arange(length + 1)) % 17
    return [{"input_ids": row[:-1], "target_ids": row[1:]} for row in ids]


def counting_loader(num_rows: int = 64, batch_size: int = 8, **arguments: Any) -> DataLoader:
    return DataLoader(counting_rows(num_rows), batch_size=batch_size, **arguments)


class CountingData(L.LightningDataModule):
    """The counting rows as a data module, with what `SATDataModule` has beside its loaders."""

    sequence_length = 16

    def train_dataloader(self) -> DataLoader:
        return counting_loader()

    def val_dataloader(self) -> DataLoader:
        return counting_loader(16)

    test_dataloader = predict_dataloader = val_dataloader

    def bytes_per_token(self, split: str) -> float:
        return {"validation": 2.0, "test": 4.0}[split]


def make_trainer(max_steps: int = 2, **arguments: Any) -> L.Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "max_steps": max_steps, **quiet, **arguments})


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed_names(before: dict[str, torch.Tensor], model: BaseModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
