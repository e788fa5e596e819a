"""Mixtures through the data module: named validation sets, the monitor's table, and what Lightning can do with them."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sat_lightning import SATDataModule
from sat_lightning.data import PadCollate, ProcessedRecords, Tokenize, WeightedPath, open_records
from sat_lightning.errors import ConfigError, DataError
from sat_lightning.training import DataOptions, MixtureMonitor
from tests.test_datamodule import QUIET, Recorder, positions
from tests.training_examples import make_model, make_task, make_trainer

WHICH = ("requested_sample", "achieved_sample", "requested_token", "achieved_token")
SOURCES = {"code": "x = x + 1\n", "prose": "It was the best of times. ", "table": "1\t2\t3\n"}


@pytest.fixture
def texts(tmp_path: Path) -> list[dict[str, Any]]:
    """Three texts, of about 400, 200 and 100 rows of 16 tokens, and how much of each."""
    entries = []
    for number, (name, text) in enumerate(SOURCES.items()):
        (tmp_path / f"{name}.txt").write_text(text * (6400 // 2**number // len(text)))
        entries.append({"path": str(tmp_path / f"{name}.txt"), "probability": (0.6, 0.3, 0.1)[number]})
    return entries


def source_of(row: torch.Tensor) -> str:
    text = bytes(row.clamp(max=255).tolist()).decode("latin-1")
    return "code" if "x" in text else "table" if "\t" in text else "prose"


def data_of(texts: Any, **settings: Any) -> SATDataModule:
    options = DataOptions(**settings.pop("options", {}))
    return SATDataModule(texts, 16, **{"batch_size": 5, "validation": 0.1, **settings}, options=options)


def model_task() -> Any:
    return make_task(lambda: make_model(vocab_size=257))


def test_mixture_trains_logs_and_writes_its_shares(tmp_path: Path, texts: list[dict[str, Any]]) -> None:
    data, monitor = data_of(texts), MixtureMonitor()
    seen: Counter[str] = Counter()

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.update(source_of(row) for row in batch["input_ids"])

    trainer = make_trainer(
        24, callbacks=[monitor, Watch()], default_root_dir=tmp_path, accumulate_grad_batches=2, log_every_n_steps=8
    )
    trainer.fit(model_task(), datamodule=data)
    table = {row["source"]: row for row in csv.DictReader((tmp_path / "mixture.csv").open())}
    assert {name: int(row["samples"]) for name, row in table.items()} == seen == {"code": 144, "prose": 72, "table": 24}
    for name, share in (("code", 0.6), ("prose", 0.3), ("table", 0.1)):
        row = table[name]
        assert [float(row[f"{which}_share"]) for which in WHICH] == pytest.approx([share] * 4)
        assert int(row["tokens"]) == 16 * int(row["samples"])
    assert float(table["table"]["epochs"]) == pytest.approx(24 / len(data.mixed_rows.sources[2]))
    logged = trainer.callback_metrics
    assert float(logged["mixture_samples/code"]) == pytest.approx(0.6)
    assert float(logged["mixture_epochs/table"]) == pytest.approx(float(table["table"]["epochs"]))


def test_each_source_is_validated_under_its_name_and_all_together(texts: list[dict[str, Any]]) -> None:
    data, task = data_of(texts), model_task()
    trainer = make_trainer(1)
    metrics = trainer.validate(task, datamodule=data, verbose=False)[0]
    names = [f"val_{what}{part}" for what in ("loss", "perplexity", "bits_per_byte") for part in
             ("", "/code", "/prose", "/table")]  # fmt: skip
    assert set(metrics) == set(names)
    sizes = [data.rows("validation").sources[number].num_targets for number in range(3)]
    parts = [metrics[f"val_loss/{name}"] for name in SOURCES]
    mean = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
    assert metrics["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert min(parts) < metrics["val_loss"] < max(parts)


def test_validation_sets_of_their_own(tmp_path: Path) -> None:
    validation = {"first": positions(tmp_path, 36), "second": positions(tmp_path, 58)}
    data = SATDataModule(
        positions(tmp_path, 500), 10, 4, validation=validation, options=DataOptions(token_dtype="uint32")
    )
    assert data.set_names("validation") == ["first", "second"]
    loaders = data.val_dataloader()
    seen = [[t for batch in loader for t in batch["target_ids"].flatten().tolist() if t != -100] for loader in loaders]
    assert seen == [list(range(1, 36)), list(range(1, 58))]


def test_split_in_the_notation_of_sat(tmp_path: Path) -> None:
    data = SATDataModule(positions(tmp_path, 4001), 10, options=DataOptions(token_dtype="uint32", split="80,15,5"))
    sizes = [data.rows(split).num_tokens for split in ("train", "validation", "test")]
    assert sizes == pytest.approx([3200, 600, 200], abs=2) and sum(sizes) == 4001
    for split in ("95,5,0,1", "a,b", "0,1", "1,-1", ""):
        data = SATDataModule(positions(tmp_path, 100), 10, options=DataOptions(token_dtype="uint32", split=split))
        with pytest.raises(DataError, match=r"is not up to three numbers for train, validation and test"):
            data.setup()


class Squares(Dataset):
    name = "squares"

    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index]), "target_ids": torch.tensor([index * index])}


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def test_dataset_of_ones_own_is_a_source(tmp_path: Path) -> None:
    data = SATDataModule(Squares(), batch_size=4, validation=0.2, num_workers=2)
    module = Recorder()
    L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(module, datamodule=data)
    train = [target for batch in module.seen["train"] for target in batch]
    validation = [target for batch in module.seen["validation"] for target in batch]
    assert sorted(train + validation) == [index**2 for index in range(103)] and len(validation) == 21
    assert len(train) == len(set(train)) == 82 and len(module.seen["train"][-1]) == 2
    assert data.max_token_id == 0
    mixed = SATDataModule(
        [WeightedPath(dataset=Squares(), weight=2), {"dataset": Squares(), "weight": 0.5}], validation=0.0
    )
    assert mixed.mixture.names == ["squares", "squares-2"] and mixed.mixture.epoch_size == round(2.5 * 103)
    with pytest.raises(DataError, match=r"data: Subset is empty: it has 0 samples\. Give it data, or remove it\."):
        SATDataModule(torch.utils.data.Subset(Squares(), [])).setup()
    with pytest.raises(DataError, match="Endless has no length or rows by number. Give a map-style dataset"):
        SATDataModule(Endless()).setup()


def test_a_mixture_without_end_trains_until_it_is_stopped(texts: list[dict[str, Any]]) -> None:
    data = data_of(texts, validation=0.0, options={"stop": "never"})
    trainer = make_trainer(150, max_epochs=1)
    trainer.fit(model_task(), datamodule=data)
    assert trainer.global_step == 150 and data.state_dict()["position"] == 150 * 5
    assert data.mixture.epochs(750)[2] > 0.7


def test_batches_of_one_source_reach_the_model(texts: list[dict[str, Any]]) -> None:
    data = data_of(texts, validation=0.0, options={"batch_from_same_source": True, "stop": "all_exhausted"})
    sources = [{source_of(row) for row in batch["input_ids"]} for batch in data.train_dataloader()]
    assert all(len(names) == 1 for names in sources)
    assert {next(iter(names)) for names in sources} == set(SOURCES)


def test_state_is_a_few_integers_and_changed_data_are_noticed(texts: list[dict[str, Any]]) -> None:
    data = data_of(texts)
    make_trainer(7).fit(model_task(), datamodule=data)
    state = data.state_dict()
    assert state == {"epoch": 0, "position": 35, "epoch_size": data.mixture.epoch_size, "seed": 0, "num_ranks": 1}
    other = data_of(texts, options={"seed": 3})
    with pytest.warns(UserWarning, match=r"since the checkpoint seed was 0 and is 3\. The run continues at sample 35"):
        other.load_state_dict(state)
    assert other.state_dict() == {**state, "seed": 3}


def test_an_epoch_cut_short_is_followed_by_a_new_one_and_a_new_trainer_begins_anew(tmp_path: Path) -> None:
    data = SATDataModule(Squares(), batch_size=4, validation=0.0)
    runs = []
    for _ in range(2):
        module = Recorder()
        L.Trainer(max_epochs=2, limit_train_batches=3, **QUIET).fit(module, datamodule=data)
        runs.append(module.seen["train"])
        assert data.state_dict()["epoch"] == 2 and data.state_dict()["position"] == 0
    mixture = data.mixture
    expected = [int(row) ** 2 for start in (0, 103) for row in mixture.ids(range(start, start + 12))]
    assert [target for batch in runs[0] for target in batch] == expected and runs[0] == runs[1]


def test_monitor_without_a_mixture_is_refused(texts: list[dict[str, Any]]) -> None:
    trainer = make_trainer(1, callbacks=[MixtureMonitor()])
    with pytest.raises(ConfigError, match="MixtureMonitor needs a SATDataModule. Use one, or remove it"):
        trainer.fit(model_task(), DataLoader(Squares()))


def test_monitor_goes_on_counting_in_a_resumed_run(tmp_path: Path, texts: list[dict[str, Any]]) -> None:
    first = make_trainer(5, callbacks=[MixtureMonitor()], default_root_dir=tmp_path)
    first.fit(model_task(), datamodule=data_of(texts))
    first.save_checkpoint(tmp_path / "5.ckpt")
    second = make_trainer(12, callbacks=[MixtureMonitor()], default_root_dir=tmp_path)
    second.fit(model_task(), datamodule=data_of(texts), ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    rows = list(csv.DictReader((tmp_path / "mixture.csv").open()))
    assert [int(row["samples"]) for row in rows] == [36, 18, 6]


def test_strategies_that_ask_the_batch_size_are_told(texts: list[dict[str, Any]]) -> None:
    loader = data_of(texts).train_dataloader()
    assert (loader.batch_sampler.batch_size, len(loader)) == (5, -(-data_of(texts).mixture.epoch_size // 5))
    assert loader.sampler is loader.batch_sampler and not loader.pin_memory


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reloading_loaders_and_accumulating_lose_nothing(num_workers: int) -> None:
    data = SATDataModule(Squares(), batch_size=4, validation=0.0, num_workers=num_workers)
    module = Recorder()
    flags = {"reload_dataloaders_every_n_epochs": 1, "accumulate_grad_batches": 4}
    trainer = L.Trainer(max_epochs=3, **flags, **QUIET)
    trainer.fit(module, datamodule=data)
    targets = [target for batch in module.seen["train"] for target in batch]
    assert targets == [int(row) ** 2 for row in data.mixture.ids(range(3 * 103))]
    assert trainer.global_step == 3 * 7  # 26 batches an epoch, the last 2 make a step


def test_samples_of_different_lengths_are_collated_as_one_likes(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("".join(f'{{"text": "{"ab" * (n % 7 + 1)}"}}\n' for n in range(50)))
    samples = ProcessedRecords(open_records(str(tmp_path / "answers.jsonl")), Tokenize("bytes", ["text"]))
    entries = [{"dataset": samples, "tokens": 1, "name": "answers"}, {"dataset": samples, "tokens": 1}]
    data = data_of(entries, batch_size=4, options={"collate": PadCollate(), "stop": "all_exhausted"})
    trainer = make_trainer(-1, max_epochs=1, default_root_dir=tmp_path, callbacks=[MixtureMonitor()])
    trainer.fit(model_task(), datamodule=data)
    rows = list(csv.DictReader((tmp_path / "mixture.csv").open()))
    assert [float(row["achieved_token_share"]) for row in rows] == pytest.approx([0.5, 0.5], abs=0.05)
    assert {"val_loss", "val_loss/answers"} < set(trainer.callback_metrics)


class SaveAt(L.Callback):
    """Saves one checkpoint, the n-th time that a hook is called, and notes how many batches were trained on then."""

    def __init__(self, hook: str, time: int, path: Path) -> None:
        self.num_batches, self.left, self.path = 0, time, path
        setattr(self, hook, self.save)

    def save(self, trainer: L.Trainer, pl_module: Recorder, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.num_batches = len(pl_module.seen["train"])
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("flags", [{"max_epochs": 3}, {"max_steps": 45}, {"max_epochs": 3, "limit_train_batches": 5}])
@pytest.mark.parametrize(
    ("hook", "time"),
    [
        ("on_train_batch_end", 4),
        ("on_train_batch_end", 5),
        ("on_train_batch_end", 15),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 1),
        ("on_train_epoch_end", 2),
    ],
)
def test_wherever_a_checkpoint_is_saved_the_next_batch_comes(tmp_path: Path, hook: str, time: int, flags: Any) -> None:
    modules = []
    saving = SaveAt(hook, time, tmp_path / "saved.ckpt")
    for callbacks, checkpoint in (([saving], None), ([], saving.path)):
        if checkpoint is not None and not checkpoint.is_file():
            pytest.fail(f"{hook} was not called {time} times")
        modules.append(Recorder())
        data = SATDataModule(Squares(), batch_size=4, validation=0.2)
        settings = {"num_sanity_val_steps": 0, "limit_val_batches": 1, **flags, **QUIET}
        L.Trainer(callbacks=callbacks, **settings).fit(
            modules[-1], datamodule=data, ckpt_path=checkpoint, weights_only=True
        )
    whole, resumed = (module.seen["train"] for module in modules)
    assert resumed == whole[saving.num_batches :] and 0 < saving.num_batches
