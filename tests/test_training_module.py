from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sat_lightning import BaseMixin, SATLightningModule, non_conflict
from sat_lightning.errors import ConfigError, DataError
from sat_lightning.training import LanguageModelingTask, OptimConfig
from sat_lightning.training.averages import WeightedMeans
from sat_lightning.training.callbacks.curves import read_curves
from tests.training_examples import (
    CountingData,
    ScaleMixin,
    counting_loader,
    counting_rows,
    make_model,
    make_task,
    make_trainer,
    parameters_of,
)

FAST = OptimConfig(learning_rate=0.01)


class Recorder(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def reference_loss(task: SATLightningModule, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = task.model(batch["input_ids"])[0]
    return F.cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten())


def test_language_model_learns_to_count() -> None:
    recorder = Recorder()
    trainer = make_trainer(80, callbacks=recorder)
    trainer.fit(make_task(optim=FAST), counting_loader())
    assert recorder.losses[0] == pytest.approx(math.log(17), abs=0.3)
    assert recorder.losses[-1] < 0.3


@pytest.mark.parametrize("arguments", [{}, {"loader": 2}])
def test_a_task_in_ten_lines_trains(arguments: dict) -> None:
    class CopyTask(SATLightningModule):
        def forward_step(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logits = self.model(batch)[0]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.flatten())
            return loss, {"accuracy": (logits.argmax(-1) == batch).float().mean()}

    rows = torch.randint(0, 17, (32, 8))
    trainer = make_trainer(60, check_val_every_n_epoch=5)
    loaders = DataLoader(rows, 8) if not arguments else [DataLoader(rows, 8), DataLoader(rows[:4], 4)]
    trainer.fit(CopyTask(make_model, optim=FAST), DataLoader(rows, 8), loaders)
    metrics = trainer.callback_metrics
    suffixes = ["/dataloader_idx_0", "/dataloader_idx_1"] if arguments else [""]
    assert set(metrics) == {"train_loss", "train_accuracy"} | {
        f"val_{name}{suffix}" for name in ("loss", "accuracy") for suffix in suffixes
    }
    assert metrics["train_accuracy"] > 0.9 and metrics[f"val_accuracy{suffixes[-1]}"] > 0.9


def test_forward_step_must_be_written() -> None:
    with pytest.raises(NotImplementedError, match=r"SATLightningModule must define forward_step\(self, batch\)"):
        make_trainer(1).fit(SATLightningModule(make_model), counting_loader())


def test_model_must_be_a_model() -> None:
    with pytest.raises(ConfigError, match="model builds a Linear, it must build a BaseModel."):
        make_task(lambda: torch.nn.Linear(1, 1)).configure_model()
    with pytest.raises(ConfigError, match=r"The model is built in configure_model\(\), which the Trainer calls."):
        make_task()(torch.zeros(1, 4, dtype=torch.long))


def test_configure_model_builds_once_and_adds_the_mixins_in_order() -> None:
    task = make_task(mixins={"one": ScaleMixin, "two": lambda config: ScaleMixin(config, start=2.0)})
    assert task.model is None
    task.configure_model()
    model = task.model
    task.configure_model()
    assert task.model is model
    assert model.hook_origins["mlp_forward"] == "two -> one -> default"
    assert model.get_mixin("two").scale.unique().tolist() == [2.0]


def test_a_standing_model_is_taken_as_it_is() -> None:
    model = make_model()
    task = make_task(model, mixins={"scale": ScaleMixin})
    assert task.model is model and list(model.mixins) == ["gpt2-final", "scale"]


def test_loss_is_the_same_from_the_fused_head_and_from_logits() -> None:
    task = make_task(make_model())
    batch = next(iter(counting_loader()))
    assert task.model.hooks.computes_loss
    fused = task.forward_step(batch)

    class Pass(BaseMixin):
        """Wraps the head, which therefore has to give logits."""

        @non_conflict
        def final_forward(self, logits, old_impl=None, **kw):
            return old_impl(logits, **kw)

    assert torch.allclose(fused, reference_loss(task, batch), atol=1e-6)
    task.model.add_mixin("pass", Pass())
    assert not task.model.hooks.computes_loss
    assert torch.allclose(task.forward_step(batch), fused, atol=1e-6)


def test_validation_mean_is_exact_over_ragged_and_padded_rows() -> None:
    rows = counting_rows(10)
    for row, num_kept in zip(rows, [16, 3, 0, 7, 16, 1, 0, 0, 0, 12], strict=True):
        row["target_ids"] = row["target_ids"].clone()
        row["target_ids"][num_kept:] = -100
    task = make_task(make_model())
    # Batches of 3 end in one row; the third batch but one has no target at all.
    loader = DataLoader([rows[i] for i in (0, 1, 3, 2, 6, 7, 4, 5, 8, 9)], batch_size=3)
    (metrics,) = make_trainer().validate(task, loader, verbose=False)
    task.eval()
    together = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert metrics["val_loss"] == pytest.approx(reference_loss(task, together).item(), abs=1e-6)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-5)


