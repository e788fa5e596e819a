"""Runs that are killed and resumed: each a process of its own, forked, for the imports take longer than the runs.

`python -m tests.resume_runs '[{...}, ...]'` makes the runs one after the other, with the settings of `DEFAULTS`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sat_lightning.errors import CheckpointError
from sat_lightning.training import EMA, ExactResume, SATDataModule, SkipNonFinite, find_resume_checkpoint
from sat_lightning.training import checkpoints as checkpoints_module
from sat_lightning.training.metrics_file import continue_files
from tests.training_examples import counting_rows, make_model, make_task

DEFAULTS: dict[str, Any] = {
    "folder": "run",
    "num_rows": 40,
    "batch_size": 4,
    "num_workers": 0,
    "ranks": 1,
    "strategy": None,
    "precision": "32-true",
    "max_steps": 14,
    "max_epochs": -1,
    "accumulate": 1,
    "validate_every": None,
    "saver": {"every_n_train_steps": 2},
    "log_every": 1,
    "resume": True,
    "reset": [],
    "kill_at": None,  # the number of a batch, in whose training step the process kills itself
    "kill_writing": None,  # the number of a checkpoint, in whose middle the process kills itself
    "signal_at": None,  # [signal, "train" or "val", number of the batch]; rank 1 alone receives it, if there is one
    "environment": {},
    "ema": False,
    "guard": False,
    "plain": False,  # a stranger's module and data instead of ours
}


class Noise(L.Callback):
    """Draws from every generator in every batch, and in validation, so that a lost state shows in the weights."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        shift = 1e-3 * (random.random() + float(np.random.rand()) + float(torch.rand(())))
        gradient = next(pl_module.parameters()).grad
        if gradient is not None:  # ZeRO keeps gradients elsewhere
            gradient.add_(shift)

    def on_validation_batch_start(self, *_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(3)


class Interruptions(L.Callback):
    """Kills or signals this process where the settings say."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if number == self.settings["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self._signal(trainer, "train", number)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int) -> None:
        self._signal(trainer, "val", 100 * trainer.fit_loop.epoch_loop.batch_progress.total.ready + idx)

    def _signal(self, trainer: L.Trainer, where: str, number: int) -> None:
        if self.settings["signal_at"] and self.settings["signal_at"][1:] == [where, number]:
            if trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getpid(), self.settings["signal_at"][0])


class Result(L.Callback):
    """Writes what the run came to, in the process that made it."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_result(trainer, pl_module, self.run)


class StrangersModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layers(batch).square().mean()
        self.log("train_loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layers(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class StrangersData(L.LightningDataModule):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def _loader(self, shuffle: bool) -> torch.utils.data.DataLoader:
        rows = torch.linspace(-1, 1, 4 * self.settings["num_rows"]).view(-1, 4)
        return torch.utils.data.DataLoader(
            rows,
            batch_size=self.settings["batch_size"],
            shuffle=shuffle,
            num_workers=self.settings["num_workers"],
            persistent_workers=self.settings["num_workers"] > 0,
        )

    def train_dataloader(self) -> Any:
        return self._loader(True)

    def val_dataloader(self) -> Any:
        return self._loader(False)


def make_parts(settings: dict[str, Any]) -> tuple[L.LightningModule, L.LightningDataModule, list[L.Callback]]:
    own = [ExactResume(settings["reset"])] if settings["plain"] or settings["reset"] else []
    if settings["plain"]:
        return StrangersModule(), StrangersData(settings), own
    task = make_task(lambda: make_model(attention_dropout=0.2, hidden_dropout=0.2))
    data = SATDataModule(
        [{"dataset": Rows(settings["num_rows"])}],
        batch_size=settings["batch_size"],
        num_workers=settings["num_workers"],
        validation=0.0,
    )
    data.val_dataloader = lambda: torch.utils.data.DataLoader(  # type: ignore[method-assign]
        counting_rows(8), batch_size=2, num_workers=settings["num_workers"],
        persistent_workers=settings["num_workers"] > 0,
    )  # fmt: skip
    data.bytes_per_token = lambda *_: None  # type: ignore[method-assign]
    return task, data, own


class Rows(torch.utils.data.Dataset):
    def __init__(self, num_rows: int) -> None:
        self.rows, self.name = counting_rows(num_rows), "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def train(settings: dict[str, Any]) -> None:
    os.environ.update(settings["environment"])
    if settings["kill_writing"] is not None:
        break_writing(settings["kill_writing"])
    run = Path(settings["folder"])
    run.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(run.parent)
    module, data, callbacks = make_parts(settings)
    if settings["guard"]:
        callbacks.append(SkipNonFinite())
    if settings["ema"]:
        callbacks.append(EMA(decay=0.9))
    if not settings["saver"].get("none"):
        callbacks.append(ModelCheckpoint(dirpath=run / "checkpoints", **settings["saver"]))
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=settings["ranks"], precision=settings["precision"],
        strategy=settings["strategy"] or ("ddp_fork" if settings["ranks"] > 1 else "auto"),
        max_steps=settings["max_steps"], max_epochs=settings["max_epochs"], gradient_clip_val=1.0,
        accumulate_grad_batches=settings["accumulate"], log_every_n_steps=settings["log_every"],
        val_check_interval=settings["validate_every"], enable_progress_bar=False, enable_model_summary=False,
        check_val_every_n_epoch=1 if settings["validate_every"] in (None, 1.0) else None,
        limit_val_batches=0 if settings["validate_every"] is None else 1.0,
        logger=CSVLogger(run.parent, name="", version=run.name),
        callbacks=[Noise(), Interruptions(settings), Result(run), *callbacks],
    )  # fmt: skip
    path = None
    if settings["resume"] and run.is_dir():
        try:
            path = find_resume_checkpoint(run)
        except CheckpointError as error:
            assert "no complete checkpoint" in str(error) or "is no run" in str(error), error
        if path is not None:
            continue_files(trainer)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)


