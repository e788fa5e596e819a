"""What the strategies are tried on; a family or a method of fine-tuning joins the matrix by a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, Sampler

from sat_lightning import AutoModel, BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.training import (
    ExactResume,
    LanguageModelingTask,
    OptimConfig,
    SATDeepSpeedStrategy,
    TrainableOnly,
    ZeroOptions,
)
from sat_lightning.training.initialise import init_from
from tests.training_examples import SIZES, ScaleMixin, counting_rows, make_model, make_task, make_trainer

NUM_STEPS, MIDDLE = 4, 2
GLOBAL_BATCH_SIZE = 4
#: An epoch of 7 batches: the window of 3 that ends it is cut short.
NUM_ROWS = 28
CLIP = 0.5

SINGLE = "auto"
STRATEGIES = ("ddp", "zero_0", "zero_1", "zero_2", "zero_3")
PRECISIONS = ("32-true", "bf16-mixed")
ACCUMULATIONS = (1, 3)


OPTIM = OptimConfig(learning_rate=1e-2)


def gpt2(**arguments: Any) -> LanguageModelingTask:
    return make_task(make_model, optim=OPTIM, **arguments)


def gpt2_with_mixins() -> LanguageModelingTask:
    mixins = {"first": ScaleMixin, "second": ScaleMixin}
    return gpt2(mixins=mixins, trainable=[r"^mixins\.(first|second)\."])


class EverythingMixin(BaseMixin):
    """Parameters that ZeRO-3 must find without calling their module: one a layer in a list, a tied table; a buffer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scales = torch.nn.ParameterList(torch.ones(config.hidden_size) for _ in range(config.num_layers))
        self.register_buffer("offset", torch.full((config.hidden_size,), 0.125))

    @non_conflict
    def mlp_forward(self, hidden_states, *, layer_id, old_impl, **kw):
        return old_impl(hidden_states, layer_id=layer_id, **kw) * self.scales[layer_id] + self.offset


class TiedModel(BaseModel):
    """A causal decoder whose head is its word embedding."""

    default_mask = "causal"


def tied_with_list() -> LanguageModelingTask:
    build = partial(TiedModel, TransformerConfig(**SIZES, is_rotary_emb=True))
    return make_task(build, mixins={"all": EverythingMixin}, frozen=[r"layers\.0\.mlp"], optim=OPTIM)


def pretrained() -> LanguageModelingTask:
    """Weights from a folder, into a model that ZeRO-3 splits while it is built."""
    folder = TemporaryDirectory()
    make_model().save_pretrained(folder.name)
    task = make_task(partial(AutoModel.from_pretrained, folder.name), optim=OPTIM)
    task.folder_of_test = folder
    return task


FAMILIES: dict[str, Callable[[], LanguageModelingTask]] = {
    "gpt2": gpt2,
    "gpt2_with_mixins": gpt2_with_mixins,
    "tied_with_list": tied_with_list,
    "pretrained": pretrained,
}


def finetune() -> LanguageModelingTask:
    """A third of the weights trains: enough that what a checkpoint holds beside them does not count."""
    build = partial(make_model, hidden_size=96, vocab_size=500)
    return make_task(
        build, mixins={"scale": ScaleMixin}, trainable=[r"^mixins\.scale\.", r"layers\.1\.mlp"], optim=OPTIM
    )


class Stranger(L.LightningModule):
    """Not ours: builds two layers that share a weight, and has neither a `model` nor a schedule."""

    def configure_model(self) -> None:
        if not hasattr(self, "embedding"):
            self.embedding, self.head = torch.nn.Embedding(17, 32), torch.nn.Linear(32, 17)
            self.head.weight = self.embedding.weight
            self.register_buffer("offset", torch.rand(32))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.head(self.embedding(batch["input_ids"]) + self.offset)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["target_ids"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


#: What is resumed and begun with in other tests, but is not in the matrix.
OTHERS: dict[str, Callable[[], Any]] = {"finetune": finetune, "stranger": Stranger}


@dataclass(frozen=True)
class Case:
    strategy: str
    precision: str = "32-true"
    accumulate: int = 1
    family: str = "gpt2"
    persistence_threshold: int = 0

    def __str__(self) -> str:
        return f"{self.strategy}-{self.precision}-x{self.accumulate}-{self.family}"

    def alone(self) -> Case:
        """The same in one process and in fp32: what every other case is held against."""
        return Case(SINGLE, "32-true", self.accumulate, self.family)


MATRIX = [Case(*values) for values in product(STRATEGIES, PRECISIONS, ACCUMULATIONS, FAMILIES)]


class Recorder(L.Callback):
    """Mean loss over the ranks of every batch, and checkpoints at the start, in the middle and at the end."""

    def __init__(self, folder: Path | None) -> None:
        self.losses: list[float] = []
        self.folder = folder

    def on_train_start(self, trainer, module) -> None:
        self.save(trainer, "start")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone().float())
        self.losses.append(float(loss))
        is_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.global_step == MIDDLE and is_boundary:
            self.save(trainer, "middle")

    def on_train_end(self, trainer, module) -> None:
        self.save(trainer, "end")

    def save(self, trainer: L.Trainer, when: str) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{when}.ckpt")