def test_means_weigh_and_leave_out_what_has_no_weight() -> None:
    means, trainer = WeightedMeans(), make_trainer()
    for value, weight in ((1.0, 3), (float("nan"), 0), (5.0, 1)):
        means.add({"loss": torch.tensor(value)}, torch.tensor(weight))
    assert means
    assert means.pop(trainer.strategy) == {"loss": torch.tensor(2.0)}
    assert not means and means.pop(trainer.strategy) == {}


def test_a_true_nan_is_not_hidden() -> None:
    task = make_task(make_model())
    with torch.no_grad():
        task.model.transformer.final_layernorm.weight.fill_(float("nan"))
    (metrics,) = make_trainer().validate(task, counting_loader(), verbose=False)
    assert math.isnan(metrics["val_loss"])


@pytest.mark.parametrize(("stage", "bytes_per_token"), [("val", 2.0), ("test", 4.0)])
def test_bits_per_byte(stage: str, bytes_per_token: float) -> None:
    trainer = make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(make_task(), CountingData(), verbose=False)
    assert set(metrics) == {f"{stage}_{name}" for name in ("loss", "perplexity", "bits_per_byte")}
    bits = metrics[f"{stage}_loss"] / math.log(2)
    assert metrics[f"{stage}_bits_per_byte"] == pytest.approx(bits / bytes_per_token, rel=1e-5)


def test_predict_scores_each_row() -> None:
    task = make_task(make_model())
    rows = counting_rows(3)
    rows[1]["target_ids"] = torch.full_like(rows[1]["target_ids"], -100)
    (scores,) = make_trainer().predict(task, DataLoader(rows, batch_size=3))
    assert scores["num_targets"].tolist() == [16, 0, 16]
    assert scores["loss"][1].isnan()
    for index in (0, 2):
        row = {name: value[None] for name, value in rows[index].items()}
        assert scores["loss"][index] == pytest.approx(reference_loss(task, row).item(), abs=1e-6)


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_train_loss_is_the_mean_since_it_was_last_logged(num_accumulated: int, tmp_path) -> None:
    recorder = Recorder()
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name=None, version="")
    trainer = make_trainer(
        7, callbacks=recorder, logger=logger, log_every_n_steps=3, accumulate_grad_batches=num_accumulated
    )
    trainer.fit(make_task(optim=FAST), counting_loader(7 * 8 * num_accumulated))
    (_, logged) = read_curves(tmp_path / "metrics.csv", ("train_loss",))["train_loss"]
    # Lightning gives the loss divided by the number of batches that are added up.
    steps = torch.tensor(recorder.losses).view(7, num_accumulated).sum(1)
    assert logged == pytest.approx([steps[:3].mean().item(), steps[3:6].mean().item(), steps[6].item()], rel=1e-5)


