from __future__ import annotations

import importlib.util
import re
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from sat_lightning import BaseMixin
from sat_lightning.data import ByteTokenizer
from sat_lightning.errors import ConfigError
from sat_lightning.generation import sample_continuation, sample_token
from sat_lightning.training import CurvePlotter, RunMonitor, SampleText, TrainingProgressBar, count_rows, count_tokens
from sat_lightning.training.callbacks import sample as sample_module
from sat_lightning.training.callbacks.curves import _distinct, draw_curves, find_columns, read_curves
from sat_lightning.training.runs import write_whole
from sat_lightning.training.throughput import shape_of_ids
from tests.training_examples import CountingData, counting_loader, make_model, make_task, make_trainer

PNG = b"\x89PNG\r\n\x1a\n"


class ForeignModule(L.LightningModule):
    """A stranger's module: none of our classes, another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(257, 257)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TextData(L.LightningDataModule):
    """A stranger's data module with the two names that SampleText asks for."""

    text_tokenizer = ByteTokenizer()
    sequence_length = 8

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(0, 257, (32, 8))), 4)


def csv_logger(folder: Any) -> CSVLogger:
    return CSVLogger(folder, name=None, version="")


def test_curves_lie_beside_the_metrics(tmp_path) -> None:
    trainer = make_trainer(
        4, logger=csv_logger(tmp_path), callbacks=CurvePlotter(), log_every_n_steps=1, val_check_interval=2
    )
    trainer.fit(make_task(), CountingData())
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    curves = read_curves(tmp_path / "metrics.csv", ("train_loss", "val_loss", "lacking"))
    assert {name: steps for name, (steps, _) in curves.items()} == {"train_loss": [0, 1, 2, 3], "val_loss": [1, 3]}
    assert curves["val_loss"][1][-1] == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_broken_run_has_curves_and_its_own_error(tmp_path) -> None:
    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("the disk is gone")

    trainer = make_trainer(
        9, logger=csv_logger(tmp_path), callbacks=[Break(), CurvePlotter()], log_every_n_steps=1, max_epochs=1
    )
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer.fit(make_task(), counting_loader())
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_curves_without_metrics_or_matplotlib(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_curves(tmp_path / "none.csv", ("train_loss",)) == {}
    with pytest.warns(UserWarning, match="CurvePlotter draws what a CSVLogger wrote, and trainer.logger has none."):
        make_trainer(1, callbacks=CurvePlotter()).fit(ForeignModule(), TextData())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name))
    with pytest.raises(ConfigError, match=r'matplotlib, .* Run: pip install "sat_lightning\[plot\]", or remove Curve'):
        make_trainer(1, callbacks=CurvePlotter()).fit(make_task(), counting_loader())


def test_curves_take_other_formats() -> None:
    assert b"<svg" in draw_curves({"val_loss": ([1.0, 2.0], [3.0, 2.5])}, "svg")


def test_rates_and_speed_are_drawn_below_where_they_were_logged(tmp_path) -> None:
    callbacks = [CurvePlotter(file_name="curves.svg"), RunMonitor(), LearningRateMonitor()]
    make_trainer(4, logger=csv_logger(tmp_path), callbacks=callbacks, log_every_n_steps=1).fit(
        make_task(), CountingData()
    )
    path = tmp_path / "metrics.csv"
    names = find_columns(path, ("lr-", "train/device/items_per_sec"))
    assert "train/device/items_per_sec" in names and any(name.startswith("lr-") for name in names)
    assert find_columns(tmp_path / "none.csv", ("lr-",)) == ()
    drawn, alone = ((tmp_path / "curves.svg").read_bytes(), draw_curves(read_curves(path, ("train_loss",)), "svg"))
    heights = [float(re.search(rb'height="([\d.]+)pt"', picture)[1]) for picture in (drawn, alone)]
    assert heights == [8 * 72, 5 * 72]


def test_rates_that_move_alike_are_one_curve_and_of_many_two_are_drawn() -> None:
    curves = {f"lr-AdamW/{name}": ([0.0, 1.0], [rate, 0.0]) for name, rate in zip("abcdefg", range(7), strict=True)}
    assert list(_distinct(curves, "lr-")) == ["lr-AdamW/g", "lr-AdamW/a"]
    alike = {"lr-AdamW/decay": ([0.0], [1.0]), "lr-AdamW/no_decay": ([0.0], [1.0]), "other": ([0.0], [2.0])}
    assert list(_distinct(alike, "lr-")) == ["lr-AdamW/decay"]


