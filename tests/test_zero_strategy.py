"""How a run gets its strategy: by a word, by a class, from a JSON; and what contradicts what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import sat_lightning.training
from sat_lightning.errors import ConfigError
from sat_lightning.training import SATDeepSpeedStrategy, ZeroOptions
from sat_lightning.training.deepspeed import load_deepspeed
from sat_lightning.training.strategies import STRATEGIES
from sat_lightning.training.zero_shards import ShardFiles
from tests.training_examples import counting_loader, make_task, make_trainer
from tests.zero_cases import NUM_STEPS, Case, run_case

ROOT = Path(__file__).resolve().parents[1]


def fit(strategy: object, **arguments: object) -> L.Trainer:
    with TemporaryDirectory() as root:
        trainer = make_trainer(strategy=strategy, default_root_dir=root, **arguments)
        trainer.fit(make_task(), counting_loader(16))
    return trainer


def test_every_name_is_a_strategy_of_lightning() -> None:
    for name in ("zero_0", "zero_1", "zero_2", "zero_3", "zero_2_offload", "zero_3_offload"):
        assert name in StrategyRegistry
        strategy = make_trainer(strategy=name).strategy
        assert isinstance(strategy, SATDeepSpeedStrategy)
        assert strategy.stage == int(name[5])
    assert set(STRATEGIES) <= set(StrategyRegistry.available_strategies())
    assert sat_lightning.training.SATDeepSpeedStrategy is SATDeepSpeedStrategy


def test_names_are_known_after_one_import_which_loads_no_deepspeed() -> None:
    code = (
        "import sys, sat_lightning.training, lightning as L\n"
        "L.Trainer(strategy='zero_2', accelerator='cpu', devices=1, logger=False)\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT, timeout=600)


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        (
            {"gradient_accumulation_steps": 4},
            {"accumulate_grad_batches": 2},
            "gradient_accumulation_steps = 4, the trainer.accumulate_grad_batches is 2",
        ),
        (
            {"gradient_clipping": 1.0},
            {"gradient_clip_val": 0.5},
            "gradient_clipping = 1.0, the trainer.gradient_clip_val is 0.5",
        ),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled = True, the trainer.precision is '32-true'"),
        (
            {"fp16": {"enabled": False}},
            {"precision": "16-mixed"},
            "fp16.enabled = False, the trainer.precision is '16-mixed'",
        ),
        (
            {"train_micro_batch_size_per_gpu": 3},
            {},
            "train_micro_batch_size_per_gpu = 3, the batch size of the data is 8",
        ),
        ({"train_batch_size": 7}, {}, "train_batch_size = 7, the 8 samples x 1 batches x 1 ranks is 8"),
        (
            {"optimizer": {"type": "AdamW"}},
            {},
            "optimizer = 'AdamW', the LanguageModelingTask.configure_optimizers is 'its own'",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "scheduler = 'WarmupLR', the LanguageModelingTask.configure_optimizers is 'its own'",
        ),
    ],
)
def test_contradiction_is_an_error_with_both_values(config: dict, arguments: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match="the DeepSpeed config says") as caught:
        fit(SATDeepSpeedStrategy(config=config), **arguments)
    assert expected in str(caught.value)


def test_stage_of_argument_and_json_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert SATDeepSpeedStrategy(config=path).stage == 1
    assert SATDeepSpeedStrategy().stage == 2
    assert SATDeepSpeedStrategy(3, config={"zero_optimization": {"stage": "auto"}}).stage == 3
    with pytest.raises(ConfigError, match="zero_optimization.stage = 1, the stage of the strategy is 3"):
        SATDeepSpeedStrategy(3, config=path)
    with pytest.raises(ConfigError, match="there is no ZeRO stage 4"):
        SATDeepSpeedStrategy(4)
    with pytest.raises(ConfigError, match="offload_parameters needs stage 3, and the stage is 2"):
        SATDeepSpeedStrategy(2, offload_parameters=True)
    with pytest.raises(ConfigError, match="there is no DeepSpeed config .*missing.json"):
        SATDeepSpeedStrategy(config=tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="reduce_bucket_size is 0, it must be at least 1"):
        ZeroOptions(reduce_bucket_size=0)


def test_json_says_what_nobody_else_says() -> None:
    """`auto` is filled in, silence of the Trainer is no contradiction, and other settings pass through."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.25,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": False,
    }
    strategy = fit(SATDeepSpeedStrategy(config=config), accumulate_grad_batches=2).strategy
    told = strategy.config
    assert told["gradient_clipping"] == 0.25
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (8, 2)
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
    assert told["bf16"] == {"enabled": False} and told["fp16"] == {"enabled": False}


