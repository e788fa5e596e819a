"""One tiny example of every task, for whatever tasks must bear: strategies, compilers, pictures.

Import `TASKS`; add a row, and every matrix of tasks tests it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sat_lightning import mixins, models
from sat_lightning.data import LabelCollate, PadCollate, PairCollate, ShardedOrder
from sat_lightning.data.mixed import MixedRows
from sat_lightning.mixins import MLPHeadMixin, NoMixin
from sat_lightning.model import AnyModel
from sat_lightning.models import DistillModel
from sat_lightning.training import (
    DistillationTask,
    ImageClassificationTask,
    MaskedLanguageModelingTask,
    MultipleChoiceTask,
    OptimConfig,
    SATLightningModule,
    SequenceClassificationTask,
    SequenceToSequenceTask,
    TokenClassificationTask,
)
from tests.zero_cases import GLOBAL_BATCH_SIZE, ResumedSampler

SIZES = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 40, "max_sequence_length": 24,
    "init_method_std": 0.2,
}  # fmt: skip
NUM_TRAINED, NUM_VALIDATED = 16, 7
#: Large enough that four steps change what is predicted.
OPTIM = OptimConfig(learning_rate=5e-2)
Row = dict[str, Tensor]


def build(class_name: str, options: Mapping[str, Any] = {}, **changes: Any) -> AnyModel:  # noqa: B006
    model_class = getattr(models, class_name)
    return model_class(model_class.config_class(**{**SIZES, **options, **changes}))


def build_pair(**changes: Any) -> DistillModel:
    """A teacher and a student of two families."""
    return DistillModel(build("GPT2Model", **changes), build("LLaMAModel", **{"num_layers": 1, **changes}))


@dataclass(frozen=True)
class Example:
    """A row of the table."""

    kind: type[SATLightningModule]
    build: Callable[..., AnyModel]
    row: Callable[[Tensor, bool], Row]
    """Ids, and whether every row is to have as many targets -> a sample."""
    mixins: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    collate: Callable[[], Any] = LabelCollate
    is_random: bool = False
    """Whether batches are changed at random in training: ranks then draw what one process draws for the same rows."""

    def make(self, changes: Mapping[str, Any] = {}, **arguments: Any) -> SATLightningModule:  # noqa: B006
        """Build the task; `changes` are the model's options."""
        model = partial(self.build, **changes)
        return self.kind(model, mixins=dict(self.mixins), **{"optim": OPTIM, **self.settings, **arguments})

    def rows(self, num_rows: int, seed: int, is_even: bool) -> list[Row]:
        """Rows of 5 to 9 tokens."""
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randint(5, 40, (5 + 3 * index % 5,), generator=generator) for index in range(num_rows)]
        return [self.row(ids, is_even) for ids in texts]

    def train_loader(self, rank: int = 0, num_ranks: int = 1, num_seen: int = 0) -> DataLoader:
        """Batches of 4 rows over all ranks, after those of a resumed run; each rank has all of them if `is_random`."""
        rows = self.rows(NUM_TRAINED, 0, is_even=True)
        return self.load(rows, *((0, 1) if self.is_random else (rank, num_ranks)), num_seen)

    def val_loader(self, rank: int = 0, num_ranks: int = 1) -> DataLoader:
        """Every row once, of uneven numbers of targets; the last rank has padding in the place of one."""
        return self.load(self.rows(NUM_VALIDATED, 1, is_even=False), rank, num_ranks)

    def load(self, rows: list[Row], rank: int = 0, num_ranks: int = 1, num_seen: int = 0) -> DataLoader:
        """Batches of rows, dealt to the ranks as `SATDataModule` deals them."""
        order = ShardedOrder(len(rows), num_replicas=num_ranks, rank=rank)
        own: Any = MixedRows([rows]).__getitems__(list(order))
        share = GLOBAL_BATCH_SIZE // num_ranks
        sampler = ResumedSampler(len(own), num_seen * share)
        return DataLoader(own, batch_size=share, sampler=sampler, collate_fn=self.collate())