class NormLogger(DummyLogger):
    """Keeps the norms that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def log_metrics(self, metrics, *args, **kwargs) -> None:
        if "grad_norm" in metrics:
            self.norms.append(metrics["grad_norm"])


def share_of_rows(rank: int, num_ranks: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a rank, so that all ranks together see the batches that one process sees."""
    rows, share = counting_rows(NUM_ROWS), GLOBAL_BATCH_SIZE // num_ranks
    return [
        row
        for start in range(0, NUM_ROWS, GLOBAL_BATCH_SIZE)
        for row in rows[start + rank * share : start + (rank + 1) * share]
    ]


class ResumedSampler(Sampler[int]):
    """All rows in order; the first time, those after the ones a resumed run has seen (Lightning would begin anew)."""

    def __init__(self, num_rows: int, num_seen: int) -> None:
        self.num_rows, self.num_seen = num_rows, num_seen

    def __iter__(self) -> Iterator[int]:
        first, self.num_seen = self.num_seen, 0
        return iter(range(first, self.num_rows))

    def __len__(self) -> int:
        return self.num_rows


def make_loader(rank: int, num_ranks: int, num_seen: int = 0) -> DataLoader:
    rows, share = share_of_rows(rank, num_ranks), GLOBAL_BATCH_SIZE // num_ranks
    return DataLoader(rows, batch_size=share, sampler=ResumedSampler(len(rows), num_seen * share))


def make_strategy(case: Case) -> Any:
    """Without a threshold, as models of this size would not be split at all."""
    if not case.strategy.startswith("zero"):
        return case.strategy
    options = ZeroOptions(persistence_threshold=case.persistence_threshold)
    offloads = case.strategy.endswith("offload")
    arguments = {"offload_optimizer": offloads, "offload_parameters": offloads and case.strategy.startswith("zero_3")}
    return SATDeepSpeedStrategy(int(case.strategy[5]), **arguments, options=options, consolidates=True)


def make_case_trainer(case: Case, num_ranks: int, **arguments: Any) -> L.Trainer:
    return make_trainer(
        **{"max_steps": NUM_STEPS, "devices": num_ranks, "strategy": make_strategy(case), "precision": case.precision}
        | {
            "log_every_n_steps": 1,
            "accumulate_grad_batches": case.accumulate,
            "gradient_clip_val": CLIP,
            "use_distributed_sampler": False,
        }
        | arguments
    )


def run_case(
    case: Case,
    num_ranks: int,
    rank: int,
    folder: str | None = None,
    resume: str | None = None,
    *,
    seed: int = 0,
    reset: tuple[str, ...] = (),
    begin_with: str | None = None,
    trainable_only: bool = False,
) -> dict:
    """Train; with `folder` write checkpoints, with `resume` begin at one that lies in the middle."""
    L.seed_everything(seed, verbose=False)
    recorder = Recorder(None if folder is None else Path(folder))
    more: list[L.Callback] = [TrainableOnly()] if trainable_only else []
    more += [ExactResume(reset)] if reset else []
    module = {**FAMILIES, **OTHERS}[case.family]()
    if begin_with:
        init_from(module, begin_with)
    logger = NormLogger()
    loader = make_loader(rank, num_ranks, MIDDLE * case.accumulate if resume else 0)
    with TemporaryDirectory() as root:
        trainer = make_case_trainer(
            case, num_ranks, callbacks=[recorder, *more], logger=logger, default_root_dir=folder or root
        )
        trainer.fit(module, loader, ckpt_path=resume)
    return {"losses": recorder.losses, "norms": logger.norms, "global_step": trainer.global_step}


class Losses(L.Callback):
    """The loss of every batch, on this rank."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def learn(task: L.LightningModule, loader: DataLoader, strategy: str = SINGLE) -> list[float]:
    """Train for three steps, on two ranks where there is a strategy; both see every row, as one process does."""
    L.seed_everything(0, verbose=False)
    losses = Losses()
    with TemporaryDirectory() as root:
        trainer = make_trainer(
            max_steps=3,
            devices=1 if strategy == SINGLE else 2,
            strategy=make_strategy(Case(strategy)),
            use_distributed_sampler=False,
            callbacks=[losses],
            gradient_clip_val=1.0,
            default_root_dir=root,
        )
        trainer.fit(task, loader)
    return losses.values