class Odd(L.LightningModule):
    """A stranger's module of five parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("options", [None, ZeroOptions(allgather_bucket_size=3)])
def test_an_odd_number_of_parameters_trains(options: ZeroOptions | None, tmp_path: Path) -> None:
    strategy = "zero_2" if options is None else SATDeepSpeedStrategy(stage=2, options=options)
    trainer = make_trainer(strategy=strategy, max_steps=2, default_root_dir=tmp_path)
    trainer.fit(module := Odd(), torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
    assert trainer.global_step == 2 and module.layer.weight.isfinite().all()
    assert trainer.strategy.config["zero_optimization"]["allgather_bucket_size"] == (6 if options is None else 4)


def test_precisions_that_are_none_are_refused() -> None:
    for strategy, precision in (("zero_2", "16-true"), ("zero_0", "bf16-true"), ("zero_2_offload", "bf16-true")):
        with pytest.raises(ConfigError, match=f"trainer.precision {precision} .* Use .*-mixed"):
            fit(strategy, precision=precision)
    with pytest.raises(ConfigError, match="gradient_clip_algorithm is 'value', and ZeRO clips by norm only"):
        fit("zero_1", gradient_clip_val=0.5, gradient_clip_algorithm="value")


@pytest.mark.parametrize("strategy", ["zero_0", "zero_2"])
def test_fp16_trains_and_is_resumed_with_its_loss_scale(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed takes it on few CPUs; torch computes in it on all, so that the loss scale can be tried anywhere."""
    device = load_deepspeed("cpu").accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="DeepSpeed has no fp16 .* here. Use bf16-mixed"):
        fit(strategy, precision="16-mixed")
    monkeypatch.setattr(device, "is_fp16_supported", lambda: True)
    case = Case(strategy, "16-mixed", 3)
    found = run_case(case, 1, 0, folder=str(tmp_path / "unbroken"))
    assert found["losses"] == pytest.approx(run_case(case.alone(), 1, 0)["losses"], rel=2e-2)
    saved = tmp_path / "unbroken" / "middle.ckpt"
    resumed = run_case(case, 1, 0, folder=str(tmp_path / "resumed"), resume=str(saved))
    assert resumed["losses"] == found["losses"][-len(resumed["losses"]) :]
    facts, again = (
        json.loads((tmp_path / run / "end.ckpt" / "engine.json").read_text()) for run in ("unbroken", "resumed")
    )
    assert facts["loss_scaler"] == again["loss_scaler"] and facts["counters"] == again["counters"]
    assert facts["loss_scaler"]["cur_scale"] == 2.0**16 and facts["loss_scaler"]["cur_iter"] == NUM_STEPS


@pytest.mark.parametrize("strategy", ["zero_2_offload", "zero_3_offload"])
def test_offloading_changes_no_number_and_is_resumed_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    """A window of 3, so that gradients add up on the host too."""
    alone = run_case(Case("zero_2", "32-true", 3), 1, 0)
    unbroken = run_case(Case(strategy, "32-true", 3), 1, 0, folder=str(tmp_path / "unbroken"))
    assert unbroken["losses"] == pytest.approx(alone["losses"], rel=2e-5)
    assert unbroken["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    saved = tmp_path / "unbroken" / "middle.ckpt"
    resumed = run_case(Case(strategy, "32-true", 3), 1, 0, folder=str(tmp_path / "resumed"), resume=str(saved))
    assert resumed["losses"] == unbroken["losses"][-len(resumed["losses"]) :]
    ends = [ShardFiles(tmp_path / run / "end.ckpt") for run in ("unbroken", "resumed")]
    assert all(
        torch.equal(*(end.whole(name, kind) for end in ends)) for name in ends[0].names for kind in ends[0].kinds(name)
    )