def _text(ids: Tensor, is_even: bool) -> Row:
    return {"input_ids": ids, "token_mask": torch.ones(len(ids), dtype=torch.bool), "target_ids": ids[0] % 2}


def _words(ids: Tensor, is_even: bool) -> Row:
    counts = torch.arange(len(ids)) < (4 if is_even else len(ids) - 1)
    return _text(ids, is_even) | {"target_ids": torch.where(counts, ids % 3, -100)}


def _choices(ids: Tensor, is_even: bool) -> Row:
    choices = torch.stack([ids, ids.flip(0), ids.roll(1)])
    mask = torch.ones_like(choices, dtype=torch.bool)
    return {"input_ids": choices, "token_mask": mask, "target_ids": ids[0] % 3}


def _image(ids: Tensor, is_even: bool) -> Row:
    pixels = torch.linspace(-1, 1, 8 * 8).roll(int(ids[0])).view(1, 8, 8)
    return {"image": pixels * ids[1] / 40, "target_ids": ids[0] % 3}


def _masked(ids: Tensor, is_even: bool) -> Row:
    return {"input_ids": ids, "target_ids": ids}


def _pair(ids: Tensor, is_even: bool) -> Row:
    target = ids[:4] if is_even else torch.cat([ids[: len(ids) // 2], torch.tensor([1])])
    return {"input_ids": ids, "target_ids": target}


def _causal(ids: Tensor, is_even: bool) -> Row:
    ids = ids[:5] if is_even else ids
    return {"input_ids": ids[:-1], "target_ids": ids[1:]}


def _head(*sizes: int, pooling: str | None = "mean") -> dict[str, Any]:
    """The head of a task in the place of BERT's."""
    return {"bert-final": NoMixin, "head": partial(MLPHeadMixin, sizes=sizes, pooling=pooling, init_std=0.5)}


IMAGE = {"vocab_size": 1, "image_size": [8, 8], "patch_size": 4, "in_channels": 1, "num_classes": 3}
LORA = partial(mixins.LoraMixin, rank=2)

TASKS: dict[str, Example] = {
    "text": Example(SequenceClassificationTask, partial(build, "BertModel"), _text, {"lora": LORA} | _head(2)),
    "words": Example(
        TokenClassificationTask,
        partial(build, "BertModel"),
        _words,
        {"prefix": partial(mixins.PrefixTuningMixin, prefix_len=3), "lora": LORA} | _head(3, pooling=None),
    ),
    "choices": Example(MultipleChoiceTask, partial(build, "RobertaModel"), _choices, {
        "bert-final": NoMixin,
        "adapter": partial(mixins.AdapterMixin, adapter_hidden=4),
        "head": partial(MLPHeadMixin, sizes=[1], pooling="first"),
    }),
    "image": Example(ImageClassificationTask, partial(build, "ViTModel", IMAGE), _image, {"ia3": mixins.IA3Mixin}),
    "masked": Example(
        MaskedLanguageModelingTask,
        partial(build, "BertModel"),
        _masked,
        settings={"mask_token_id": 4, "mask_prob": 0.4},
        collate=partial(PadCollate, attention_mask="padding"),
        is_random=True,
    ),
    "pairs": Example(
        SequenceToSequenceTask,
        partial(build, "T5Model", {"relative_attention_num_buckets": 8}),
        _pair,
        {"encoder.lora": LORA, "decoder.lora": LORA, "decoder.ia3": mixins.IA3Mixin},
        {"trainable": [r"mixins\.(lora|ia3)\.", "word_embeddings"]},
        collate=PairCollate,
    ),
    "distillation": Example(
        DistillationTask, build_pair, _causal, {"student.lora": LORA}, {"temperature": 2.0}, PadCollate
    ),
}  # fmt: skip