def test_data_that_does_not_fit_is_refused_before_the_first_step() -> None:
    class Data(CountingData):
        def check_model(self, vocab_size: int, max_sequence_length: int) -> None:
            raise DataError(f"vocab_size {vocab_size}, max_sequence_length {max_sequence_length}")

    for model in (make_model, make_model()):
        recorder = Recorder()
        with pytest.raises(DataError, match="vocab_size 17, max_sequence_length 16"):
            make_trainer(1, callbacks=recorder).fit(make_task(model), Data())
        assert recorder.losses == []


@pytest.mark.parametrize(
    "flags", [dict(accumulate_grad_batches=2), dict(gradient_clip_val=0.1), dict(precision="bf16-mixed")], ids=str
)
def test_trainer_flags_work(flags: dict) -> None:
    task = make_task(make_model(), optim=FAST)
    before = parameters_of(task.model)
    num_batches = 3 * flags.get("accumulate_grad_batches", 1)
    trainer = make_trainer(3, val_check_interval=num_batches, **flags)
    trainer.fit(task, counting_loader(), counting_loader())
    assert trainer.global_step == 3 and trainer.fit_loop.total_batch_idx + 1 == num_batches
    assert all(not torch.equal(before[name], after) for name, after in parameters_of(task.model).items())
    assert trainer.callback_metrics["val_loss"] < math.log(17)


def test_clipping_bounds_the_gradient() -> None:
    norms = []

    class Gradients(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    make_trainer(2, gradient_clip_val=0.01, callbacks=Gradients()).fit(make_task(), counting_loader())
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_compiling_changes_no_name_and_no_number(tmp_path) -> None:
    model, plain = make_model(), make_model()
    plain.load_state_dict(model.state_dict())
    task = make_task(model, compile={"backend": "aot_eager", "fullgraph": True})
    assert task.state_dict().keys() == make_task(plain).state_dict().keys()
    trainer = make_trainer(2)
    trainer.fit(task, counting_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    reference = make_task(plain)
    make_trainer(2).fit(reference, counting_loader())
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == reference.state_dict().keys()
    assert all(torch.allclose(saved[name], value, atol=1e-6) for name, value in reference.state_dict().items())
    assert model._compiled_call_impl is not None and plain._compiled_call_impl is None


def test_saved_task_reloads_to_equal_logits(tmp_path) -> None:
    task = make_task(mixins={"scale": ScaleMixin}, frozen=["embeddings"], optim=FAST)
    trainer = make_trainer(2)
    trainer.fit(task, counting_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = LanguageModelingTask.load_from_checkpoint(
        tmp_path / "a.ckpt", model=make_model, mixins={"scale": ScaleMixin}
    )
    input_ids = counting_rows()[0]["input_ids"][None]
    assert torch.equal(again.eval()(input_ids)[0], task.eval()(input_ids)[0])
    assert again.optim == FAST
    assert not again.model.transformer.word_embeddings.weight.requires_grad


def test_resumed_run_goes_on_counting(tmp_path) -> None:
    path = tmp_path / "a.ckpt"
    first = make_trainer(3)
    first.fit(make_task(optim=FAST), counting_loader())
    first.save_checkpoint(path)
    recorder, second = Recorder(), make_trainer(5)
    task = make_task(optim=FAST)
    second.callbacks.append(recorder)
    second.fit(task, counting_loader(), ckpt_path=path)
    assert (second.global_step, len(recorder.losses)) == (5, 2)
    assert second.lr_scheduler_configs[0].scheduler.last_epoch == 5
    state = second.optimizers[0].state
    assert {int(values["step"]) for values in state.values()} == {5}


@pytest.mark.parametrize("is_standing", [True, False])
def test_a_model_that_was_loaded_for_inference_is_trained_as_one(is_standing: bool) -> None:
    """`from_pretrained` gives a model in evaluation mode, in which a fine-tune would drop nothing out."""
    modes = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            modes.append(all(module.training for module in pl_module.modules()))

    loaded = make_model().eval()
    task = LanguageModelingTask(loaded if is_standing else lambda: loaded)
    make_trainer(2, callbacks=Watch()).fit(task, counting_loader())
    assert modes == [True, True]
