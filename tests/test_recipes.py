"""Every recipe runs through the real command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from sat_lightning.cli import main
from sat_lightning.training.commands.source import load_model

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
#: A run of one batch needs no corpus: a text of a few kilobytes stands for what a recipe trains on.
TEXT = "def add(first, second):\n    return first + second\n\n\n" * 2000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: Recipes that a text will not do for: what stands for their data.
DATA = {
    "bert_sst2": ["--data.path", "table.tsv"],
    "bert_whole_words": ["--data.path", "table.tsv"],
    "bert_words": ["--data.path", "words.jsonl"],
    "gpt2_instructions": ["--data.path", "rows.jsonl"],
    "t5_summaries": ["--data.path", "rows.jsonl"],
    "vit_digits": ["--data.path", "images", "--model.model.config.in_channels", "3"],
}


def write_labelled(folder: Path) -> None:
    """A table as `bert_sst2_*.yaml` takes it, rows of questions and of summaries, and a folder of images."""
    row = {"prompt": "What does add do?\n", "answer": "Add.\n", "text": "Add two numbers.", "summary": "Add."}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 400)
    words = {"tokens": ["Ada", "calls", "from", "Oslo"], "tags": ["person", "other", "other", "place"]}
    (folder / "words.jsonl").write_text(f"{json.dumps(words)}\n" * 80)
    (folder / "table.tsv").write_text("sentence\tlabel\n" + "a fine film\t1\na dull film\tnegative\n" * 40)
    for name in ("four", "two"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(50):
            pixels = np.full((9, 7, 3), number * (1 if name == "two" else 4), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, folder: Path) -> None:
    write_labelled(folder)
    words = next((words for name, words in DATA.items() if recipe.stem.startswith(name)), ["--data.path", "text.txt"])
    main(["fit", "--config", str(recipe), *words, "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_does(recipe: Path) -> None:
    header = recipe.read_text(encoding="utf-8").splitlines()[:4]
    starts = ["# What: ", "# Command: ", "# Hardware and time: ", "# Expected: "]
    assert [line[: len(start)] for line, start in zip(header, starts, strict=True)] == starts
    assert f"recipes/{recipe.name}" in header[1]
    assert re.search(r"\d", header[2]) and re.search(r"\d", header[3])


def test_a_student_learns_from_inside_of_its_teacher_by_yaml(folder: Path) -> None:
    recipe = next(path for path in RECIPES if path.stem == "bert_distill")
    words = ["--data.path", "text.txt", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"]
    words += ["--model.model.student.config.hidden_size", "32", "--model.hidden.layers", "{2: 0, 5: 1}"]
    main(["fit", "--config", str(recipe), *words, "--model.hidden.kind", "cosine"])
    run = folder / "runs" / "bert_distill" / "version_0"
    assert "val_hidden_loss" in (run / "metrics.csv").read_text().splitlines()[0]
    config = json.loads((run / "model" / "model_config.json").read_text())
    assert config["model_class"] == "BertModel" and config["num_layers"] == 2 and config["hidden_size"] == 32


def test_lora_begins_with_the_model_of_the_recipe_before_it(folder: Path) -> None:
    write_labelled(folder)
    base, recipe = "gpt2_instructions", "gpt2_instructions_lora"
    named = {path.stem: path for path in RECIPES}
    few = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1"]
    words = [*next(words for name, words in DATA.items() if base.startswith(name)), *few, "--data.batch_size", "2"]
    main(["fit", "--config", str(named[base]), *words])
    model = folder / "runs" / base / "version_0" / "model"
    main(["fit", "--config", str(named[recipe]), *words, "--init_from", str(model)])
    trained = load_file(model / "model.safetensors")
    found = load_model(str(folder / "runs" / recipe / "version_0")).state_dict()
    shared = [name for name in trained if name in found and "final" not in name]
    assert len(shared) > 20 and all(trained[name].equal(found[name]) for name in shared)


def test_there_are_recipes() -> None:
    assert "gpt2_quickstart" in [path.stem for path in RECIPES]


def test_quickstart_leaves_curves_metrics_samples_and_checkpoint_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = next(path for path in RECIPES if path.stem == "gpt2_quickstart")
    sizes = "{num_layers: 1, hidden_size: 16, num_attention_heads: 2, vocab_size: 257, max_sequence_length: 256}"
    words = ["--model.model.config", sizes, "--data.path", "text.txt", "--trainer.max_steps", "4"]
    words += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    main(["fit", "--config", str(recipe), *words])
    run = folder / "runs" / "gpt2_quickstart" / "version_0"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.csv",
        "samples.txt",
        "summary.txt",
    }
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_bits_per_byte", "lr-AdamW/decay", "lr-AdamW/no_decay"} <= set(columns)
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 4
    shown = capsys.readouterr().out
    assert "tokens/s=" in shown and "train_loss=" in shown and "--- step 4 ---" in shown
