"""How fast a run trains, where its time goes and what memory it takes."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from torch import Tensor

from sat_lightning.training.runs import is_logging_step, logged_step
from sat_lightning.training.throughput import count_rows, count_tokens

#: Dense bf16 and fp16 products a second by the makers' data sheets, of devices that Lightning's table lacks, or has
#: with the rate of sparse matrices, which is twice as high; fp32 through TF32 runs at half of it.
_PEAK_FLOPS = {"h200 nvl": 835.5e12, "h200": 989.5e12, "h100 nvl": 835.5e12, "b200": 2250e12, "mi300x": 1307.4e12}
_GIB = 2.0**30

Count = Callable[[Any], int]


class RunMonitor(L.Callback):
    """Log throughput, model FLOPs utilisation, memory and time spent waiting for data, at the steps loggers want.

    The names are those of Lightning's `ThroughputMonitor`: `train/device/items_per_sec` (tokens),
    `train/device/samples_per_sec`, `train/device/batches_per_sec`, `train/device/flops_per_sec` and
    `train/device/mfu` (where the module has `flops_per_batch`), all of them without `device/` too on several devices,
    and `train/time`, `train/batches`, `train/samples`, `train/lengths` since the run began. Rates are over the steps
    since they were last logged, validation left out, and over what the batches of all ranks really held. Beside them:

    - `train/device/data_wait_fraction`: share of the time in which the slowest rank's loader kept it waiting;
    - `train/device/memory_gib`: the most that one device has allocated so far (CUDA only);
    - `train/host/memory_gib`: the most that one process holds now, in RAM.

    Other than Lightning's it waits for the device, and the ranks meet, only at a step that is logged. It works with any
    LightningModule.

    Args:
        available_flops: what a device could do per second, for MFU. Default: the data sheet's for dense matrices of
            the trainer's precision, if the device is known.
        batch_size_fn: samples of a batch.
        length_fn: items of a batch.
    """

    def __init__(
        self, available_flops: float | None = None, batch_size_fn: Count = count_rows, length_fn: Count = count_tokens
    ) -> None:
        super().__init__()
        self.available_flops = available_flops
        self._count_rows, self._count_items = batch_size_fn, length_fn
        self._throughput: Throughput | None = None
        self._counts = [0, 0, 0, 0]  # batches, samples, items and operations of this rank since the last log
        self._totals = [0.0, 0.0, 0.0]  # the first three, of the mean rank, since the run began
        self._began, self._paused, self._logged, self._asked, self._waited = 0.0, 0.0, 0.0, 0.0, 0.0
        self._watched: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        device = trainer.strategy.root_device
        flops = self.available_flops or peak_flops(device, str(trainer.precision))
        # Two ends of one interval: from the step logged last to this one.
        self._throughput = Throughput(available_flops=flops, world_size=trainer.world_size, window_size=2)
        self._throughput.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)
        self._counts, self._totals = [0, 0, 0, 0], [0.0, 0.0, 0.0]
        self._watch(trainer.fit_loop.epoch_loop)
        self._began, self._logged, self._waited = time.perf_counter(), 0.0, 0.0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Count the batch, and log when it is time."""
        flops = getattr(pl_module, "flops_per_batch", 0)
        for index, count in enumerate((1, self._count_rows(batch), self._count_items(batch), flops)):
            self._counts[index] += count
        if is_logging_step(trainer):
            self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        self._began += time.perf_counter() - self._paused

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        if self._watched is not None:
            del self._watched._on_before_fetch, self._watched._on_after_fetch
            self._watched = None

    def _log(self, trainer: L.Trainer) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._began
        throughput, interval = self._throughput, seconds - self._logged
        if throughput is None or interval <= 0:
            return
        memory = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else 0.0
        own = [*self._counts, self._waited, memory, resident_bytes() / _GIB]
        self._counts, self._waited = [0, 0, 0, 0], 0.0
        ranks = _gather(trainer, own)
        means, most = ranks.mean(0).tolist(), ranks.amax(0).tolist()
        self._logged = seconds
        self._totals = [total + new for total, new in zip(self._totals, means[:3], strict=True)]
        batches, samples, items = self._totals
        values: dict[str, Any] = {"batches": batches, "samples": samples, "lengths": items, "flops": means[3] or None}
        throughput.update(time=seconds, **values)
        metrics = dict(throughput.compute())
        metrics["device/data_wait_fraction"] = min(1.0, most[4] / interval)
        metrics |= {"device/memory_gib": most[5]} if device.type == "cuda" else {}
        metrics["host/memory_gib"] = most[6]
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in metrics.items()}, step=logged_step(trainer))

    def _watch(self, loop: Any) -> None:  # noqa: ANN401 - a loop of Lightning's
        """Listen to where the loop, for the sake of profilers, says that it fetches a batch."""
        if loop is self._watched:
            return
        before, after = loop._on_before_fetch, loop._on_after_fetch

        def begin() -> None:
            self._asked = time.perf_counter()
            before()

        def end() -> None:
            self._waited += time.perf_counter() - self._asked
            after()

        loop._on_before_fetch, loop._on_after_fetch = begin, end
        self._watched = loop


def _gather(trainer: L.Trainer, values: list[float]) -> Tensor:
    """Bring one row of numbers of each rank together: `[ranks, values]`."""
    device = trainer.strategy.root_device
    own = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    return trainer.strategy.all_gather(own).view(-1, len(values)).cpu()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return what a device could do per second if it multiplied large dense matrices and did nothing else.

    Args:
        device: a CPU has no number that would mean anything.
        precision: the trainer's, such as `bf16-mixed`.

    Returns:
        Floating point operations per second; None if unknown.
    """
    if device.type != "cuda":
        return None
    name, is_half = torch.cuda.get_device_name(device).lower(), precision.startswith(("bf16", "16"))
    known = next((peak for chip, peak in _PEAK_FLOPS.items() if chip in name), None)
    if known is not None and is_half:
        return known
    if known is not None and precision.startswith("32") and torch.get_float32_matmul_precision() != "highest":
        return known / 2
    dtypes = {"bf16": torch.bfloat16, "16-m": torch.float16, "16-t": torch.float16, "64-t": torch.float64}
    return get_available_flops(device, dtypes.get(precision[:4], torch.float32))


def resident_bytes() -> float:
    """Return the RAM this process holds now; where the system does not tell, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return float(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