def test_sample_is_printed_and_kept(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = SampleText("def ", num_tokens=12, every_validation=True)
    model = make_model(vocab_size=257, max_sequence_length=8)

    class Data(TextData):
        def train_dataloader(self) -> torch.utils.data.DataLoader:
            ids = torch.randint(0, 257, (16, 9))
            rows = [{"input_ids": row[:-1], "target_ids": row[1:]} for row in ids]
            return torch.utils.data.DataLoader(rows, 4)

        val_dataloader = train_dataloader

    trainer = make_trainer(4, callbacks=callback, val_check_interval=2, default_root_dir=tmp_path)
    trainer.fit(make_task(model), Data())
    text = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("--- ")] == ["--- step 2 ---", "--- step 4 ---"]
    assert text.count("def ") == 2
    assert "--- step 4 ---\ndef " in capsys.readouterr().out


def test_sample_works_for_a_strangers_module_and_changes_nothing(tmp_path) -> None:
    def train(*callbacks: L.Callback) -> ForeignModule:
        torch.manual_seed(1)
        module = ForeignModule()
        make_trainer(3, callbacks=list(callbacks), default_root_dir=tmp_path).fit(module, TextData())
        return module

    sampled, plain = train(SampleText(num_tokens=5)), train()
    assert torch.equal(sampled.table.weight, plain.table.weight)
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8", errors="strict").startswith("--- step 3 ---\n")


def test_sample_draws_the_same_text_again() -> None:
    trainer, module = make_trainer(1), ForeignModule()
    trainer.fit(module, TextData())
    torch.manual_seed(0)
    once = SampleText("a", num_tokens=40, top_k=None).sample(trainer, module)
    torch.manual_seed(1)
    assert SampleText("a", num_tokens=40, top_k=None).sample(trainer, module) == once
    assert SampleText("a", num_tokens=40, top_k=None, seed=1).sample(trainer, module) != once
    assert once.startswith("a") and module.training


def test_sample_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="SampleText turns ids into text with the data module's text_tokenizer"):
        make_trainer(1, callbacks=SampleText()).fit(make_task(), counting_loader())


def test_sampling_takes_the_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).repeat(2000, 1)
    assert sample_token(logits, temperature=0.0).unique().tolist() == [1]
    assert sample_token(logits, top_k=2).unique().tolist() == [1, 2]
    shares = torch.bincount(sample_token(logits, temperature=2.0), minlength=4) / 2000
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.05)


def test_continuation_sees_only_its_context() -> None:
    seen = []

    def count_on(input_ids: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.tolist())
        return F.one_hot((input_ids + 1) % 7, 7).float()

    ids = sample_continuation(count_on, torch.tensor([[1, 2], [4, 5]]), 3, context_length=3, temperature=0.0)
    assert ids.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 0, 1]]
    assert seen[-1] == [[2, 3, 4], [5, 6, 0]]


