from __future__ import annotations

import math
import sys
import types

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from sat_lightning.errors import ConfigError
from sat_lightning.training import OptimConfig
from sat_lightning.training.optim import (
    check_kind,
    group_parameters,
    make_adamw,
    make_schedule,
    schedule_factor,
    split_parameters,
)
from tests.training_examples import ScaleMixin, counting_loader, make_model, make_task, make_trainer


def factors(num_steps: int, **settings) -> list[float]:
    return [schedule_factor(step, num_steps, **settings) for step in range(num_steps)]


def test_warmup_rises_in_equal_parts_and_moves_in_the_first_step() -> None:
    rise = factors(100, warmup_steps=4, schedule="constant")
    assert rise[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and rise[-1] == 1.0


def test_linear_falls_from_the_peak_to_the_minimum() -> None:
    fall = factors(11, warmup_steps=0, schedule="linear", minimum_ratio=0.2)
    assert fall == pytest.approx([1 - 0.08 * step for step in range(11)])


def test_cosine_follows_the_formula() -> None:
    fall = factors(105, warmup_steps=4, schedule="cosine", minimum_ratio=0.1)
    assert fall[3] == fall[4] == 1.0
    assert fall[54] == pytest.approx(0.55)
    assert fall[29] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert fall[104] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_edges(schedule: str) -> None:
    assert schedule_factor(1000, 10, 2, schedule, 0.3) == pytest.approx(0.3)  # trained on beyond the end
    assert schedule_factor(0, 1, 0, schedule, 0.3) == 1.0  # a run of one step
    assert schedule_factor(1, 2, 2, schedule, 0.3) == 1.0  # nothing but warm-up
    assert factors(2, warmup_steps=0, schedule=schedule, minimum_ratio=0.0) == [1.0, 0.0]


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)


def test_schedule_scales_the_optimizers_own_rate() -> None:
    optimizer = sgd()
    schedule = make_schedule(optimizer, OptimConfig(schedule="linear", minimum_ratio=0.0, warmup_ratio=0.2), 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5] + [0.5 * (1 - k / 7) for k in range(8)])


@pytest.mark.parametrize(
    ("settings", "num_steps", "text"),
    [
        (dict(warmup_steps=200), 100, "warmup_steps is 200, longer than the run of 100 steps. Lower it, raise"),
        (dict(), math.inf, "a cosine schedule needs the length of the run, and this one has none. Set trainer.max_st"),
        (dict(schedule="constant", warmup_ratio=0.1), math.inf, "needs the length of the run"),
    ],
)
def test_schedule_that_does_not_fit_the_run(settings: dict, num_steps: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_schedule(sgd(), OptimConfig(**settings), num_steps)


def test_constant_schedule_needs_no_end() -> None:
    make_schedule(sgd(), OptimConfig(schedule="constant", warmup_steps=5), math.inf)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            dict(schedule="cosin"),
            "unknown schedule 'cosin', known are cosine, linear, exponential, constant, wsd, inverse_sqrt, sat_linear, "
            "sat_cosine. Did you mean 'cosine'?",
        ),
        (dict(learning_rate=0), "learning_rate is 0, it must be above 0."),
        (dict(weight_decay=-1), "weight_decay is -1, it cannot be negative."),
        (dict(warmup_ratio=2), "warmup_ratio is 2, a fraction from 0 to 1."),
        (dict(betas=(0.9, 1.0)), r"betas are \(0.9, 1.0\), two numbers from 0 up to \(not including\) 1."),
        (dict(warmup_steps=5, warmup_ratio=0.1), "warmup_steps 5 and warmup_ratio 0.1 are both set. Set one."),
        (dict(schedule="exponential", minimum_ratio=0), "an exponential fall never reaches. Set it above 0."),
        (dict(schedule="wsd", cooldown_shape="sqr"), "unknown cooldown_shape 'sqr', known are .* Did you mean 'sqrt'?"),
        (dict(kind="adamw8bit"), "unknown kind 'adamw8bit', known are .* Did you mean 'adamw_8bit'?"),
        (dict(layer_decay=0), "layer_decay is 0, it must be above 0."),
        (dict(layer_decay=1.5), "layer_decay is 1.5, a factor from 0 to 1."),
        (dict(decay_steps=0), "decay_steps is 0, it must be at least 1."),
        (dict(auto_warmup_steps=-1), "auto_warmup_steps is -1, it cannot be negative."),
    ],
)
def test_settings_are_checked(settings: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")):
        OptimConfig(**settings)


def test_norms_biases_and_vectors_do_not_decay() -> None:
    model = make_model(num_layers=1)
    model.add_mixin("scale", ScaleMixin(model.config))
    decay, no_decay = split_parameters(model)
    layer = "transformer.layers.0."
    linears = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    norms = [layer + "input_layernorm", layer + "post_attention_layernorm", "transformer.final_layernorm"]
    assert set(decay) == {f"{layer}{name}.weight" for name in linears} | {
        "transformer.word_embeddings.weight",
        "transformer.position_embeddings.weight",
        "mixins.gpt2-final.lm_head.weight",
    }
    assert set(no_decay) == {f"{layer}{name}.bias" for name in linears} | {
        f"{norm}.{part}" for norm in norms for part in ("weight", "bias")
    } | {"mixins.scale.scale"}


def test_frozen_parameters_are_in_no_group_and_shared_ones_in_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    groups = group_parameters(model)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert [id(p) for p in groups[0]["params"]] == [id(model[0].weight)]
    assert [id(p) for p in groups[1]["params"]] == [id(model[0].bias), id(model[2].bias)]
    assert groups[1]["weight_decay"] == 0.0


def test_nothing_to_optimize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No parameter is trainable, so there is nothing to optimize. Loosen"):
        group_parameters(torch.nn.Linear(2, 2).requires_grad_(False))


def test_trainer_steps_the_schedule_and_logs_both_groups(tmp_path) -> None:
    task = make_task(optim=OptimConfig(learning_rate=0.01, warmup_steps=2, schedule="linear", minimum_ratio=0.5))
    logger = CSVLogger(tmp_path, name=None, version="")
    trainer = make_trainer(
        4, logger=logger, callbacks=LearningRateMonitor(), log_every_n_steps=1, accumulate_grad_batches=2
    )
    trainer.fit(task, counting_loader())
    logger.save()
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    for group in ("decay", "no_decay"):
        column = rows[0].index(f"lr-AdamW/{group}")
        rates = [float(row[column]) for row in rows[1:] if row[column]]
        assert rates[::2] == pytest.approx([0.005, 0.01, 0.01, 0.005])  # one row a micro-batch, two to a step
    optimizer = trainer.optimizers[0]
    assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(("kind", "package"), [("adamw_8bit", "bitsandbytes"), ("adamw_offload", "torchao")])
def test_library_that_is_not_installed_comes_with_its_install_line(monkeypatch, kind: str, package: str) -> None:
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"kind {kind} needs {package}, which cannot .* Run: pip install {package}, "):
        make_trainer(1).fit(make_task(optim=OptimConfig(kind=kind)), counting_loader())


