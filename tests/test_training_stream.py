"""Training on a stream: a run that is killed and resumed sees what the uninterrupted one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning.data import StreamOptions
from sat_lightning.errors import DataError
from sat_lightning.training import ExactResume
from sat_lightning.training.stream import StreamDataModule

ROOT = Path(__file__).parents[1]
SIZES = [7, 12, 5, 30]


def ids_of(samples: list[dict]) -> torch.Tensor:
    return torch.tensor([sample["id"] for sample in samples])


class Recorder(L.LightningModule):
    """Writes down the ids it is trained on, and dies when told to."""

    def __init__(self, file: Path, die_after: int | None) -> None:
        super().__init__()
        self.file, self.die_after = file, die_after
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated: list[int] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        with self.file.open("a") as file:
            file.write(json.dumps([step, batch.tolist()]) + "\n")
        if step == self.die_after:
            os.kill(os.getpid(), 9)
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.validated += batch.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(folder: Path, num_workers: int = 0) -> StreamDataModule:
    number = 0
    for shard, size in enumerate(SIZES):
        rows = [json.dumps({"id": number + one}) for one in range(size)]
        number += size
        (folder / f"{shard}.jsonl").write_text("\n".join(rows))
    settings = StreamOptions(shuffle_size=8, cache_dir=str(folder / "cache"))
    return StreamDataModule(f"{folder}/{{0..3}}.jsonl", None, ids_of, 4, num_workers, options=settings)


def fit(
    folder: Path,
    file: Path,
    num_workers: int,
    die_after: int | None = None,
    checkpoint: str | None = None,
    max_steps: int = 25,
) -> None:
    saving = L.pytorch.callbacks.ModelCheckpoint(
        folder / "saved", save_last=True, every_n_train_steps=3, save_on_train_epoch_end=False
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        limit_train_batches=10,
        accelerator="cpu",
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(file, die_after), data(folder, num_workers), ckpt_path=checkpoint)


def run(folder: Path, file: Path, num_workers: int, die_after: int | None = None, checkpoint: str | None = None) -> int:
    code = (
        "import sys; from pathlib import Path; from tests.test_training_stream import fit\n"
        f"fit(Path({str(folder)!r}), Path({str(file)!r}), {num_workers}, {die_after}, {checkpoint!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=ROOT).returncode


def read(file: Path) -> list[tuple[int, list[int]]]:
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_goes_on_with_the_very_next_batch(tmp_path: Path, num_workers: int) -> None:
    fit(tmp_path, tmp_path / "whole.txt", num_workers)
    whole = read(tmp_path / "whole.txt")
    assert [step for step, _ in whole] == list(range(1, 26))
    first_epoch = sorted([one for _, batch in whole for one in batch][: sum(SIZES)])
    assert num_workers or first_epoch == list(range(sum(SIZES)))
    for stop in (4, 13):  # within an epoch of the trainer, and in the next
        for file in (tmp_path / "saved").iterdir():
            file.unlink()
        fit(tmp_path, tmp_path / f"{stop}.txt", num_workers, max_steps=stop)
        fit(tmp_path, tmp_path / f"{stop}.txt", num_workers, checkpoint=str(tmp_path / "saved" / "last.ckpt"))
        done = read(tmp_path / f"{stop}.txt")
        assert len(done) > 25 and done[:stop] == whole[:stop] and done[stop:] == whole[25 - (len(done) - stop) :]


class Schedules(Recorder):
    """As tasks with a learning rate schedule do, it asks for the number of steps before counts are restored."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class SaveInWindow(L.Callback):
    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [5, 9, 10, 12, 14])
@pytest.mark.parametrize("exact", [False, True])
def test_a_window_that_was_begun_is_begun_anew(tmp_path: Path, at: int, exact: bool) -> None:
    saving = [SaveInWindow(at, tmp_path / "saved.ckpt")]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    seen = []
    for number, checkpoint in enumerate((None, tmp_path / "saved.ckpt")):
        trainer = L.Trainer(
            max_steps=8,
            limit_train_batches=10,
            accumulate_grad_batches=3,
            enable_checkpointing=False,
            callbacks=[*saving[: checkpoint is None], *([ExactResume()] if exact else [])],
            **quiet,
        )
        trainer.fit(Schedules(tmp_path / f"{number}.txt", None), data(tmp_path), ckpt_path=checkpoint)
        seen.append([batch for _, batch in read(tmp_path / f"{number}.txt")])
    # Windows of an epoch of ten end with its batches 3, 6, 9 and 10.
    last_end = max(end for end in (0, 3, 6, 9, 10, 13, 16) if end <= at)
    assert len(seen[0]) == 20 and seen[1] == seen[0][last_end:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_ends_ends_training(tmp_path: Path, num_workers: int) -> None:
    module = data(tmp_path, num_workers)
    module.options = StreamOptions(shuffle_size=8, num_epochs=1, cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, barebones=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Recorder(tmp_path / "seen.txt", None), module)
    assert sorted(one for _, batch in read(tmp_path / "seen.txt") for one in batch) == list(range(sum(SIZES)))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_run_goes_on_with_the_very_next_batch(tmp_path: Path, num_workers: int) -> None:
    fit(tmp_path, tmp_path / "whole.txt", num_workers)
    last = tmp_path / "saved" / "last.ckpt"
    last.unlink()
    for die_after in (5, 8, 17, None):  # within an epoch, again, and in the next
        checkpoint = str(last) if last.exists() else None
        code = run(tmp_path, tmp_path / "killed.txt", num_workers, die_after, checkpoint)
        assert code == (0 if die_after is None else -9)
    killed: dict[int, list[int]] = {}
    for step, batch in read(tmp_path / "killed.txt"):
        assert killed.setdefault(step, batch) == batch  # a step that was lost is done again with the same samples
    assert killed == dict(read(tmp_path / "whole.txt"))


def test_validation_sees_every_sample_once(tmp_path: Path) -> None:
    module = data(tmp_path)
    module.validation = module.shards
    recorder = Recorder(tmp_path / "seen.txt", None)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(recorder, module, verbose=False)
    assert recorder.validated == list(range(sum(SIZES)))


def test_what_a_stream_cannot_do(tmp_path: Path) -> None:
    module = data(tmp_path)
    assert isinstance(module.train_dataloader(), DataLoader) and module.val_dataloader() == []
    assert module.state_dict() == {"num_batches": 0, "batch_size": 4, "num_workers": 0, "num_ranks": 1}
    with pytest.raises(
        DataError, match=r"belongs to its ranks, workers and batch size, and num_ranks was 2 and is 1\. Res"
    ):
        module.load_state_dict({**module.state_dict(), "num_ranks": 2})
    module.options = StreamOptions(num_epochs=3)
    module.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(DataError, match="num_epochs is 3, and 2 ranks would not run out of samples at the same step"):
        module.train_dataloader()
    with pytest.raises(DataError, match="batch_size is 0"):
        StreamDataModule("x", batch_size=0)