def write_result(trainer: L.Trainer, module: L.LightningModule, run: Path) -> None:
    result: dict[str, Any] = {"weights": {name: value.clone() for name, value in module.state_dict().items()}}
    if not (settings_of := str(trainer.strategy.__class__.__name__)).endswith("DeepSpeedStrategy"):
        result["optimizer"] = trainer.optimizers[0].state_dict()["state"]
    result["strategy"] = settings_of
    result["schedule"] = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    result["draws"] = [torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]
    result["counts"] = [trainer.global_step, trainer.current_epoch]
    result["callbacks"] = {
        c.state_key: {
            k: v for k, v in c.state_dict().items() if "path" not in k and "models" not in k and k != "dirpath"
        }
        for c in trainer.callbacks
    }
    averages = [c.ema_state_dict(trainer) for c in trainer.callbacks if isinstance(c, EMA)]
    result["ema"] = averages
    result["files"] = sorted(path.name for path in (run / "checkpoints").glob("*"))
    result["metrics"] = (run / "metrics.csv").read_text()
    torch.save(result, run / "result.pt")


def break_writing(number: int) -> None:
    """Let the process die when half of a checkpoint is on the disk."""
    whole_save, count = torch.save, 0

    def save(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        whole_save(content, file)
        if count == number:
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            os.fsync(file.fileno())
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints_module.torch = type("Torch", (), {"save": staticmethod(save), "load": staticmethod(torch.load)})


def main() -> None:

    codes = []
    for settings in json.loads(sys.argv[1]):
        if not (child := os.fork()):
            run = Path(settings["folder"])
            run.parent.mkdir(parents=True, exist_ok=True)
            said = os.open(f"{run}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1), os.dup2(said, 2)
            try:
                train({**DEFAULTS, **settings})
            except SystemExit as stop:
                os._exit(stop.code if isinstance(stop.code, int) else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write("\n" + json.dumps(codes))


if __name__ == "__main__":
    main()