@pytest.mark.parametrize(("kind", "package"), [("adamw_8bit", "bitsandbytes"), ("adamw_offload", "torchao")])
def test_kinds_that_need_a_gpu_say_so_and_get_our_settings(monkeypatch, kind: str, package: str) -> None:
    made = {}

    class Stub(types.ModuleType):
        def __getattr__(self, name: str):
            return lambda *args, **settings: made.update(name=name, args=args, settings=settings)

    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.optim", Stub(f"{package}.optim"))
    config = OptimConfig(kind=kind, learning_rate=0.5, weight_decay=0.25)
    with pytest.raises(ConfigError, match=f"kind {kind} needs all parameters on a GPU. Use kind adamw on other"):
        make_adamw(group_parameters(torch.nn.Linear(2, 2)), config)
    groups = group_parameters(torch.nn.Linear(2, 2))
    for group in groups:
        group["params"] = [types.SimpleNamespace(device=torch.device("cuda"))]
    make_adamw(groups, config)
    expected = dict(lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.25)
    if kind == "adamw_8bit":
        assert made == dict(name="AdamW8bit", args=(groups,), settings=expected)
    else:
        unnamed = [{key: value for key, value in group.items() if key != "name"} for group in groups]
        assert made["name"] == "CPUOffloadOptimizer" and made["settings"] == expected | {"fused": True}
        assert made["args"] == (unnamed, torch.optim.AdamW)


def test_offloaded_kind_is_for_one_device() -> None:
    trainer = make_trainer(1, strategy="zero_2")
    with pytest.raises(
        ConfigError, match="for one device, and the strategy is SATDeepSpeedStrategy. Set .* zero_2_offl"
    ):
        check_kind("adamw_offload", trainer)
    check_kind("adamw", trainer)
    check_kind("adamw_offload", make_trainer(1))


def test_own_optimizer_takes_the_groups_and_the_schedule() -> None:
    task = make_task(
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.3),
        optim=OptimConfig(schedule="linear", minimum_ratio=0.5, betas=(0.8, 0.9)),
    )
    trainer = make_trainer(3)
    with pytest.warns(UserWarning, match="optim: betas are AdamW's, and SGD is used."):
        trainer.fit(task, counting_loader())
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("decay", 0.3),
        ("no_decay", 0.0),
    ]
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_warmup_longer_than_the_run_is_said_before_the_first_step() -> None:
    task = make_task(optim=OptimConfig(warmup_steps=50))
    with pytest.raises(ConfigError, match="longer than the run of 3 steps"):
        make_trainer(3).fit(task, counting_loader())
    L.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False).fit(
        make_task(optim=OptimConfig(warmup_steps=50)), counting_loader()
    )


def test_settings_read_from_a_dict_may_be_few() -> None:
    assert OptimConfig.from_dict({"learning_rate": 0.5}) == OptimConfig(learning_rate=0.5)
    assert OptimConfig.from_dict({"betas": [0.8, 0.9]}).betas == (0.8, 0.9)
