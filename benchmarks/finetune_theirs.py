"""Fine-tuning as users of transformers and PEFT do it: their model, their adapters, and their Trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from baton import Baton
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from sentiment import (
    ALPHA,
    BATCH_SIZE,
    BETAS,
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
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    BertModel,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

CONFIGS: dict[str, Any] = {
    "prefix": PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX_LENGTH),
    "lora": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "key", "value", "attention.output.dense"]),
}


class Classifier(nn.Module):
    """A linear on the mean of the tokens: what `MLPHeadMixin(config, 2, pooling="mean")` is."""

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden_states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden_states.dtype)
        logits = self.linear((hidden_states * weights).sum(1) / weights.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Holder(TrainerCallback):
    """Computes only with the baton in hand."""

    def __init__(self, baton: Baton, tokens: list[int]) -> None:
        self.baton, self.tokens = baton, tokens
        self.loss = torch.zeros(())

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.baton.start(self.tokens)

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.baton.step(self.loss)


class SentimentTrainer(Trainer):
    """Shows the loss of each step to the holder of the baton, and has the schedule of the others."""

    def __init__(self, holder: Holder, sentences: Sentences, **arguments: Any) -> None:
        super().__init__(callbacks=[holder], **arguments)
        self.holder, self.sentences = holder, sentences

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # Theirs begins with a step of rate 0.
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.sentences.rate)
        return self.lr_scheduler

    def training_step(self, *arguments: Any, **kwargs: Any) -> Tensor:
        self.holder.loss = super().training_step(*arguments, **kwargs)
        return self.holder.loss


def build(job: Job) -> Classifier:
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    body: Any = BertModel.from_pretrained(job.model, add_pooling_layer=False, **without_dropout)
    config = body.config
    if job.method != "full":
        body = get_peft_model(body, CONFIGS[job.method])
    model = Classifier(body, config.hidden_size)
    down = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
    width = 2 * config.num_hidden_layers * config.hidden_size
    draw(job, model.linear, down, lambda table: body.prompt_encoder.default.embedding.weight.copy_(table), width)
    return model


def sample(row: Row) -> dict[str, Any]:
    ids, label = row
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}


def train(baton: Baton, job: Job) -> dict[str, Any]:
    """Train one model, and see what it has learned.

    Args:
        baton: of this process.
        job: what to train.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    sentences = Sentences(job, lambda text: tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=job.device == "cpu",
            seed=job.seed,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=METHODS[job.method],
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPSILON,
            max_grad_norm=CLIP,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentimentTrainer(
            Holder(baton, sentences.tokens),
            sentences,
            model=build(job),
            args=settings,
            train_dataset=[sample(row) for row in sentences.train],
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=MULTIPLE_OF),
            compute_metrics=lambda found: {"accuracy": np.mean(found.predictions.argmax(-1) == found.label_ids)},
        )
        trainer.train()
        values = facts(trainer.optimizer.param_groups, sentences, job.device)
        held_out = trainer.evaluate([sample(row) for row in sentences.held_out])
    return values | {"accuracy": float(held_out["eval_accuracy"])}
