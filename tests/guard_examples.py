"""A stranger's pipeline that knows nothing of this package, fed with batches some of which are bad."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sat_lightning.training import LanguageModelingTask, OptimConfig
from tests.training_examples import make_model, make_trainer


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN where its input is marked."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mark,) = ctx.saved_tensors
        return torch.where(mark.bool(), float("nan"), gradient), None


class Stranger(L.LightningModule):
    """Dropout, BatchNorm, a momentum, a schedule, its own logs: everything that a bad batch can spoil."""

    def __init__(self, returns_dict: bool = False, frequency: int = 1, has_spare: bool = False) -> None:
        super().__init__()
        self.returns_dict, self.frequency = returns_dict, frequency
        torch.manual_seed(5)
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 2)
        if has_spare:
            self.spare = nn.Linear(2, 2)  # of no use to the loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        hidden = self.drop(self.norm(self.first(batch["x"])))
        loss = self.last(Poison.apply(hidden, batch["mark"])).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "score": batch["score"].mean()} if self.returns_dict else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": self.frequency}]


def make_guarded_task(kind: type[LanguageModelingTask] | None = None) -> LanguageModelingTask:
    # A schedule that ends with the run would know how many batches there are.
    return (kind or GuardedTask)(make_model, optim=OptimConfig(schedule="constant", learning_rate=0.01))


class GuardedTask(LanguageModelingTask):
    """Ours, with a metric, and marks in the batch that spoil it."""

    def forward_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {name: value for name, value in batch.items() if name in ("input_ids", "target_ids")}
        loss = super().forward_step(inputs) + batch["x"].sum() * 0
        return Poison.apply(loss, batch["mark"].max()), {"score": batch["score"].mean()}


def make_batches(num_batches: int, bad: tuple[int, ...] = (), what: str = "loss", rank: int = 0) -> list[Any]:
    """Batches of which some are bad: in their `loss`, `metric` or `gradient`."""
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for number in range(num_batches):
        x = torch.randn(6, 4, generator=generator)
        ids = torch.randint(0, 17, (6, 9), generator=generator)
        is_bad = float(number in bad)
        batch = {"x": x, "mark": torch.zeros(6, 1), "score": torch.zeros(6)}
        if is_bad and what == "loss":
            x[3, 2] = float("nan")
        batch["mark"] += is_bad * (what == "gradient")
        batch["score"] += torch.tensor(float("inf") if is_bad and what == "metric" else 1.0)
        batches.append({**batch, "input_ids": ids[:, :-1], "target_ids": ids[:, 1:]})
    return batches


def fit(module: L.LightningModule, batches: list[Any], folder: Any, **arguments: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    trainer = make_trainer(**{"max_steps": -1, "max_epochs": 1, "default_root_dir": folder, **arguments})
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


class StateAtEnd(L.Callback):
    """Keeps everything that a left-out batch must not change, of this rank, as a flat dictionary."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = state_of(trainer)


def state_of(trainer: L.Trainer) -> dict[str, Any]:
    module, engine = trainer.lightning_module, trainer.strategy.model
    state: dict[str, Any] = {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in module.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    optimizer = getattr(engine, "basic_optimizer", trainer.optimizers[0])
    for number, entries in enumerate(optimizer.state.values()):
        state |= {f"optimizer.{number}.{name}": value for name, value in entries.items()}
    state["lr"] = optimizer.param_groups[0]["lr"]
    state["schedule"] = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
    state["scaler"] = trainer.precision_plugin.state_dict()
    owner = getattr(engine, "optimizer", None)
    scaler = getattr(owner, "loss_scaler", None) or getattr(owner, "loss_scale_config", None)
    # Without fp16 it counts iterations and scales nothing.
    is_scaling = getattr(scaler, "dynamic_loss_scale", False) or getattr(scaler, "dynamic", False)
    values = vars(scaler).items() if is_scaling else ()
    state["scaler of DeepSpeed"] = {name: value for name, value in values if isinstance(value, int | float)}
    state["loss_scale"] = state["scaler"].get("scale") or state["scaler of DeepSpeed"].get("cur_scale")
    state["global_step"] = trainer.global_step
    state["logged_step"] = trainer.fit_loop.epoch_loop._batches_that_stepped
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
    state["steps"] = (progress.step.total.ready, progress.step.total.completed, progress.step.current.completed)
    state["random"] = torch.get_rng_state()
    return state


def differing(state: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert state.keys() == other.keys()

    def equal(left: Any, right: Any) -> bool:
        return torch.equal(left, right) if isinstance(left, Tensor) else left == right

    return [name for name in state if not equal(state[name], other[name])]
