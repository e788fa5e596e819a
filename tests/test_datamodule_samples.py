"""`SATDataModule` where rows are samples: from YAML, padded or packed, in buckets and budgets, exactly once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import Dataset

from sat_lightning import SATDataModule
from sat_lightning.data import PadCollate, SampleOptions, Tokenize, WeightedPath
from sat_lightning.errors import DataError
from sat_lightning.training import DataOptions, MixtureMonitor
from tests.test_datamodule import QUIET
from tests.test_training_mixture import SaveAt

THIS = __name__


class Numbers(Dataset):
    """Samples that hold their own number, as often as they are long."""

    def __init__(self, size: int, first: int = 0, inner: Any = None) -> None:
        self.size, self.first, self.inner = size, first, inner

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.full((self.num_tokens(index),), self.first + index)
        return {"input_ids": ids, "target_ids": ids}

    def num_tokens(self, index: int) -> int:
        return 1 + index * 7 % 13


def make_numbers(path: str, size: int = 10, first: int = 0) -> Numbers:
    assert path == "some/where"
    return Numbers(size, first)


def number_of(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = torch.full((3,), int(row["id"]))
    return {"input_ids": ids, "target_ids": ids}


class Recorder(L.LightningModule):
    """Remembers the first token of each sample: with `Numbers`, which ones it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[int]]] = {"train": [], "validation": []}

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch["input_ids"][:, 0].tolist())
        return self.weight * 0.0

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["validation"].append([ids[0] for ids in batch["target_ids"].tolist() if ids[0] != -100])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def flat(batches: list[list[int]]) -> list[int]:
    return [one for batch in batches for one in batch]


@pytest.fixture
def chat(tmp_path: Path) -> str:
    rows = [{"prompt": "q" * (n % 9 + 1), "answer": "a" * (n % 5 + 1)} for n in range(60)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "chat.jsonl")


def options_of(path: str, samples: dict[str, Any] | None = None, **settings: Any) -> DataOptions:
    fields = {"fields": ["prompt", "answer"], "learned": ["answer"], **(samples or {})}
    return DataOptions(samples=SampleOptions(**fields), cache_dir=str(Path(path).parent / "cache"), **settings)


def parse(*arguments: str) -> SATDataModule:
    settings = {"subclass_mode_data": True, "save_config_callback": None, "trainer_defaults": QUIET, "run": False}
    words = [f"--data={SATDataModule.__module__}.SATDataModule", *arguments]
    return LightningCLI(
        Recorder, L.LightningDataModule, args=words, seed_everything_default=False, **settings
    ).datamodule


