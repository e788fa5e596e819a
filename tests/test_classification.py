"""Tasks with classes: what their data give, that padding changes nothing, exact metrics, and errors that help."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix, multiclass_f1_score

from sat_lightning.cli import main
from sat_lightning.data import ByteTokenizer, LabelCollate, SampleOptions, TokenizersFile, open_records
from sat_lightning.data.framing import Frame
from sat_lightning.errors import ConfigError, DataError
from sat_lightning.mixins import LoraMixin, MLPHeadMixin, NoMixin, PrefixTuningMixin
from sat_lightning.models import BertModel, GPT2Model, ViTModel
from sat_lightning.training import (
    ConfusionCounts,
    DataOptions,
    ImageClassificationTask,
    MultipleChoiceTask,
    PredictionWriter,
    SATDataModule,
    SequenceClassificationTask,
    TokenClassificationTask,
)
from sat_lightning.training.confusion import rate
from tests.training_examples import make_trainer

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=257, max_sequence_length=160)
SENTIMENT = dict(fields=["sentence"], label="label", labels=["negative", "positive"])


def make_bert(**head: Any) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertModel.config_class(**SIZES))
    model.del_mixin("bert-final")
    model.add_mixin("head", MLPHeadMixin(model.config, **head))
    return model


def make_data(path: Any, tmp_path: Path, samples: dict, **arguments: Any) -> SATDataModule:
    options = DataOptions(samples=SampleOptions(**samples), cache_dir=str(tmp_path / "cache"))
    return SATDataModule(path, **{"sequence_length": 160, "batch_size": 4, "options": options, **arguments})


def batch_of(data: SATDataModule, split: str = "train") -> dict[str, torch.Tensor]:
    return next(iter({"train": data.train_dataloader, "validation": data.val_dataloader}[split]()))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_wordpiece(with_frame: bool) -> TokenizersFile:
    import tokenizers

    words = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "##d"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if with_frame:
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return TokenizersFile("a file", content=tokenizer.to_str().encode())


@pytest.mark.parametrize("with_frame", [True, False])
def test_a_text_and_a_pair_are_framed_as_bert_reads_them(with_frame: bool) -> None:
    frame = Frame(make_wordpiece(with_frame), max_length=8, truncate=True)
    assert [part.tolist() for part in frame(["a b"])] == [[1, 4, 5, 2], [0, 0, 0, 0]]
    assert [part.tolist() for part in frame(["a b", "c"])] == [[1, 4, 5, 2, 6, 2], [0, 0, 0, 0, 1, 1]]
    ids, types = frame(["a b a b a b", "c c"])  # the longest is cut, what frames it is not
    assert ids.tolist() == [1, 4, 5, 4, 2, 6, 6, 2] and types.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="10 tokens are more than sequence_length=8"):
        Frame(make_wordpiece(with_frame), max_length=8)(["a b a b a b a b"])


def test_bytes_are_framed_by_the_end_of_a_document() -> None:
    ids, _ = Frame(ByteTokenizer(), 99)(["hi", "you"])
    assert ids.tolist() == [256, *b"hi", 256, *b"you", 256]


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
@pytest.mark.parametrize("as_names", [True, False])
def test_a_table_of_sentences_and_labels_becomes_padded_batches(kind: str, as_names: bool, tmp_path: Path) -> None:
    texts = [f"film {'very ' * (n % 5)}{n}" for n in range(40)]
    labels = [["negative", "positive"][n % 2] if as_names else n % 2 for n in range(40)]
    path = tmp_path / f"train.{kind}"
    if kind == "tsv":
        rows = "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True))
        path.write_text("sentence\tlabel\n" + rows)
    else:
        write_rows(path, [{"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True)])
    data = make_data(str(path), tmp_path, SENTIMENT, validation=0)
    data.prepare_data()
    assert data.label_names == ["negative", "positive"]
    found = {}
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "token_mask", "target_ids"}
        for ids, mask, target in zip(batch["input_ids"], batch["token_mask"], batch["target_ids"], strict=True):
            assert not mask.logical_not().cumsum(0)[mask].any() and not ids[~mask].any()  # padding behind, of zeros
            found[bytes(ids[mask][1:-1].tolist()).decode()] = int(target)
    assert found == {text: n % 2 for n, text in enumerate(texts)}


@pytest.mark.parametrize(
    ("samples", "row", "said"),
    [
        (SENTIMENT, {"sentence": "x", "label": "positve"}, r"label 'positve' in field 'label' is none of the 2 labels"),
        (SENTIMENT, {"sentence": "x", "label": 2}, r"label 2 in field 'label' is none of the 2 labels \(neg"),
        (SENTIMENT, {"sentence": "x", "lable": 1}, r"no field 'label'; fields there: lable, sentence.*'lable'"),
        (SENTIMENT, {"sentence": 3, "label": 1}, r"field 'sentence' holds int, not text"),
        ({**SENTIMENT, "labels_of": "words"}, {"sentence": "a b", "label": "1"}, r"2 words in 'sentence' and 1 labels"),
        ({**SENTIMENT, "choices": ["c"]}, {"sentence": "a", "c": ["x"], "label": 0}, r"1 choices, and samples.labels"),
        ({**SENTIMENT, "image": "i"}, {"i": [0.5], "label": 0}, r"field 'i' holds float64 \[1\], not an image"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_line_and_cure(samples: dict, row: dict, said: str, tmp_path: Path) -> None:
    data = make_data(write_rows(tmp_path / "rows.jsonl", [row] * 4), tmp_path, samples, validation=0)
    with pytest.raises(DataError, match=rf"rows.jsonl, line \d: {said}"):
        batch_of(data)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"label": "label"}, r"samples.labels does not say which labels there are. Set it to their names in order"),
        ({"label": "label", "labels": ["a", "a"]}, r"samples.labels is \['a', 'a'\]. Give at least two labels, each"),
        ({"labels": 3}, r"samples.label names no field"),
        ({"label": "label", "labels": 2, "pack": True}, r"samples.pack, learned and split are for targets that are"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(samples: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        SampleOptions(**samples)


def test_the_label_of_a_word_is_the_target_of_its_first_token(tmp_path: Path) -> None:
    options = SampleOptions(fields=["words"], label="tags", labels=["o", "x"], labels_of="words")
    rows = [{"words": ["ab", "c", "d"], "tags": ["o", "x", 1]}, {"words": "ab", "tags": "x"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    from sat_lightning.data.entries import WeightedPath
    from sat_lightning.data.rowsamples import SampleReading
    from sat_lightning.data.sources import SourceOptions

    reading = SampleReading(ByteTokenizer(), 99, options, SourceOptions(), str(tmp_path))
    samples = reading.open(WeightedPath(path))
    assert samples[0]["input_ids"].tolist() == [256, *b"ab c d", 256]
    assert samples[0]["target_ids"].tolist() == [-100, 0, -100, 1, -100, 1, -100, -100]
    batch = LabelCollate(multiple_of=5)([samples[1], None, samples[0]])
    assert batch["target_ids"].shape == (3, 10) and batch["target_ids"][1].tolist() == [-100] * 10
    assert batch["target_ids"][0].tolist() == [-100, 1] + [-100] * 8 and not batch["token_mask"][1].any()


def test_numbers_are_places_unless_the_names_are_numbers() -> None:
    from sat_lightning.data import Labels

    assert [Labels("x", ["bad", "good"]).number(label) for label in ("good", "0", 1, " bad ")] == [1, 0, 1, 0]
    stars = Labels("stars", ["1", "2", "3"])
    assert [stars.number(label) for label in ("1", 3)] == [0, 2]
    with pytest.raises(DataError, match="label 0 in field 'stars' is none of the 3 labels"):
        stars.number(0)  # once taken for the first one, "1"
    assert Labels("x", 3).number("2") == 2


def test_words_are_framed_by_what_the_file_puts_around_a_text() -> None:
    import tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "[UNK]", "a", "b"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    frame = Frame(TokenizersFile("a file", content=library.to_str().encode()), 9)
    assert frame.join([[np.array([4]), np.array([5])]])[0].tolist() == frame(["a b"])[0].tolist() == [1, 4, 5, 2]


def test_choices_count_with_all_their_tokens_and_images_with_none(tmp_path: Path) -> None:
    rows = [{"text": "q" * (n % 7), "endings": ["a", "b" * (n % 5)], "label": 0} for n in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    samples = dict(fields=["text"], choices=["endings"], label="label", labels=2)
    options = DataOptions(samples=SampleOptions(**samples), cache_dir=str(tmp_path / "cache"), max_tokens=64)
    data = SATDataModule(path, 160, 4, validation=0, options=options)
    data.prepare_data()
    sizes = [batch["input_ids"].numel() for batch in data.train_dataloader()]
    assert max(sizes) <= 64 and sum(sizes) > 400
    images = tmp_path / "images"
    from PIL import Image

    for name in "ab":
        (images / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.zeros((4 + number, 4, 3), dtype=np.uint8)).save(images / name / f"{number}.png")
    of_images = SampleOptions(image="image", label="label", labels=["a", "b"])
    data = SATDataModule(str(images), 160, 4, validation=0, options=DataOptions(samples=of_images, bucket_size=8))
    with pytest.raises(DataError, match="count input_ids, and samples of .* hold image, target_ids. Do without them"):
        data.prepare_data()
    data = make_data(str(images), tmp_path, dict(image="image", label="label", labels=["a", "b"]), validation=0)
    with pytest.raises(DataError, match=r"images of one batch are \[3, \d, 4\] and .*Set samples.image_size"):
        list(data.train_dataloader())


def test_a_batch_of_which_nothing_counts_has_no_loss(tmp_path: Path) -> None:
    task = TokenClassificationTask(make_bert(sizes=[3]))
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "token_mask": torch.ones(2, 5, dtype=torch.bool)}
    loss, metrics = task.forward_step(batch | {"target_ids": torch.full((2, 5), -100)})  # type: ignore[misc]
    loss.backward()
    assert loss == 0 and metrics["accuracy"] == 0
    assert not any(p.grad is not None and p.grad.any() for p in task.parameters())


TASKS = {
    "text": (SequenceClassificationTask, {"sizes": [2], "pooling": "mean"}, "demo://sentiment", SENTIMENT),
    "words": (
        TokenClassificationTask,
        {"sizes": [3]},
        "demo://words",
        dict(fields=["tokens"], label="tags", labels=["other", "person", "place"], labels_of="words"),
    ),
    "choices": (
        MultipleChoiceTask,
        {"sizes": [1], "pooling": "first"},
        "demo://choices",
        dict(fields=["text"], choices=["endings"], label="label", labels=4),
    ),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_score(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, head, path, samples = TASKS[name]
    data, task = make_data(path, tmp_path, samples), kind(make_bert(**head).eval().to(dtype))
    batch = batch_of(data)
    longer = {
        key: value if key == "target_ids" and value.dim() == 1 else
        torch.nn.functional.pad(value, (0, 7), value=-100 if key == "target_ids" else 0)
        for key, value in batch.items()
    }  # fmt: skip
    longer["input_ids"][~longer["token_mask"]] = 99
    length = batch["input_ids"].shape[-1]
    with torch.no_grad():
        scores, padded = task.score(batch), task.score(longer)
    if name == "words":
        scores, padded = scores[batch["token_mask"]], padded[:, :length][batch["token_mask"]]
    assert_close(padded, scores, **({} if dtype == torch.float32 else dict(rtol=0.05, atol=0.02)))


@pytest.mark.parametrize("name", TASKS)
def test_each_task_learns_its_few_rows_by_heart(name: str, tmp_path: Path) -> None:
    kind, head, path, samples = TASKS[name]
    task = kind(make_bert(**head), optim={"learning_rate": 5e-3, "weight_decay": 0.0})
    data = make_data(path, tmp_path, samples, batch_size=8)
    trainer = make_trainer(max_steps=50, overfit_batches=1, default_root_dir=tmp_path)
    trainer.fit(task, data)
    assert trainer.callback_metrics["train_accuracy"] == 1.0
    scored = trainer.validate(task, data, verbose=False)[0]
    assert {"val_loss", "val_accuracy", "val_macro_f1"} == set(scored)


def test_a_causal_model_reads_its_last_token_and_methods_stack_under_the_head(tmp_path: Path) -> None:
    model = GPT2Model(GPT2Model.config_class(**SIZES))
    mixins = {
        "gpt2-final": NoMixin,
        "lora": LoraMixin,
        "prefix": partial(PrefixTuningMixin, prefix_len=3),
        "head": partial(MLPHeadMixin, sizes=[2], pooling="last"),
    }
    task = SequenceClassificationTask(model, mixins=mixins)
    trained = {name.split(".")[1] for name, value in task.model.named_parameters() if value.requires_grad}
    assert trained == {"lora", "prefix", "head"}
    task.model.eval()
    batch = batch_of(make_data("demo://sentiment", tmp_path, SENTIMENT))
    alone = [
        task.score({key: value[row : row + 1, : int(batch["token_mask"][row].sum())] for key, value in batch.items()
                    if key != "target_ids"})
        for row in range(4)
    ]  # fmt: skip
    assert_close(torch.cat(alone), task.score(batch))


def test_the_rates_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    halves = [ConfusionCounts(7), ConfusionCounts(7)]
    predicted, targets = torch.randint(0, 5, (2, 9, 11)), torch.randint(0, 6, (2, 9, 11))  # class 6 never occurs
    targets[torch.rand(targets.shape) < 0.3] = -100
    for half, some_predicted, some_targets in zip(halves, predicted, targets, strict=True):
        half.update(some_predicted, some_targets)
    counts = sum(half.compute() for half in halves)
    both = (predicted.flatten(), targets.flatten())
    own = rate(counts)
    assert_close(counts, multiclass_confusion_matrix(*both, num_classes=7, ignore_index=-100))
    assert_close(own["accuracy"], multiclass_accuracy(*both, 7, average="micro", ignore_index=-100))
    assert_close(own["macro_f1"], multiclass_f1_score(*both, 7, average="macro", ignore_index=-100))
    assert rate(torch.zeros(2, 2))["accuracy"].isnan()


@pytest.mark.parametrize(
    ("kind", "head", "samples", "said"),
    [
        (
            SequenceClassificationTask,
            {"sizes": [2]},
            "text",
            r"gives \[4, \d+, 2\], it must give 2 dimensions",
        ),
        (
            SequenceClassificationTask,
            {"sizes": [3], "pooling": "first"},
            "text",
            r"3 scores and the data have 2",
        ),
        (TokenClassificationTask, {"sizes": [3], "pooling": "mean"}, "words", r"Give MLPHeadMixin no pooling"),
        (MultipleChoiceTask, {"sizes": [4], "pooling": "first"}, "choices", r"it must give one score for each choice"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(kind: Any, head: dict, samples: str, said: str, tmp_path: Path) -> None:
    data = make_data(TASKS[samples][2], tmp_path, TASKS[samples][3])
    with pytest.raises(ConfigError, match=said):
        make_trainer(default_root_dir=tmp_path).fit(kind(make_bert(**head)), data)


def test_several_validation_sets_are_rated_each_and_together(tmp_path: Path) -> None:
    sets = {}
    for name, num_rows in (("first", 5), ("second", 9)):
        rows = [open_records("demo://sentiment")[number] for number in range(len(sets) * 5, len(sets) * 5 + num_rows)]
        sets[name] = write_rows(tmp_path / f"{name}.jsonl", rows)
    data = make_data("demo://sentiment", tmp_path, SENTIMENT, validation=sets)
    task = SequenceClassificationTask(make_bert(sizes=[2], pooling="mean"))
    found = make_trainer(default_root_dir=tmp_path).validate(task, data, verbose=False)
    found = {name: value for one in found for name, value in one.items()}
    assert set(task.confusion) == {"val", "val/first", "val/second"}
    assert torch.equal(task.confusion["val"], task.confusion["val/first"] + task.confusion["val/second"])
    assert int(task.confusion["val"].sum()) == 14
    for suffix in ("", "/first", "/second"):
        rated = rate(task.confusion[f"val{suffix}"])
        assert found[f"val_accuracy{suffix}"] == pytest.approx(float(rated["accuracy"]))
        assert found[f"val_macro_f1{suffix}"] == pytest.approx(float(rated["macro_f1"]))


def test_predictions_are_written_with_the_names_of_the_labels(tmp_path: Path) -> None:
    data = make_data("demo://sentiment", tmp_path, SENTIMENT, validation=0.002)
    task = SequenceClassificationTask(make_bert(sizes=[2], pooling="mean"))
    make_trainer(default_root_dir=tmp_path, callbacks=PredictionWriter()).predict(task, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["name"] == ["negative", "positive"][line["label"]]
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert line["probabilities"][line["label"]] == max(line["probabilities"])


def test_predictions_of_words_are_those_of_the_words_and_nothing_else(tmp_path: Path) -> None:
    _, head, path, samples = TASKS["words"]
    task = TokenClassificationTask(make_bert(**head))
    data = make_data(path, tmp_path, samples, validation=0.002)
    make_trainer(default_root_dir=tmp_path, callbacks=PredictionWriter()).predict(task, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    rows = data.rows("validation")
    assert len(lines) == len(rows) == 8
    for row, line in enumerate(lines):
        num_words = int((rows[row]["target_ids"] != -100).sum())
        assert [len(line[name]) for name in ("label", "probabilities", "name")] == [num_words] * 3
        assert line["name"] == [samples["labels"][label] for label in line["label"]]


def test_images_are_scaled_resized_and_learned(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.clip(level + random.normal(0, 20, (6, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    samples = dict(image="image", label="label", labels=["dark", "light"], image_size=[8, 8])
    data = make_data(str(tmp_path / "images"), tmp_path, samples, validation=0.25, sequence_length=512)
    batch = batch_of(data)
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert_close(batch["image"].mean((1, 2, 3)) > 0, batch["target_ids"] == 1)
    sizes = {**SIZES, "vocab_size": 1, "image_size": [8, 8], "patch_size": 4, "num_classes": 2}
    del sizes["max_sequence_length"]
    task = ImageClassificationTask(lambda: ViTModel(ViTModel.config_class(**sizes)), optim={"learning_rate": 1e-3})
    trainer = make_trainer(max_steps=30, default_root_dir=tmp_path)
    trainer.fit(task, data)
    assert trainer.validate(task, data, verbose=False)[0]["val_accuracy"] == 1.0


@pytest.mark.timeout(1300)
def test_two_ranks_rate_what_one_does(tmp_path: Path) -> None:
    """Odd numbers of rows, ragged texts, a bad row left out: every row counts once on one rank and on two."""
    rows = [dict(open_records("demo://sentiment")[number]) for number in range(41)]
    rows[17]["label"] = "unheard of"
    write_rows(tmp_path / "rows.jsonl", rows)
    recipe = ROOT / "recipes" / "bert_sst2_full.yaml"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAT_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    words = ["--config", str(recipe), "--data.path", "rows.jsonl", "--data.validation", "rows.jsonl"]
    words += ["--data.options.on_bad_sample", "skip", "--data.options.max_bad_fraction", "0.5"]
    words += ["--data.batch_size", "3", "--trainer.callbacks", "null"]
    found = []
    for num_ranks in (1, 2):
        more = ["--trainer.devices", str(num_ranks), "--trainer.logger.version", str(num_ranks)]
        more += ["--trainer.strategy", "ddp"] if num_ranks > 1 else []
        command = [sys.executable, "-m", "sat_lightning", "validate", *words, *more]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        (metrics,) = (tmp_path / "runs").rglob(f"version_{num_ranks}/metrics.csv")
        with metrics.open(newline="") as file:
            found.append(next(csv.DictReader(file)))
    for name in ("val_accuracy", "val_macro_f1", "val_loss"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-6), name
    assert float(found[0]["val_accuracy"]) * 40 == pytest.approx(round(float(found[0]["val_accuracy"]) * 40), abs=1e-4)


def test_the_command_line_takes_a_users_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.tsv").write_text("sentence\tlabel\n" + "fine\t1\nbad\t0\n" * 40)
    recipe = str(ROOT / "recipes" / "bert_sst2_full.yaml")
    main(["fit", "--config", recipe, "--data.path", "mine.tsv", "--trainer.fast_dev_run", "true"])


def test_demo_rows_are_the_same_everywhere() -> None:
    rows = open_records("demo://sentiment")
    assert len(rows) == 4000
    assert rows[0] == {"sentence": "the film is very splendid and the music is funny", "label": "positive"}
    with pytest.raises(DataError, match="there are choices, sentiment, words"):
        open_records("demo://sentimant")


def test_digits_are_images_of_bytes_and_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(2 * 64, dtype=float).reshape(2, 8, 8) % 17
    library = SimpleNamespace(load_digits=lambda: SimpleNamespace(images=images, target=np.array([3, 7])))
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(datasets=library))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", library)
    rows = open_records("digits://")
    assert len(rows) == 2 and rows[1]["label"] == 7
    assert rows[0]["image"].dtype == np.uint8 and rows[0]["image"][0, 0] == 0 and rows[0]["image"][2, 0] == 255
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'digits:// needs scikit-learn .*pip install "sat_lightning\[digits\]"'):
        open_records("digits://")
