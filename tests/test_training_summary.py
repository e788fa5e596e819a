from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, IterableDataset

from sat_lightning.cli import main
from sat_lightning.training import OptimConfig
from sat_lightning.training.freezing import freeze_parameters
from sat_lightning.training.summary import describe_parameters, describe_steps, report_run
from tests.training_examples import (
    CountingData,
    ScaleMixin,
    counting_loader,
    counting_rows,
    make_model,
    make_task,
    make_trainer,
)

WORD, POSITION = 17 * 32, 16 * 32


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_parameters_block_by_block_and_mixin_by_mixin() -> None:
    model = make_model()
    model.add_mixin("scale", ScaleMixin(model.config))
    freeze_parameters(model, frozen=[r"layers\.0", "word"])
    table = rows(describe_parameters(model))
    num_layer = sum(p.numel() for p in model.transformer.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert list(table) == [
        "parameters",
        *(f"transformer.{part}" for part in ("word_embeddings", "position_embeddings", "layers", "final_layernorm")),
        "mixins.gpt2-final",
        "mixins.scale",
        "total",
    ]
    assert table["parameters"] == ["trainable", "frozen", "MiB"]
    assert table["transformer.layers"] == [f"{num_layer:,}", f"{num_layer:,}", f"{2 * num_layer * 4 / 2**20:.1f}"]
    assert table["transformer.word_embeddings"] == ["0", f"{WORD:,}", "0.0"]
    assert table["mixins.scale"] == ["32", "0", "0.0"]
    assert table["total"] == [f"{total - num_layer - WORD:,}", f"{num_layer + WORD:,}", f"{total * 4 / 2**20:.1f}"]


def test_bytes_are_those_of_the_types_that_are_held() -> None:
    model = make_model(num_layers=4, hidden_size=64)
    whole = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert rows(describe_parameters(model))["total"][2] == f"{whole:.1f}"
    assert rows(describe_parameters(model.bfloat16()))["total"][2] == f"{whole / 2:.1f}"


def test_tied_weights_count_once_in_the_transformer() -> None:
    model = make_model()
    model.get_mixin("gpt2-final").lm_head.weight = model.transformer.word_embeddings.weight
    table = rows(describe_parameters(model))
    assert "mixins.gpt2-final" not in table
    assert table["transformer.word_embeddings"][0] == f"{WORD:,}"
    assert table["total"][0] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_shards_count_whole() -> None:
    """Under ZeRO-3 a parameter is an empty shell, and its true size stands beside it."""
    model = make_model()
    before = describe_parameters(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        parameter.data = torch.empty(0)
    assert describe_parameters(model) == before


def test_blocks_of_two_transformers_and_of_none() -> None:
    pair = torch.nn.ModuleDict({"encoder": make_model(num_layers=1), "decoder": make_model(num_layers=1)})
    names = list(rows(describe_parameters(pair)))
    assert "encoder.transformer.layers" in names and "decoder.mixins.gpt2-final" in names
    assert list(rows(describe_parameters(torch.nn.Linear(2, 2)))) == ["parameters", "weight", "bias", "total"]
    assert rows(describe_parameters(torch.nn.Identity()))["total"] == ["0", "0", "0.0"]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield counting_rows(1)[0]


class BatchOf(L.LightningDataModule):
    batch_size, sequence_length = 4, 16

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=4)


@pytest.mark.parametrize(
    ("data", "arguments", "expected"),
    [
        (CountingData, dict(max_steps=-1, max_epochs=3, accumulate_grad_batches=2), (
            "8 rows x 2 accumulated x 1 ranks = 16 rows x 16 tokens = 256 tokens", "4 steps", "12 steps, 3,072 tokens"
        )),
        (CountingData, dict(max_steps=5), (
            "8 rows x 1 accumulated x 1 ranks = 8 rows x 16 tokens = 128 tokens", "8 steps", "5 steps, 640 tokens"
        )),
        (BatchOf, dict(max_steps=5), (
            "4 rows x 1 accumulated x 1 ranks = 4 rows x 16 tokens = 64 tokens", "unknown", "5 steps, 320 tokens"
        )),
        (BatchOf, dict(max_steps=-1, max_epochs=2), (
            "4 rows x 1 accumulated x 1 ranks = 4 rows x 16 tokens = 64 tokens", "unknown", "unknown"
        )),
        (lambda: counting_loader(batch_size=32), dict(max_steps=3), (
            "32 rows x 1 accumulated x 1 ranks = 32 rows", "2 steps", "3 steps"
        )),
        (lambda: DataLoader(counting_rows(6), batch_size=None), dict(max_steps=3), (
            "batches x 1 accumulated x 1 ranks", "6 steps", "3 steps"
        )),
    ],
)  # fmt: skip
def test_what_a_step_holds(data: Any, arguments: dict[str, Any], expected: tuple[str, ...]) -> None:
    trainer, said = make_trainer(**arguments), []

    class Task(type(make_task())):  # type: ignore[misc]
        def on_fit_start(self) -> None:
            said.append(describe_steps(self.trainer))
            self.trainer.should_stop = True

        def forward_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward_step({name: values.view(-1, 16) for name, values in batch.items()})

    trainer.fit_loop.min_epochs = 0
    trainer.fit(Task(make_model, optim=OptimConfig(schedule="constant")), data())
    steps = [line.split(maxsplit=1)[1] for line in said[0].splitlines()]
    assert tuple(steps) == expected


def test_table_is_said_and_kept_when_a_run_starts(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    task = make_task(frozen=["embeddings"])
    with caplog.at_level("INFO"):
        trainer = make_trainer(1, logger=CSVLogger(tmp_path, name=None, version=""))
        trainer.fit(task, CountingData())
    text = (tmp_path / "summary.txt").read_text()
    assert text.startswith(describe_parameters(task.model)) and text.strip() in caplog.text
    assert text.endswith("16 tokens = 128 tokens\nepoch  8 steps\nrun    1 steps, 128 tokens\n")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_written_without_a_logger_or_on_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_trainer(1).fit(make_task(), counting_loader())
    make_trainer(1, fast_dev_run=True, logger=CSVLogger(tmp_path)).fit(make_task(), counting_loader())
    make_trainer(1, logger=DummyLogger()).fit(make_task(), counting_loader())  # it has no folder
    assert list(tmp_path.rglob("summary.txt")) == []


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(1, logger=CSVLogger(tmp_path, name=None, version=""))
    trainer.fit(make_task(), counting_loader())
    (tmp_path / "summary.txt").unlink()
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)
    report_run(trainer, trainer.lightning_module.model)
    assert not (tmp_path / "summary.txt").exists()


CONFIG = """
model:
  class_path: {module}
  init_args: {arguments}
data: {{class_path: tests.training_examples.CountingData}}
trainer: {{max_steps: 1, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}}
"""
OURS = """
    model: {class_path: GPT2Model, init_args: {config: {num_layers: 1, hidden_size: 32, num_attention_heads: 2,
      vocab_size: 17, max_sequence_length: 16}}}
"""


class Stranger(L.LightningModule):
    """None of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(17, 4)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.table(batch["input_ids"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "words", "has_ours", "has_lightnings"),
    [
        ("LanguageModelingTask", [], True, False),
        ("LanguageModelingTask", ["--trainer.enable_model_summary", "true"], True, True),
        ("tests.test_training_summary.Stranger", [], False, True),
        ("tests.test_training_summary.Stranger", ["--trainer.enable_model_summary", "false"], False, False),
    ],
    ids=str,
)
def test_the_command_line_shows_one_table(
    module: str, words: list[str], has_ours: bool, has_lightnings: bool, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG.format(module=module, arguments=OURS if has_ours else "{}"))
    with caplog.at_level("INFO"):
        main(["fit", "--config", "run.yaml", *words])
    said = caplog.text + capsys.readouterr().out
    assert ("transformer.layers" in said) == has_ours
    assert ("model params size" in said) == has_lightnings  # in plain text, or in colours where rich is installed