class Talks(Dataset):
    """A user's rows of text."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": "Q", "answer": "A" * (index + 1)}


def make_talks(path: str) -> Talks:
    return Talks()


def shout(row: dict[str, Any]) -> dict[str, str]:
    return {name: text.upper() for name, text in row.items()}


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 32}, {"bucket_size": 20}])
def test_text_of_own_data_and_functions_is_tokenized(chat: str, settings: dict[str, int]) -> None:
    paths = [
        WeightedPath(chat, process_fn=f"{THIS}.shout"),
        WeightedPath("any", create_dataset=f"{THIS}.make_talks"),
        WeightedPath(dataset=Talks(), process_fn=shout, name="talks"),
    ]
    data = SATDataModule(paths, 16, 4, validation=0, options=options_of(chat, **settings))
    ids = [n for batch in data.train_dataloader() for n in batch["input_ids"].flatten().tolist()]
    assert ids.count(ord("A")) == sum(n % 5 + 1 for n in range(60)) + 2 * sum(range(1, 8))
    assert ord("a") not in ids and ids.count(ord("Q")) == sum(n % 9 + 1 for n in range(60)) + 2 * 7


@pytest.mark.filterwarnings("ignore:LightningCLI's args")
def test_everything_can_be_said_in_yaml(tmp_path: Path, chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("id\n" + "".join(f"{n}\n" for n in range(200, 220)))
    inner = {"class_path": f"{THIS}.Numbers", "init_args": {"size": 2}}
    numbers = {"class_path": f"{THIS}.Numbers", "init_args": {"size": 30, "inner": inner}}
    # A file of the name of a field, or of a source, is not what is meant.
    (tmp_path / "chat").write_text("nothing")
    path = [
        {"path": "chat.jsonl"},
        {"path": "rows.csv", "process_fn": f"{THIS}.number_of", "options": {"fields": ["id"]}, "weight": 2},
        {"dataset": numbers, "name": "chat"},
        {"path": "some/where", "create_dataset": f"{THIS}.make_numbers", "options": {"first": 300}, "weight": 0.5},
    ]
    config = {
        "data.path": path,
        "data.validation": 0,
        "data.options.samples": {"fields": ["prompt", "answer"], "learned": ["answer"]},
        "data.options.collate": {"class_path": "sat_lightning.data.PadCollate", "init_args": {"multiple_of": 8}},
        "data.options.bucket_size": 20,
        "data.options.cache_dir": "cache",
    }
    data = parse(*(f"--{key}={json.dumps(value)}" for key, value in config.items()))
    assert isinstance(data.options.collate, PadCollate) and data.options.samples is not None
    assert [source.name for source in data.sources] == ["chat", "rows", "chat-2", "where"]
    assert isinstance(data.sources[2].dataset, Numbers) and data.sources[2].dataset.inner.size == 2
    assert data.mixture.sizes == [60, 20, 30, 10] and data.mixture.counts(135) == [60, 40, 30, 5]
    batches = list(data.train_dataloader())
    assert {batch["input_ids"].shape[1] for batch in batches} <= {8, 16}
    firsts = flat([batch["input_ids"][:, 0].tolist() for batch in batches])
    assert sorted(one for one in firsts if one != ord("q")) == sorted(
        [*range(200, 220), *range(200, 220), *range(30), *[one for one in firsts if one >= 300]]
    )


def test_prompts_are_read_and_answers_learned(chat: str) -> None:
    data = SATDataModule(chat, 16, 4, validation=0.2, options=options_of(chat))
    batch = next(iter(data.train_dataloader()))
    end, seen = data.text_tokenizer.end_of_document_id, 0
    for ids, targets in zip(batch["input_ids"].tolist(), batch["target_ids"].tolist(), strict=True):
        learned = [target for target in targets if target != -100]
        assert learned[-1] == end and set(learned[:-1]) == {ord("a")}
        assert [t for i, t in zip(ids, targets, strict=True) if i == ord("q")][:-1].count(-100) == ids.count(
            ord("q")
        ) - 1
        seen += 1
    assert seen == 4 and data.max_token_id == 256 and data.vocab_size == 257
    assert [len(data.rows(split)) for split in ("train", "validation")] == [48, 12]
    data.check_model(257, 16)
    with pytest.raises(DataError, match="sequence_length=16 is longer than the model's max_sequence_length=8"):
        data.check_model(257, 8)
    with pytest.raises(DataError, match="token id 256 is outside the model's vocabulary of 256"):
        data.check_model(256, 16)


def test_packed_samples_do_not_see_each_other(chat: str) -> None:
    data = SATDataModule(chat, 32, 4, validation=0.2, options=options_of(chat, {"pack": True}))
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "target_ids", "position_ids", "attention_mask"}
    assert batch["input_ids"].shape == (4, 32) and batch["attention_mask"].shape == (4, 1, 32, 32)
    starts = (batch["position_ids"] == 0) & (batch["input_ids"] == ord("q"))
    assert starts.sum() > 8  # more than two to a row
    row, place = starts[:, 1:].nonzero()[0].tolist()
    assert not batch["attention_mask"][row, 0, place + 1, : place + 1].any()
    with pytest.raises(DataError, match=r"chat\.jsonl, line 9: 13 tokens are more than max_length=12\. Set too_long"):
        SATDataModule(chat, 12, 4, options=options_of(chat, {"pack": True})).setup()
    split = SATDataModule(chat, 12, 4, validation=0, options=options_of(chat, {"pack": True, "too_long": "split"}))
    num_tokens = sum(n % 9 + 1 + n % 5 + 1 for n in range(60))
    shown = sum(int((row["document_ids"] >= 0).sum()) for row in split.rows("train"))
    assert shown == num_tokens
    with pytest.raises(DataError, match="samples.too_long is split, which needs samples.pack"):
        SampleOptions(too_long="split")


def test_lengths_are_counted_once(chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [{"path": chat, "tokens": 0.75}, {"path": chat, "tokens": 0.25, "name": "again"}]
    data = SATDataModule(path, 16, 4, options=options_of(chat))
    data.prepare_data()
    calls: list[Any] = []
    monkeypatch.setattr(Tokenize, "__call__", lambda self, row: calls.append(row))
    later = SATDataModule(path, 16, 4, options=options_of(chat))
    lengths = [n % 9 + n % 5 + 2 for n in range(60)]  # and the end, less one for the shift
    assert later.mixture.mean_tokens is not None and calls == []
    assert later.mixed_rows.sources[0].rows.token_lengths().tolist() == lengths
    whole = SATDataModule(path, 16, 4, validation=0, options=options_of(chat))
    assert whole.mixture.mean_tokens == [sum(lengths) / 60] * 2 and calls == []
    other = SATDataModule(path, 13, 4, options=options_of(chat, {"too_long": "truncate"}))
    with pytest.raises(DataError, match="mixture: chat has 0 tokens in its samples. Give it data, or remove it"):
        len(other.mixture.requested)  # another length is another count, for which the tokenizer is asked
    assert len(calls) == 60


def test_shares_by_tokens_are_exact_however_long_the_source() -> None:
    # Of 10000 samples every third is long: a sample of them would not tell.
    class Odd(Numbers):
        def num_tokens(self, index: int) -> int:
            return 1000 if index % 3 == 0 else 1

    data = SATDataModule([{"dataset": Odd(10_000), "tokens": 1}, {"dataset": Odd(100), "tokens": 1}], validation=0)
    assert data.mixture.mean_tokens == [(3334 * 1000 + 6666) / 10_000, (34 * 1000 + 66) / 100]


SETTINGS: list[dict[str, Any]] = [
    {"bucket_size": 20},
    {"max_tokens": 40},
    {"bucket_size": 20, "max_tokens": 40, "collate": PadCollate(multiple_of=4)},
]


def numbers_of(settings: dict[str, Any], **more: Any) -> SATDataModule:
    options = DataOptions(**{"collate": PadCollate(), **settings})
    path = [{"dataset": Numbers(83)}, {"dataset": Numbers(20, 100)}]
    return SATDataModule(path, 13, **{"batch_size": 4, "validation": 0.2, **more}, options=options)


@pytest.mark.parametrize("settings", SETTINGS, ids=["buckets", "budget", "both"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_every_sample_once(settings: dict[str, Any], num_workers: int, tmp_path: Path) -> None:
    data, module, monitor = numbers_of(settings, num_workers=num_workers), Recorder(), MixtureMonitor()
    flags: dict[str, Any] = {"default_root_dir": tmp_path, "callbacks": [monitor], "num_sanity_val_steps": 0}
    trainer = L.Trainer(max_epochs=1, **flags, **QUIET)
    trainer.fit(module, datamodule=data)
    everything = [*range(83), *range(100, 120)]
    train, validation = flat(module.seen["train"]), flat(module.seen["validation"])
    assert sorted(train + validation) == everything and len(validation) == 21
    assert len(module.seen["train"]) == len(data.train_dataloader()) == trainer.num_training_batches
    if "max_tokens" in settings:
        lengths = {one: data.sources[one >= 100].dataset.num_tokens(one % 100) for one in everything}
        assert all(len(batch) * max(lengths[one] for one in batch) <= 40 for batch in module.seen["train"])
        assert len({len(batch) for batch in module.seen["train"]}) > 2
        assert max(map(len, module.seen["validation"])) == 3  # 40 // 13
    counted = {row["source"]: row for row in monitor.table()}
    assert [row["samples"] for row in counted.values()] == data.mixture.sizes
    assert counted["Numbers"]["tokens"] == sum(1 + one * 7 % 13 for one in train if one < 100)


@pytest.mark.parametrize("settings", SETTINGS, ids=["buckets", "budget", "both"])
@pytest.mark.parametrize(
    ("hook", "time", "flags"),
    [
        ("on_train_batch_end", 5, {"max_epochs": 3}),
        ("on_train_batch_end", 23, {"max_epochs": 3, "accumulate_grad_batches": 3}),
        ("on_train_epoch_end", 1, {"max_epochs": 3}),
        ("on_validation_end", 1, {"max_steps": 45}),
        ("on_train_epoch_end", 2, {"max_epochs": 3, "limit_train_batches": 5}),
    ],
)
def test_it_goes_on_with_the_next_batch(settings: Any, hook: str, time: int, flags: Any, tmp_path: Path) -> None:
    modules = []
    saving = SaveAt(hook, time, tmp_path / "saved.ckpt")
    for callbacks, checkpoint in (([saving], None), ([], saving.path)):
        modules.append(Recorder())
        trainer = L.Trainer(callbacks=callbacks, num_sanity_val_steps=0, limit_val_batches=1, **flags, **QUIET)
        trainer.fit(modules[-1], datamodule=numbers_of(settings), ckpt_path=checkpoint, weights_only=True)
    whole, resumed = (module.seen["train"] for module in modules)
    # A window of accumulated batches that was begun is begun anew.
    begun = saving.num_batches % flags.get("accumulate_grad_batches", 1) if hook == "on_train_batch_end" else 0
    assert resumed == whole[saving.num_batches - begun :] and 0 < saving.num_batches < len(whole)


def test_bad_samples_are_named_or_counted(chat: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = Path(chat).read_text().splitlines()
    Path(chat).write_text("\n".join([*lines[:6], '{"prompt": "q"}', "{broken", *lines[8:]]))
    data = SATDataModule(chat, 16, 4, validation=0, options=options_of(chat))
    with pytest.raises(DataError, match=r"chat\.jsonl, line (7: no field 'answer'|8: not valid JSON)"):
        list(data.train_dataloader())
    for settings in ({}, {"bucket_size": 20}, {"max_tokens": 64}):
        skip = options_of(chat, on_bad_sample="skip", max_bad_fraction=0.1, **settings)
        data = SATDataModule(chat, 16, 4, validation=0, options=skip)
        batches = list(data.train_dataloader())
        empty = sum(int((batch["target_ids"] == -100).all(dim=1).sum()) for batch in batches)
        assert empty == 2 and data.rows("train").bad_samples.num_bad >= 2
    assert "bad sample 2 left out" in caplog.text
    short = options_of(chat, on_bad_sample="skip", max_bad_fraction=0.02)
    with pytest.raises(DataError, match=r"2 bad samples among .* read, more than max_bad_fraction=0\.02 allows"):
        list(SATDataModule(chat, 16, 4, validation=0, options=short).train_dataloader())
    with pytest.raises(DataError, match=r"chat\.jsonl, line \d+: 1\d tokens are more than max_length=10"):
        list(SATDataModule(chat, 10, 4, validation=0, options=options_of(chat)).train_dataloader())


BAD_ENTRIES: list[tuple[dict[str, Any], str]] = [
    ({"dataset": {"class_path": "no.such.Class"}}, "dataset: cannot import 'no.such.Class'"),
    ({"dataset": {"class_path": f"{THIS}.Numbers", "init_args": {"sise": 1}}}, "cannot be built .*sise.*Mend its init"),
    ({"dataset": 3}, "dataset of a source is a int. Give a map-style dataset, or its class_path"),
    ({"dataset": Numbers(3), "path": "x"}, "both a dataset and a path or create_dataset"),
    ({"path": "x", "create_dataset": "nowhere"}, "create_dataset is 'nowhere'. Give an import path"),
    ({"path": "some/where", "create_dataset": f"{THIS}.make_numbers", "options": {"sise": 1}}, "unknown option 'sise'"),
    ({"path": "some/where", "create_dataset": f"{THIS}.make_numbers", "options": {"size": 0}}, "is empty: 0 rows"),
]


@pytest.mark.parametrize(("entry", "message"), BAD_ENTRIES)
def test_a_source_of_ones_own_that_cannot_be_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SATDataModule([entry, {"dataset": Numbers(5)}]).setup()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_bad_rows_of_text_are_left_out_if_one_likes(tmp_path: Path, kind: str, caplog: Any) -> None:
    rows = [json.dumps({"text": "aaaa"}) for _ in range(60)] if kind == "jsonl" else ["text,n", *["aaaa,1"] * 60]
    rows[7], rows[9] = ("{broken", '{"body": 1}') if kind == "jsonl" else ("aaaa", "aaaa,1,2,3")
    (tmp_path / f"a.{kind}").write_text("\n".join(rows) + "\n")
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=rf"a\.{kind}, line 8: "):
        SATDataModule(f"{tmp_path}/a.{kind}", 9, 4, options=DataOptions(**settings)).setup()
    settings |= {"on_bad_sample": "skip"}
    data = SATDataModule(f"{tmp_path}/a.{kind}", 9, 4, validation=0, options=DataOptions(**settings))
    assert data.rows("train").store.meta.num_documents == 58 and "bad sample 2 left out of " in caplog.text
    settings |= {"max_bad_fraction": 0.001, "cache_dir": str(tmp_path / "other")}
    with pytest.raises(DataError, match=r"\d bad samples among .* read, more than max_bad_fraction=0\.001 allows"):
        SATDataModule(f"{tmp_path}/a.{kind}", 9, 4, options=DataOptions(**settings)).setup()


def test_each_source_of_text_may_have_options_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n' * 50)
    (tmp_path / "b.jsonl").write_text('{"body": "bbbb"}\n' * 50)
    path = [{"path": f"{tmp_path}/a.jsonl"}, {"path": f"{tmp_path}/b.jsonl", "options": {"text_field": "body"}}]
    options = DataOptions(cache_dir=str(tmp_path / "cache"))
    data = SATDataModule(path, 9, 4, validation=0, options=options)
    data.prepare_data()
    assert [source.store.meta.text_bytes for source in data.mixed_rows.sources] == [200, 200]
    assert sorted({*data.mixed_rows.sources[1][0]["input_ids"].tolist()}) == [ord("b"), 256]
    path[1]["options"] = {"text_feild": "body"}
    with pytest.raises(DataError, match="options of b has no 'text_feild', only text_field, .* Did you mean 'text_fi"):
        SATDataModule(path, 9, 4, options=options).setup()


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"bucket_size": -1}, "data: bucket_size is -1. Set it to at least 0."),
        ({"max_tokens": 0}, "data: max_tokens is 0. Set it to at least 1."),
        ({"max_tokens": 9, "drop_last": True}, "with max_tokens steps are of any size"),
    ):
        with pytest.raises(DataError, match=message):
            DataOptions(**settings)

    class Silent(Numbers):
        num_tokens = None

    data = SATDataModule(Silent(30), validation=0, options=DataOptions(bucket_size=10))
    with pytest.raises(DataError, match="Silent does not tell how many tokens a row has"):
        list(data.train_dataloader())
    assert np.ndim(data.mixture.epoch_size) == 0


def test_a_validation_path_is_read_as_that_of_training_or_as_it_says(chat: str, tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("q;a\nx;y\nz;w\n")
    (tmp_path / "train.csv").write_text("q;a\n" + "one;two\n" * 20)
    samples = SampleOptions(fields=["q", "a"])
    options = DataOptions(samples=samples, cache_dir=str(tmp_path / "cache"))
    train, held = str(tmp_path / "train.csv"), str(tmp_path / "held.csv")

    def texts(path: Any, validation: Any) -> dict[str, list[bytes]]:
        data = SATDataModule(path, 32, 4, validation=validation, options=options)
        data.prepare_data()
        loaders = data.val_dataloader()
        named = zip(data.set_names("validation"), loaders if isinstance(loaders, list) else [loaders], strict=True)
        return {
            name: [bytes(row[row != 0].tolist()) for batch in loader for row in batch["input_ids"]]
            for name, loader in named
        }

    semicolon, shouted = {"delimiter": ";"}, [b"XY", b"ZW"]
    one = [{"path": train, "options": semicolon, "process_fn": f"{THIS}.shout"}]
    assert texts(one, held) == {"": shouted}
    assert texts(one, {"path": held, "options": semicolon}) == {"": [b"xy", b"zw"]}
    assert texts(one, {"a": held, "b": {"path": held, "options": semicolon}}) == {"a": shouted, "b": [b"xy", b"zw"]}
    with pytest.raises(DataError, match="a source of path has no field 'optoins'.*Did you mean 'options'"):
        texts(one, {"a": {"path": held, "optoins": semicolon}})
    with pytest.raises(DataError, match="the set a has a share, and of it every row counts"):
        texts(one, {"a": {"path": held, "weight": 2.0}})
    # Of several sources none is more alike than the others.
    several = [*one, {"path": chat, "process_fn": f"{THIS}.number_of_prompt"}]
    with pytest.raises(DataError, match="held.csv.*no field 'q'"):
        texts(several, held)


def number_of_prompt(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(2, dtype=torch.int64), "target_ids": torch.ones(2, dtype=torch.int64)}


def test_a_function_for_training_rows_is_one_for_validation_rows_too(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"id": n, "text": "long text " * 9}) + "\n" for n in range(12))
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text(rows)
    options = DataOptions(cache_dir=str(tmp_path / "cache"))
    path = [WeightedPath(str(tmp_path / "train.jsonl"), process_fn=f"{THIS}.number_of")]
    data = SATDataModule(path, 8, 4, validation=str(tmp_path / "held.jsonl"), options=options)
    data.prepare_data()
    assert [ids[0] for batch in data.val_dataloader() for ids in batch["input_ids"].tolist()] == list(range(12))
