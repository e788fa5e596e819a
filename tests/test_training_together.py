"""A disk that is full for rank 0: all ranks hear of it at once, and the earlier checkpoint stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import launch

WORKER = """
import errno, json, os, sys
from datetime import timedelta
from functools import partial
from pathlib import Path
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from sat_lightning.errors import CheckpointError
from sat_lightning.training import SATDeepSpeedStrategy, checkpoints, zero_checkpoint
from tests.training_examples import counting_loader, make_task, make_trainer

rank, folder = int(os.environ.get("LOCAL_RANK", 0)), Path(sys.argv[1])
# A rank that waits for another one gives up after this, long after the others have told what they heard.
PATIENCE = timedelta(minutes=20)
is_full = False


def fill(commit):
    def checked(partial, target):
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(partial, target)
    return checked


checkpoints.commit, zero_checkpoint.commit = fill(checkpoints.commit), fill(zero_checkpoint.commit)


class FullDisk(L.Callback):
    # At the third step rank 0 can write neither what was logged nor the checkpoint.
    def on_train_batch_start(self, trainer, *_):
        global is_full
        is_full = trainer.is_global_zero and trainer.global_step >= 2
        if is_full:
            trainer.logger.save = partial(no_room, trainer.logger)


def no_room(logger):
    del logger.save
    raise OSError(errno.ENOSPC, "No space left on device")


def run(name, strategy, resume=None, callbacks=()):
    saver = ModelCheckpoint(folder / name, every_n_train_steps=1, filename="{step}")
    trainer = make_trainer(
        4, devices=2, strategy=strategy, callbacks=[saver, *callbacks], enable_checkpointing=True,
        default_root_dir=folder, logger=CSVLogger(folder, name="logs", version=name), log_every_n_steps=100,
    )
    trainer.fit(make_task(), counting_loader(), ckpt_path=resume)
    return trainer.global_step


found = {}
for name, make in (("ddp", DDPStrategy), ("zero", lambda **of: SATDeepSpeedStrategy(2, **of))):
    try:
        run(name, make(timeout=PATIENCE), callbacks=[FullDisk()])
        said = ""
    except CheckpointError as error:
        said = str(error)
    is_full = False
    # Rank 0 has tidied up by the time it says so, which others may hear earlier.
    kept = sorted(path.name for path in (folder / name).iterdir() if rank == 0 or not path.name.startswith("."))
    end = run(name, make(timeout=PATIENCE), resume=folder / name / "step=2.ckpt")
    found[name] = {"said": said, "kept": kept, "end": end}
(folder / f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("full")
    (folder / "worker.py").write_text(WORKER)
    launch(str(folder / "worker.py"), str(folder), timeout=600)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", ["ddp", "zero"])
def test_all_ranks_hear_of_a_full_disk(ranks: list[dict[str, Any]], name: str) -> None:
    for rank, found in enumerate(ranks):
        said = found[name]["said"]
        assert "step=3.ckpt" in said and "could not be written" in said and "No space left on device" in said, rank
        assert found[name]["kept"] == ["step=2.ckpt"] and found[name]["end"] == 4
    if name == "ddp":
        assert ranks[1][name]["said"].startswith("Rank 0 has not saved the checkpoint: ")
        assert "step=2.ckpt stays. Make room" in ranks[0][name]["said"]
