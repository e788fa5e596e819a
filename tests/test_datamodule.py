"""`SATDataModule` in a real Trainer: every row once, on one process and on two, and errors before the first step."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from sat_lightning.data.batches import ShardedBatches
from sat_lightning.data.entries import WeightedPath
from sat_lightning.data.order import ShardedOrder
from sat_lightning.errors import DataError
from sat_lightning.training.datamodule import DataOptions, SATDataModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Recorder(L.LightningModule):
    """A module that trains next to nothing and remembers the targets it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}

    def remember(self, split: str, batch: dict[str, Tensor]) -> Tensor:
        assert batch["input_ids"].shape == batch["target_ids"].shape
        self.seen[split].append(batch["target_ids"].flatten().tolist())
        return self.weight * 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.remember("train", batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.remember("validation", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.remember("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["target_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def positions(folder: Path, num_tokens: int) -> str:
    """A token file of which every token is its own position, so that batches show where they were taken."""
    np.arange(num_tokens, dtype=np.uint32).tofile(folder / f"{num_tokens}.bin")
    return str(folder / f"{num_tokens}.bin")


def module_of(path: str, **settings: Any) -> SATDataModule:
    options = DataOptions(token_dtype="uint32", **settings.pop("options", {}))
    return SATDataModule(path, **{"sequence_length": 10, "batch_size": 4, **settings}, options=options)


def flatten(batches: list[list[int]]) -> list[int]:
    return [target for batch in batches for target in batch if target != -100]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fit_shows_every_row_once_an_epoch_in_a_new_order(tmp_path: Path, num_workers: int) -> None:
    data = module_of(positions(tmp_path, 2001), num_workers=num_workers, validation=positions(tmp_path, 36))
    module = Recorder()
    L.Trainer(max_epochs=2, num_sanity_val_steps=1, **QUIET).fit(module, datamodule=data)
    epochs = [flatten(module.seen["train"][:50]), flatten(module.seen["train"][50:])]
    assert len(module.seen["train"]) == 100
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 2001))
    assert epochs[0] != epochs[1]
    # 35 targets: one sanity batch, then one batch of 4 rows in each epoch, the last row filled up.
    assert len(module.seen["validation"]) == 3
    assert all(flatten([batch]) == list(range(1, 36)) for batch in module.seen["validation"])


def test_the_order_follows_the_seed_and_the_split_does_not(tmp_path: Path) -> None:
    path = positions(tmp_path, 2000)

    def seen(seed: int, split_seed: int = 0) -> tuple[list[int], list[int]]:
        module = Recorder()
        data = module_of(path, options={"seed": seed, "split_seed": split_seed})
        L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(module, datamodule=data)
        return flatten(module.seen["train"]), flatten(module.seen["validation"])

    assert seen(1) == seen(1)
    assert seen(1)[0] != seen(2)[0] and seen(1)[1] == seen(2)[1]
    assert seen(1)[1] != seen(1, split_seed=1)[1]
    train, validation = seen(1)
    assert set(train).isdisjoint(validation) and len(validation) == 99


def test_test_and_predict_lose_and_repeat_nothing(tmp_path: Path) -> None:
    data = module_of(positions(tmp_path, 500), validation=0.0, test=positions(tmp_path, 96))
    trainer, module = L.Trainer(**QUIET), Recorder()
    trainer.test(module, datamodule=data, verbose=False)
    assert flatten(module.seen["test"]) == list(range(1, 96))
    predicted = trainer.predict(module, datamodule=data)
    assert flatten([batch.flatten().tolist() for batch in predicted]) == list(range(1, 96))


def test_no_validation_fits_and_says_what_is_missing(tmp_path: Path) -> None:
    data, module = module_of(positions(tmp_path, 500), validation=0.0), Recorder()
    L.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    assert len(module.seen["train"]) == 13 and module.seen["validation"] == []
    with pytest.raises(DataError, match=r"there is no test split, only train\. Set data\.test to a fraction of"):
        data.test_dataloader()


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_lightning_flags_work(tmp_path: Path) -> None:
    data, module = module_of(positions(tmp_path, 2000)), Recorder()
    L.Trainer(overfit_batches=2, max_epochs=2, num_sanity_val_steps=0, **QUIET).fit(module, datamodule=data)
    assert module.seen["train"][:2] == module.seen["train"][2:]
    module = Recorder()
    flags = {"limit_train_batches": 3, "val_check_interval": 1, "reload_dataloaders_every_n_epochs": 1}
    L.Trainer(max_epochs=2, limit_val_batches=1, num_sanity_val_steps=0, **flags, **QUIET).fit(module, datamodule=data)
    assert len(module.seen["train"]) == 6 and module.seen["train"][:3] != module.seen["train"][3:]
    assert len(module.seen["validation"]) == 6 and len({tuple(batch) for batch in module.seen["validation"]}) == 1
    L.Trainer(fast_dev_run=True, **QUIET).fit(Recorder(), datamodule=data)


DISTRIBUTED = """
import json, sys
import lightning as L
sys.path.insert(0, sys.argv[1])
from test_datamodule import QUIET, Recorder, module_of

if __name__ == "__main__":
    data, module = module_of(sys.argv[2], validation=sys.argv[3], batch_size=3), Recorder()
    trainer = L.Trainer(devices=2, strategy="ddp", max_epochs=2, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, datamodule=data)
    samplers = [type(loader.sampler).__name__ for loader in (trainer.train_dataloader, trainer.val_dataloaders)]
    with open(f"{sys.argv[4]}/rank{trainer.global_rank}.json", "w") as file:
        json.dump({"samplers": samplers, **module.seen}, file)
"""


@pytest.mark.timeout(700)
def test_two_processes_share_every_row_once(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    paths = [positions(tmp_path, 1211), positions(tmp_path, 86)]
    command = [sys.executable, str(script), str(Path(__file__).parent), *paths, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    # 121 rows in global batches of 6: 20 steps an epoch, the last of 7 rows, for one row is too few for two ranks.
    assert [rank["samplers"] for rank in ranks] == [["ShardedBatches", "ShardedOrder"]] * 2
    assert [len(rank["train"]) for rank in ranks] == [40, 40]
    for epoch in (slice(0, 20), slice(20, 40)):
        targets = [target for rank in ranks for target in flatten(rank["train"][epoch])]
        assert sorted(targets) == list(range(1, 1211))
    # 85 targets are 9 rows: 5 for one rank, 4 and a padding row for the other, two batches each, each epoch.
    assert [len(rank["validation"]) for rank in ranks] == [4, 4]
    for epoch in (slice(0, 2), slice(2, 4)):
        assert sorted(t for rank in ranks for t in flatten(rank["validation"][epoch])) == list(range(1, 86))


def test_ranks_that_get_no_row_get_a_row_without_targets(tmp_path: Path) -> None:
    data = module_of(positions(tmp_path, 500), validation=positions(tmp_path, 25))  # 3 rows
    rows = data.rows("validation")
    shares = [list(ShardedOrder(3, num_replicas=2, rank=rank)) for rank in range(2)]
    batches = [rows.batch(share) for share in shares]
    assert [batch["target_ids"].shape for batch in batches] == [(2, 10)] * 2
    assert (batches[1]["target_ids"][1] == -100).all()
    assert sorted(flatten([batch["target_ids"].flatten().tolist() for batch in batches])) == list(range(1, 25))


def test_command_line_settings() -> None:
    def parse(*arguments: str) -> SATDataModule:
        class_path = f"--data={SATDataModule.__module__}.SATDataModule"
        settings = {"subclass_mode_data": True, "save_config_callback": None, "trainer_defaults": QUIET, "run": False}
        settings["seed_everything_default"] = False
        return LightningCLI(Recorder, L.LightningDataModule, args=[class_path, *arguments], **settings).datamodule

    data = parse("--data.path=x.txt", "--data.batch_size=3", "--data.options.cache_dir=here", "--data.validation=0.1")
    assert (data.path, data.batch_size, data.sequence_length, data.validation) == ("x.txt", 3, 256, 0.1)
    assert data.options == DataOptions(cache_dir="here")
    data = parse("--data.path=[{path: a.txt, weight: 0.5}, {path: [b.txt, c.txt], name: b}, d.txt]")
    expected = [
        WeightedPath("a.txt", "a", weight=0.5),
        WeightedPath(["b.txt", "c.txt"], "b"),
        WeightedPath("d.txt", "d"),
    ]
    assert data.sources == expected
    data = parse("--data.path=x", "--data.validation={one: 1.txt, two: 2.txt}", "--data.options.stop=all_exhausted")
    assert (data.validation, data.options.stop) == ({"one": "1.txt", "two": "2.txt"}, "all_exhausted")
    data = parse('--data.path=["a.txt", "b.txt"]', "--data.validation=valid.txt", "--data.sequence_length=64")
    assert (data.path, data.validation, data.sequence_length) == (["a.txt", "b.txt"], "valid.txt", 64)
    assert data.options == DataOptions()


def test_it_says_what_a_model_needs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": "é" * 49}) + "\n" for _ in range(100)))
    data = SATDataModule(str(tmp_path / "a.jsonl"), sequence_length=32, options=DataOptions(text_field="body"))
    assert (data.vocab_size, data.max_token_id, data.text_tokenizer.vocab_size) == (257, 256, 257)
    assert data.num_train_tokens == len(data.rows("train")) * 32
    assert data.num_train_tokens == pytest.approx(9900 * 0.95, rel=0.01)
    assert data.bytes_per_token("train") == data.bytes_per_token("validation") == 98 / 99
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "é" * 49: 4}))
    tokenizer.save(str(tmp_path / "words.json"))
    words = SATDataModule(data.path, 8, tokenizer=str(tmp_path / "words.json"), options=data.options)
    assert (words.vocab_size, words.max_token_id, words.bytes_per_token()) == (5, 4, 98 / 2)
    tokens = module_of(positions(tmp_path, 500))
    assert (tokens.vocab_size, tokens.max_token_id, tokens.bytes_per_token("train")) == (500, 499, None)


