"""`SATDeepSpeedStrategy`: ZeRO 0 to 3 by a word, on CPUs too; the one file that imports deepspeed, and that late."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from sat_lightning.errors import ConfigError
from sat_lightning.training.zero_build import cast_buffers, cast_shards, split_scalars
from sat_lightning.training.zero_checkpoint import load_zero_checkpoint, save_zero_checkpoint
from sat_lightning.training.zero_config import (
    DeepSpeedConfig,
    ZeroOptions,
    engine_config,
    read_config,
    resolve_stage,
    zero_section,
)
from sat_lightning.training.zero_facts import gather_facts, restore_environment
from sat_lightning.training.zero_groups import join_groups

_DEFAULT_OPTIONS = ZeroOptions()
_TIMEOUT = timedelta(minutes=30)
_RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class SATDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO (Rajbhandari et al. 2020), as `zero_0` ... `zero_3`, `zero_2_offload` and `zero_3_offload`.

    Each rank keeps a part of the optimizer's state (stage 1), of the gradients too (2), of the weights too (3); the
    numbers learned are those of one process. What differs from Lightning's strategy: it runs on CPUs; gradients are
    divided by the accumulated batches once, and the last window of an epoch steps like any other; nothing is switched
    on that the Trainer does not say; checkpoints can be resumed on another number of ranks and in another stage.

    Precision: `32-true` is fp32 throughout. `bf16-mixed` and `16-mixed` hold weights and compute in half precision;
    the optimizer updates a sharded fp32 copy, and gradients accumulate in fp32 (in stage 0 in that of the weights).
    `bf16-true` is bf16 throughout, optimizer included.

    Args:
        stage: 0 to 3. Default: that of `config`, or 2.
        offload_optimizer: keep the optimizer's state on the host, and update there.
        offload_parameters: keep the weights on the host (stage 3).
        options: buckets, thresholds and the loss scale.
        config: a DeepSpeed configuration, or the path of its JSON; none is needed. It may say what is not said
            elsewhere, and `"auto"`.
        consolidates: write `model.safetensors` and `model_config.json` into each checkpoint too, as
            `AutoModel.from_pretrained` reads them.
        process_group_backend: default: `nccl` on GPUs, `gloo` on CPUs.
        timeout: of collective operations.

    Raises:
        ConfigError: `config` contradicts the arguments, the Trainer or the module, or DeepSpeed is not installed.
    """

    strategy_name = "zero"

    def __init__(
        self,
        stage: int | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        options: ZeroOptions = _DEFAULT_OPTIONS,
        config: DeepSpeedConfig | None = None,
        consolidates: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = _TIMEOUT,
    ) -> None:
        # Not DeepSpeedStrategy's constructor: it imports deepspeed, which then chooses a device before ours is known.
        DDPStrategy.__init__(self, process_group_backend=process_group_backend, timeout=timeout)
        self.given_config = read_config(config)
        self.stage = resolve_stage(stage, self.given_config)
        if offload_parameters and self.stage != 3:
            raise ConfigError(f"strategy: offload_parameters needs stage 3, and the stage is {self.stage}.")
        self.options = ZeroOptions(**options) if isinstance(options, dict) else options
        self.offload = (offload_optimizer, offload_parameters)
        self.consolidates = consolidates
        self.names_by_group: list[list[str]] = []
        self._environment_before: dict[str, str | None] = {}
        # What the methods of Lightning's strategy read.
        self.config: dict[str, Any] = {"zero_optimization": {"stage": self.stage}}
        self.remote_device = "cpu" if offload_parameters else None
        self.load_full_weights, self.exclude_frozen_parameters = False, False
        self._config_initialized = True

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning says where a window ends, so that the last one of an epoch may be shorter."""
        return False

    def setup_environment(self) -> None:
        """Load deepspeed for the device of the Trainer, and join the ranks."""
        device = self.root_device.type
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"strategy: ZeRO runs on CUDA and on CPUs, and trainer.accelerator is {device}. Use ddp.")
        load_deepspeed(device)
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the ranks."""
        self.set_world_ranks()
        self._environment_before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
        self._init_deepspeed_distributed()
        reset_seed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Split each weight over the ranks as soon as it is made (stage 3)."""
        if self.stage < 3:
            yield
            return
        deepspeed = load_deepspeed(self.root_device.type)
        config = engine_config(self.given_config, self._zero_section(), self.options, gather_facts(self))
        # In fp32 first, see `cast_shards`; and batch sizes play no part in building.
        config |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
        config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
        with split_scalars(deepspeed.zero.Init(remote_device=self.remote_device, config_dict_or_path=config)):
            yield
        cast_shards(self._module, self._dtype)

    def setup(self, trainer: Any) -> None:
        """Wrap the model in DeepSpeed's engine.

        Raises:
            ConfigError: see the class.
        """
        if trainer.gradient_clip_algorithm == "value":
            raise ConfigError(
                "strategy: trainer.gradient_clip_algorithm is 'value', and ZeRO clips by norm only. Set it to 'norm'."
            )
        trainer.accelerator.setup(trainer)
        self.model = self._module
        cast_buffers(self._module, self._dtype)
        if trainer.state.fn == TrainerFn.FITTING:
            self._start_training()
        else:
            self._start_evaluation()
        self.setup_precision_plugin()
        self.barrier()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: `backward` tells the engine whether the window ends."""
        yield

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Compute gradients; Lightning has divided the loss by the accumulated batches already."""
        trainer = self._module.trainer
        is_boundary = not (trainer.fit_loop._should_accumulate() and self._module.automatic_optimization)
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_boundary)
        loss = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        if not is_boundary:
            self.deepspeed_engine.step()  # counts the batch, and does nothing else
        return loss

    @property
    def gradient_norm(self) -> Tensor | float | None:
        """Norm of all gradients at the latest step, before clipping; None before the first."""
        return self.deepspeed_engine.get_global_grad_norm()

    def teardown(self) -> None:
        """Take the engine off the model."""
        engine: Any = self.model
        if hasattr(engine, "destroy"):
            engine.destroy()
        self.model = self.lightning_module
        super().teardown()
        # What told DeepSpeed who is who would mislead the processes that this one starts later.
        restore_environment(self._environment_before)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` writes the weights, which no rank may have whole."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` writes it."""
        return {}

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write a folder that any number of ranks can continue from; see `zero_checkpoint`."""
        save_zero_checkpoint(self, checkpoint, filepath, self.consolidates)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read such a folder, or a file of another strategy, into the engine."""
        return load_zero_checkpoint(self, checkpoint_path, weights_only)

    @property
    def _dtype(self) -> torch.dtype:
        return self.precision_plugin._desired_dtype  # type: ignore[attr-defined]

    @property
    def _module(self) -> Any:  # noqa: ANN401 - it is None only before anything runs
        return self.lightning_module

    def _start_training(self) -> None:
        module = self._module
        optimizer, schedule = None, None
        if is_overridden("configure_optimizers", module):
            optimizer, schedule = self._init_optimizers()
            names = {parameter: name for name, parameter in module.named_parameters()}
            self.names_by_group = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.config = engine_config(self.given_config, self._zero_section(), self.options, gather_facts(self))
        if optimizer is None and "optimizer" not in self.config:
            raise ConfigError(f"strategy: neither {type(module).__name__} nor the DeepSpeed config has an optimizer.")
        trained, inner = [p for p in module.parameters() if p.requires_grad], schedule and schedule.scheduler
        engine, engine_optimizer = self._initialize(module, optimizer, inner, trained, self.config)[:2]
        self.model, self.optimizers = engine, [engine_optimizer]
        join_groups(engine_optimizer)
        engine_schedule, engine.lr_scheduler = engine.lr_scheduler, None  # the Trainer steps it
        if engine_schedule is not None:
            schedule = schedule or LRSchedulerConfig(engine_schedule, interval="step")
            schedule.scheduler = engine_schedule
        self.lr_scheduler_configs = [] if schedule is None else [schedule]

    def _start_evaluation(self) -> None:
        self.optimizers, self.lr_scheduler_configs = [], []
        if self.stage < 3:
            self._module.to(self.root_device, self._dtype)
            return
        self.config = engine_config(self.given_config, self._zero_section(), self.options, gather_facts(self))
        config = {key: value for key, value in self.config.items() if key not in ("optimizer", "scheduler")}
        self.model = self._initialize(self._module, None, None, [], {**config, "gradient_accumulation_steps": 1})[0]

    def _initialize(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        schedule: Any,  # noqa: ANN401
        parameters: list[nn.Parameter],
        config: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        deepspeed, device = load_deepspeed(self.root_device.type), self.root_device
        if config["fp16"]["enabled"] and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise ConfigError("strategy: DeepSpeed has no fp16 (trainer.precision 16-mixed) here. Use bf16-mixed.")
        return deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank if device.index is None else device.index),
            config=config,
            model=model,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=schedule,
            dist_init_required=False,
        )

    def _zero_section(self) -> dict[str, Any]:
        return zero_section(self.stage, self.options, self.offload, gather_facts(self))


def load_deepspeed(device: str) -> ModuleType:
    """Import deepspeed for a kind of device, without its chatter.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        The package.

    Raises:
        ConfigError: it is not installed, or was imported for another device before.
    """
    if "deepspeed" not in sys.modules:
        # It looks at the environment once, while it is imported; afterwards the variable would only mislead others.
        before = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR")}
        try:
            if device == "cpu":
                os.environ["DS_ACCELERATOR"] = "cpu"
            deepspeed = importlib.import_module("deepspeed")
        except ImportError as error:
            raise ConfigError(f"strategy: ZeRO needs DeepSpeed ({error}). Run `pip install deepspeed`.") from error
        finally:
            restore_environment(before)
        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # It would be a minute of C++ compiling, for a collective of inference that training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed = importlib.import_module("deepspeed")
    if (name := deepspeed.accelerator.get_accelerator()._name) != device:
        raise ConfigError(f"strategy: deepspeed was imported for {name}, and trainer.accelerator is {device}.")
    return deepspeed
