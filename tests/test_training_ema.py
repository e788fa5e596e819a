from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.training import EMA, OptimConfig, SkipNonFinite
from tests.training_examples import ScaleMixin, counting_loader, counting_rows, make_task, make_trainer

FAST = OptimConfig(learning_rate=0.02, schedule="constant")


class Reference(L.Callback):
    """The average written out: in fp32, over whole weights, once a step."""

    def __init__(self, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.averages: dict[str, torch.Tensor] = {}
        self.steps = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.averages = {
            n: p.detach().float().clone() for n, p in pl_module.model.named_parameters() if p.requires_grad
        }

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        for name, parameter in pl_module.model.named_parameters():
            if name in self.averages:
                self.averages[name] = decay * self.averages[name] + (1 - decay) * parameter.detach().float()


class Watch(L.Callback):
    """Keeps copies of the weights before, in and after validation."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.during: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []

    @staticmethod
    def copy(module: L.LightningModule) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.before = self.copy(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
        self.during.append(self.copy(pl_module))

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        self.after.append(self.copy(pl_module))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_average_equals_the_formula(precision: str, warmup: bool) -> None:
    ema, reference = EMA(decay=0.8, warmup=warmup), Reference(0.8, warmup)
    trainer = make_trainer(12, callbacks=[ema, reference], precision=precision)
    task = make_task(optim=FAST)
    trainer.fit(task, counting_loader())
    averages = ema.ema_state_dict(trainer)
    assert ema.num_updates == 12 and close(averages, reference.averages)
    assert {value.dtype for value in averages.values()} == {torch.float32}
    weights = dict(task.model.named_parameters())
    assert all(not torch.equal(averages[name], weights[name].float()) for name in averages)


def test_accumulation_counts_steps_and_not_batches() -> None:
    ema, reference = EMA(decay=0.5, warmup=False), Reference(0.5, False)
    trainer = make_trainer(4, callbacks=[ema, reference], accumulate_grad_batches=3)
    trainer.fit(make_task(optim=FAST), counting_loader())
    assert ema.num_updates == reference.steps == 4
    assert close(ema.ema_state_dict(trainer), reference.averages)


def test_a_batch_without_a_step_leaves_the_average_alone() -> None:
    task = make_task(optim=FAST)
    task.automatic_optimization = False

    def training_step(batch, batch_idx):
        optimizer = task.optimizers()
        loss = task.forward_step(batch)
        if batch_idx % 2:  # every other batch is thrown away
            return None
        task.manual_backward(loss[0] if isinstance(loss, tuple) else loss)
        optimizer.step()
        optimizer.zero_grad()
        return None

    task.training_step = training_step
    ema = EMA()
    trainer = make_trainer(4, callbacks=ema)
    trainer.fit(task, counting_loader())
    assert trainer.global_step == 4 and trainer.fit_loop.total_batch_idx >= 6 and ema.num_updates == 4


def test_a_batch_that_the_guard_leaves_out_does_not_count(tmp_path) -> None:
    task = make_task(optim=FAST)
    forward_step = task.forward_step
    calls = []

    def forward_with_nan(batch):
        calls.append(len(calls))
        loss = forward_step(batch)
        return loss * float("nan") if calls[-1] in (1, 3) else loss

    task.forward_step = forward_with_nan
    ema, reference = EMA(decay=0.5), Reference(0.5, True)
    callbacks = [SkipNonFinite(max_fraction=1.0), ema, reference]
    trainer = make_trainer(4, callbacks=callbacks, default_root_dir=tmp_path)
    with pytest.warns(UserWarning):
        trainer.fit(task, counting_loader())
    assert len(calls) == 6 and trainer.global_step == ema.num_updates == 4
    averages = ema.ema_state_dict(trainer)
    assert close(averages, reference.averages) and all(value.isfinite().all() for value in averages.values())


def test_every_n_steps_decays_as_much() -> None:
    ema = EMA(decay=0.9, warmup=False, every_n_steps=3)
    snapshots: list[torch.Tensor] = []

    class Snap(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            snapshots.append(pl_module.model.transformer.final_layernorm.weight.detach().clone())

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            self.on_train_start(trainer, pl_module)

    trainer = make_trainer(7, callbacks=[ema, Snap()])
    trainer.fit(make_task(optim=FAST), counting_loader())
    expected = snapshots[0]
    for step in (3, 6):
        expected = 0.9**3 * expected + (1 - 0.9**3) * snapshots[step]
    assert ema.num_updates == 2
    assert torch.allclose(ema.ema_state_dict(trainer)["transformer.final_layernorm.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_validation_uses_the_average_and_puts_the_weights_back(precision: str) -> None:
    watch = Watch()
    ema, reference = EMA(decay=0.8), Reference(0.8, True)
    task = make_task(optim=FAST)
    trainer = make_trainer(
        6, callbacks=[watch, ema, reference], precision=precision, val_check_interval=3, limit_val_batches=1
    )
    trainer.fit(task, counting_loader(), counting_loader(16))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    expected = {f"model.{name}": value.to(dtype) for name, value in reference.averages.items()}
    swapped = watch.during[-1]
    assert all(torch.allclose(swapped[n].float(), expected[n].float(), rtol=0.01, atol=1e-6) for n in expected)
    assert not equal(swapped, watch.before)
    assert equal(watch.before, Watch.copy(task))  # the last validation came after the last step


def test_training_with_and_without_the_average_is_the_same() -> None:
    def train(callbacks: list[L.Callback]) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        task = make_task(optim=FAST)
        make_trainer(6, callbacks=callbacks, val_check_interval=2).fit(task, counting_loader(), counting_loader(16))
        return Watch.copy(task)

    assert equal(train([]), train([EMA()]))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_after_training_and_from_a_checkpoint(stage: str, tmp_path) -> None:
    task = make_task(optim=FAST)
    ema, watch = EMA(decay=0.9), Watch()
    trainer = make_trainer(4, callbacks=[ema, watch])
    trainer.fit(task, counting_loader())
    weights = Watch.copy(task)
    getattr(trainer, stage)(task, counting_loader(16))
    averages = ema.ema_state_dict(trainer)
    assert all(torch.equal(watch.during[-1][f"model.{name}"], value) for name, value in averages.items())
    assert equal(weights, Watch.copy(task))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh, second = make_task(optim=FAST), Watch()
    other = make_trainer(4, callbacks=[EMA(), second])
    getattr(other, stage)(fresh, counting_loader(16), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert equal(second.during[-1], watch.during[-1]) and equal(weights, Watch.copy(fresh))


def test_without_an_average_the_weights_are_evaluated_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="EMA: there is no average, so the weights themselves are evaluated"):
        make_trainer(callbacks=EMA()).validate(make_task(), counting_loader(16), verbose=False)


def test_evaluate_can_be_switched_off() -> None:
    watch = Watch()
    trainer = make_trainer(3, callbacks=[EMA(evaluate=False), watch], val_check_interval=3)
    trainer.fit(make_task(optim=FAST), counting_loader(), counting_loader(16))
    assert equal(watch.during[-1], watch.before)


def test_resumed_average_is_that_of_an_unbroken_run(tmp_path) -> None:
    def train(steps: int, ckpt: Path | None = None) -> tuple[L.Trainer, EMA]:
        torch.manual_seed(2)
        ema = EMA(decay=0.95)
        trainer = make_trainer(steps, callbacks=ema)
        weights_only = {"weights_only": True} if ckpt else {}
        trainer.fit(make_task(optim=FAST), DataLoader(counting_rows(8), batch_size=8), ckpt_path=ckpt, **weights_only)
        return trainer, ema

    whole, unbroken = train(8)
    first, _ = train(3)
    first.save_checkpoint(tmp_path / "3.ckpt")
    second, resumed = train(8, tmp_path / "3.ckpt")
    assert resumed.num_updates == unbroken.num_updates == 8
    assert equal(resumed.ema_state_dict(second), unbroken.ema_state_dict(whole))


def test_checkpoint_in_the_midst_of_validation_holds_the_weights(tmp_path) -> None:
    class Save(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    watch, ema = Watch(), EMA(decay=0.9)
    task = make_task(optim=FAST)
    trainer = make_trainer(4, callbacks=[watch, ema, Save()], val_check_interval=4)
    trainer.fit(task, counting_loader(), counting_loader(24))
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert equal(saved["state_dict"], watch.before)
    assert equal(watch.during[0], watch.during[1]) and not equal(watch.during[1], watch.before)  # swapped in again
    assert equal({f"model.{n}": v for n, v in ema.ema_state_dict(trainer).items()}, dict(saved["ema"]["averages"]))


def test_an_error_in_validation_puts_the_weights_back() -> None:
    class Fail(L.Callback):
        def on_validation_batch_end(self, trainer, *args) -> None:
            if trainer.global_step:
                raise RuntimeError("stop")

    watch, task = Watch(), make_task(optim=FAST)
    trainer = make_trainer(4, callbacks=[watch, EMA(), Fail()], val_check_interval=4)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(task, counting_loader(), counting_loader(16))
    assert equal(watch.before, Watch.copy(task))


def test_average_inside_a_with_and_out_again() -> None:
    task, ema = make_task(optim=FAST), EMA(decay=0.9)
    trainer = make_trainer(4, callbacks=ema)
    trainer.fit(task, counting_loader())
    weights, averages = Watch.copy(task), ema.ema_state_dict(trainer)
    with ema.averaged(trainer):
        assert all(torch.equal(p, averages[name]) for name, p in task.model.named_parameters())
    assert equal(weights, Watch.copy(task))


def test_frozen_weights_are_not_averaged() -> None:
    task = make_task(mixins={"scale": ScaleMixin}, trainable=[r"^mixins\.scale"], optim=FAST)
    ema = EMA()
    trainer = make_trainer(3, callbacks=ema)
    trainer.fit(task, counting_loader())
    assert list(ema.ema_state_dict(trainer)) == ["mixins.scale.scale"]


class Stranger(L.LightningModule):
    """A module of somebody else's: tied weights, a compiled part, a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.body = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), backend="eager")
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        ids, targets = batch["input_ids"][:, 0], batch["target_ids"][:, 0]
        return nn.functional.cross_entropy(self.head(self.body(self.embed(ids))), targets)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_strangers_module_with_tied_and_compiled_weights() -> None:
    module, ema, watch = Stranger(), EMA(decay=0.9), Watch()
    trainer = make_trainer(5, callbacks=[ema, watch], val_check_interval=5)
    trainer.fit(module, counting_loader(), counting_loader(16))
    averages = ema.ema_state_dict(trainer)
    assert set(averages) == {
        "embed.weight",
        "head.weight",
        *(f"body.{k}.{w}" for k in (0, 1) for w in ("weight", "bias")),
    }
    assert averages["embed.weight"] is averages["head.weight"] and len(ema._averages) == 5
    assert torch.equal(watch.during[-1]["head.weight"], averages["embed.weight"])
    assert torch.equal(watch.during[-1]["body._orig_mod.1.running_mean"], watch.before["body._orig_mod.1.running_mean"])
    assert equal(watch.before, Watch.copy(module))


def test_another_module_begins_anew_and_the_same_one_goes_on() -> None:
    ema, task = EMA(), make_task(optim=FAST)
    make_trainer(3, callbacks=ema).fit(task, counting_loader())
    make_trainer(2, callbacks=ema).fit(task, counting_loader())
    assert ema.num_updates == 5
    make_trainer(2, callbacks=ema).fit(make_task(optim=FAST), counting_loader())
    assert ema.num_updates == 2


def test_checkpoint_without_an_average_is_said(tmp_path) -> None:
    trainer = make_trainer(3)
    trainer.fit(make_task(optim=FAST), counting_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    ema = EMA()
    with pytest.warns(UserWarning, match="EMA: the checkpoint holds no average; it begins at the weights of step 3."):
        make_trainer(5, callbacks=ema).fit(
            make_task(optim=FAST), counting_loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    assert ema.num_updates == 2


def test_checkpoint_of_other_weights_is_refused(tmp_path) -> None:
    trainer = make_trainer(2, callbacks=EMA())
    trainer.fit(make_task(optim=FAST, frozen=["final_layernorm"]), counting_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    other = make_trainer(2, callbacks=EMA())
    callback = other.callbacks[0]
    callback.setup(other, None, "fit")
    with pytest.raises(
        CheckpointError, match=r"EMA: of model.transformer.final_layernorm.bias the checkpoint averages noth"
    ):
        task = make_task(optim=FAST)
        task.configure_model()
        other.strategy.connect(task)
        callback.on_load_checkpoint(other, task, state)
        callback.on_train_start(other, task)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(decay=1.0), r"decay is 1.0, a number from 0 up to \(not including\) 1; 0.999 is common."),
        (dict(every_n_steps=0), "every_n_steps is 0, it must be at least 1."),
    ],
)
def test_settings_are_checked(settings: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EMA(**settings)


def test_strategies_that_shard_otherwise_are_refused() -> None:
    trainer = make_trainer()
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ConfigError, match="under ZeRO, and not under FSDPStrategy. Use zero_3."):
        EMA().on_train_start(trainer, make_task())


def test_no_average_to_export_is_said() -> None:
    ema, trainer = EMA(), make_trainer()
    trainer.strategy.connect(make_task())
    with pytest.raises(ConfigError, match="EMA: there is no average before training begins"):
        ema.ema_state_dict(trainer)