def test_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    data = SATDataModule(str(tmp_path / "a.txt"), sequence_length=32)
    data.check_model(vocab_size=257, max_sequence_length=32)
    message = (
        rf"token id 256 is outside the model's vocabulary of 256 \(path '{tmp_path}/a\.txt', tokenizer 'bytes'\)\. "
    )
    with pytest.raises(DataError, match=message + r"Set the model's vocab_size to 257\."):
        data.check_model(vocab_size=256, max_sequence_length=32)
    message = (
        r"sequence_length=32 is longer than the model's max_sequence_length=31\. Set data\.sequence_length to at most "
    )
    with pytest.raises(DataError, match=message + r"31, or the model's max_sequence_length to at least 32"):
        data.check_model(vocab_size=257, max_sequence_length=31)


def test_too_little_data_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train split of .*90\.bin has 81 tokens, too few for one row of sequence_length=9"
    ):
        module_of(positions(tmp_path, 90), sequence_length=90, validation=0.1).setup()
    message = (
        "data: an epoch of 60 has 5 training rows, and one step takes 8 (batch_size=8 on 1 rank(s)). "
        "Give more data, or lower batch_size; of text, a lower sequence_length makes more rows."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        L.Trainer(max_epochs=1, **QUIET).fit(Recorder(), datamodule=module_of(positions(tmp_path, 60), batch_size=8))
    with pytest.raises(DataError, match="data: batch_size is 0. Set it to at least 1"):
        module_of("x.bin", batch_size=0)
    with pytest.raises(DataError, match=r"'missing\.txt' does not exist: looked for"):
        SATDataModule("missing.txt").prepare_data()


def test_a_batch_is_loaded_far_below_a_millisecond() -> None:
    data = SATDataModule("stdlib://json", sequence_length=256, batch_size=8, validation=0.0)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, ShardedBatches)
    assert not loader.pin_memory or torch.cuda.is_available()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        num_batches = sum(1 for _ in loader)
        best = min(best, (time.perf_counter() - start) / num_batches)
    assert num_batches == len(loader) > 10
    assert best < 1e-3
