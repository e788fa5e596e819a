"""Fine-tuning as users of `sat_lightning` do it: a task, its mixins, and the Trainer of Lightning."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from baton import Baton
from lightning.pytorch import callbacks
from sentiment import (
    ALPHA,
    BATCH_SIZE,
    BETAS,
    BOTTLENECK,
    CLASSES,
    CLIP,
    EPSILON,
    MAX_LENGTH,
    METHODS,
    MULTIPLE_OF,
    PREFIX_LENGTH,
    RANK,
    WEIGHT_DECAY,
    Job,
    Row,
    Sentences,
    draw,
    facts,
)
from torch import Tensor
from torch.utils.data import DataLoader

from sat_lightning.data import LabelCollate, UnpadCollate, get_tokenizer
from sat_lightning.data.framing import Frame
from sat_lightning.mixins import AdapterMixin, LoraMixin, MLPHeadMixin, PrefixTuningMixin
from sat_lightning.models import BertModel
from sat_lightning.training import OptimConfig, SequenceClassificationTask


class Holder(callbacks.Callback):
    """Computes only with the baton in hand."""

    def __init__(self, baton: Baton, tokens: list[int]) -> None:
        self.baton, self.tokens = baton, tokens

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.baton.start(self.tokens)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.baton.step(outputs["loss"])


def body(folder: Path) -> BertModel:
    model = BertModel.from_pretrained(folder, hidden_dropout=0.0, attention_dropout=0.0)
    for name in ("bert-final", "pooler"):  # the one that the files have
        if name in model.mixins:
            model.del_mixin(name)
    return model


def mixins(method: str) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"head": lambda config: MLPHeadMixin(config, CLASSES, pooling="mean")}
    if "prefix" in method:
        # PEFT's words stand behind the prefix, at positions of their own.
        first = PREFIX_LENGTH if method == "prefix" else 0
        found["prefix"] = lambda config: PrefixTuningMixin(config, prefix_len=PREFIX_LENGTH, first_position=first)
    if "lora" in method:
        found["lora"] = lambda config: LoraMixin(config, rank=RANK, alpha=ALPHA)
    if method == "adapters":
        found["adapters"] = lambda config: AdapterMixin(config, BOTTLENECK)
    return found


def start(job: Job, model: BertModel) -> None:
    """Give the model the weights that every contestant starts from."""
    config = model.config
    sizes = (config.num_layers, 2, config.num_attention_heads, config.head_size)

    def fill_prefix(table: Tensor) -> None:
        for layer_id, own in enumerate(model.get_mixin("prefix").prefix):
            own.copy_(table.unflatten(1, sizes)[:, layer_id].permute(1, 2, 0, 3))

    down = [parameter for name, parameter in model.named_parameters() if ".matrix_A." in name]
    draw(job, model.get_mixin("head").layers[0], down, fill_prefix, 2 * config.num_layers * config.hidden_size)


def sample(row: Row) -> dict[str, Tensor]:
    ids, label = row
    token_mask = torch.ones(len(ids), dtype=torch.bool)
    return {"input_ids": torch.tensor(ids), "token_mask": token_mask, "target_ids": torch.tensor(label)}


def train(baton: Baton, job: Job, unpads: bool) -> dict[str, Any]:
    """Train one model, and see what it has learned.

    Args:
        baton: of this process.
        job: what to train.
        unpads: whether padding is left out of the layers.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if job.threads:
        torch.set_num_threads(job.threads)
    L.seed_everything(job.seed, verbose=False)
    frame = Frame(get_tokenizer(job.model), MAX_LENGTH, truncate=True)
    sentences = Sentences(job, lambda text: frame([text])[0].tolist())
    collate = LabelCollate(multiple_of=MULTIPLE_OF)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "collate_fn": UnpadCollate(collate) if unpads else collate}
    task = SequenceClassificationTask(
        model=lambda: body(job.model),
        mixins=mixins(job.method),
        optim=OptimConfig(
            learning_rate=METHODS[job.method],
            weight_decay=WEIGHT_DECAY,
            betas=BETAS,
            epsilon=EPSILON,
            schedule="linear",
            minimum_ratio=0.0,
            warmup_steps=sentences.warmup_steps,
        ),
    )
    task.configure_model()
    start(job, task.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=job.device,
            devices=1,
            max_epochs=1,
            gradient_clip_val=CLIP,
            callbacks=[Holder(baton, sentences.tokens)],
            default_root_dir=folder,
            **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
        )
        trainer.fit(task, DataLoader([sample(row) for row in sentences.train], **options))
        values = facts(trainer.optimizers[0].param_groups, sentences, job.device)
        held_out = DataLoader([sample(row) for row in sentences.held_out], **options)
        found = trainer.validate(task, held_out, verbose=False)[0]
    return values | {"accuracy": found["val_accuracy"]}