@pytest.mark.parametrize("arguments", [dict(max_steps=16), dict(max_steps=-1, max_epochs=2)], ids=str)
def test_bar_shows_loss_and_speed_over_the_whole_run(
    arguments: dict, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    trainer = make_trainer(
        **arguments, callbacks=TrainingProgressBar(refresh_rate=2), enable_progress_bar=True, log_every_n_steps=2
    )
    trainer.fit(make_task(), CountingData())
    shown = capsys.readouterr().out
    assert "100%|██████████| 16/16" in shown and "8/16" in shown  # 8 batches to an epoch
    last = shown.rsplit("16/16", 1)[1]
    assert "train_loss=" in last and "val_loss=" in last and "tokens/s=" in last and "v_num" not in last


def test_bar_works_in_a_strangers_pipeline_without_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 12

    trainer = make_trainer(
        -1, max_epochs=-1, callbacks=[Stop(), TrainingProgressBar(refresh_rate=2)], enable_progress_bar=True
    )
    trainer.fit(ForeignModule(), TextData())
    shown = capsys.readouterr().out
    assert "Epoch 1:" in shown and "8/8" in shown and "train_loss=" in shown and "tokens/s=" in shown


def test_throughput_monitor_counts_tokens_and_flops(tmp_path) -> None:
    monitor = ThroughputMonitor(batch_size_fn=count_rows, length_fn=count_tokens, window_size=3)
    logger = csv_logger(tmp_path)
    trainer = make_trainer(6, callbacks=monitor, logger=logger, log_every_n_steps=1)
    trainer.fit(make_task(), CountingData())
    logger.save()
    curves = read_curves(
        tmp_path / "metrics.csv",
        tuple(f"train/{n}" for n in ("samples", "lengths"))
        + tuple(f"train/device/{n}" for n in ("items_per_sec", "samples_per_sec", "flops_per_sec")),
    )
    assert curves["train/samples"][1] == [8.0 * step for step in range(1, 7)]
    assert curves["train/lengths"][1] == [128.0 * step for step in range(1, 7)]
    rates = [curves[f"train/device/{name}_per_sec"][1][-1] for name in ("items", "samples", "flops")]
    assert rates[0] == pytest.approx(16 * rates[1]) and rates[2] > rates[0]


@pytest.mark.parametrize(
    ("batch", "num_rows", "num_tokens"),
    [
        ({"input_ids": torch.zeros(3, 5, dtype=torch.long), "other": torch.zeros(9, 9)}, 3, 15),
        ([torch.zeros(4, 7, dtype=torch.long), torch.zeros(4)], 4, 28),
        ({"input_ids": torch.zeros(2, 4, 5, dtype=torch.long)}, 2, 40),
        ({"images": torch.zeros(2, 3, 8, 8)}, 2, 2),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, 2, 2),
        (torch.zeros(6, 10), 6, 6),
        ("text", 1, 1),
    ],
)
def test_counts_of_any_batch(batch: Any, num_rows: int, num_tokens: int) -> None:
    assert (count_rows(batch), count_tokens(batch)) == (num_rows, num_tokens)


def test_each_choice_of_a_row_is_a_row_of_the_model() -> None:
    """Its operations are those of short texts, not of one long one."""
    assert shape_of_ids({"input_ids": torch.zeros(2, 4, 5, dtype=torch.long)}) == (8, 5)
    assert shape_of_ids({"input_ids": torch.zeros(2, 5, dtype=torch.long)}) == (2, 5)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "text")  # fails before it is renamed
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_sample_from_a_cache_is_the_one_that_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task = make_task(make_model(vocab_size=257, max_sequence_length=32))
    trainer = make_trainer(1)
    trainer.fit(ForeignModule(), TextData())
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lengths: list[int] = []
    task.model.register_forward_pre_hook(lambda model, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    before, names = torch.get_rng_state(), list(task.model.mixins)
    for length, temperature in ((32, 0.9), (8, 0.9), (32, 0.0)):
        sample = SampleText("abc", num_tokens=20, context_length=length, temperature=temperature, seed=3)
        lengths.clear()
        text = sample.sample(trainer, task.train())
        assert task.training and task.model.training and list(task.model.mixins) == names
        read = sum(lengths)
        with monkeypatch.context() as patch:
            patch.setattr(sample_module, "_plain_model", lambda module: None)
            lengths.clear()
            assert sample.sample(trainer, task) == text
        assert sum(lengths) > read and (read == 22) == (length == 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_of_a_layer_without_a_cache_is_read_anew() -> None:
    class OwnAttention(BaseMixin):
        def attention_forward(self, hidden_states, mask, **kw):
            return hidden_states

    task, trainer = make_task(make_model(vocab_size=257)), make_trainer(1)
    trainer.fit(ForeignModule(), TextData())
    assert sample_module._plain_model(task) is task.model
    task.model.add_mixin("own", OwnAttention())
    text = SampleText("abc", num_tokens=5).sample(trainer, task)
    assert text.startswith("abc") and SampleText("abc", num_tokens=5).sample(trainer, task) == text
    task.model.compile(backend="eager")
    assert sample_module._plain_model(task) is None and sample_module._plain_model(ForeignModule()) is None
