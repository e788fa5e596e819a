"""Lightning's own callbacks, unmodified, with our task under each strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger

from sat_lightning.training import count_rows
from tests.training_examples import CountingData, counting_loader, make_task, make_trainer

STRATEGIES = [
    "auto",
    "zero_2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero_0", "zero_1", "zero_3")),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_built_in_callbacks_run_unmodified(strategy: str, tmp_path: Path) -> None:
    # Whatever the loss does, it is above 0: training ends after the second validation without an improvement.
    stopping = EarlyStopping("val_loss", mode="max", patience=2, min_delta=100.0)
    keeping = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_top_k=1)
    timer = Timer(duration="00:01:00:00")
    callbacks = [stopping, keeping, timer, LearningRateMonitor("step"), ModelSummary(2), RichProgressBar()]
    callbacks += [DeviceStatsMonitor(cpu_stats=False), ThroughputMonitor(count_rows, window_size=2)]
    trainer = make_trainer(
        max_steps=20,
        strategy=strategy,
        callbacks=callbacks,
        logger=CSVLogger(tmp_path),
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        val_check_interval=2,
        enable_checkpointing=True,
        enable_model_summary=True,
        enable_progress_bar=True,
    )
    trainer.fit(make_task(), datamodule=CountingData())
    assert stopping.stopped_epoch == 0 and trainer.global_step == 6
    best = Path(keeping.best_model_path)
    assert best.exists() and best.is_dir() == strategy.startswith("zero")
    assert timer.time_elapsed("train") > 0
    header = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-AdamW/decay", "lr-AdamW/no_decay", "val_loss"} <= set(header)
    assert any("device/batches_per_sec" in name for name in header)
    (found,) = trainer.validate(make_task(), datamodule=CountingData(), ckpt_path=str(best), verbose=False)
    assert found["val_loss"] == pytest.approx(float(keeping.best_model_score), rel=1e-5)


def test_a_changing_accumulation_is_refused_where_deepspeed_holds_the_window(tmp_path: Path) -> None:
    arguments = {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "default_root_dir": tmp_path}
    trainer = make_trainer(4, max_epochs=2, **arguments)
    trainer.fit(make_task(), counting_loader(16))
    assert trainer.accumulate_grad_batches == 2
    with pytest.raises(RuntimeError, match="SATDeepSpeedStrategy` does not support `accumulate_grad_batches` changing"):
        make_trainer(4, strategy="zero_2", **arguments).fit(make_task(), counting_loader(16))
