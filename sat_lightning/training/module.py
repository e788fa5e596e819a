"""`SATLightningModule`: everything of a training run but the loss of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from sat_lightning.config import TransformerConfig
from sat_lightning.data import IGNORED_TARGET
from sat_lightning.errors import ConfigError
from sat_lightning.model import BaseMixin, BaseModel
from sat_lightning.training.averages import WeightedMeans
from sat_lightning.training.freezing import describe_trainable, freeze_parameters
from sat_lightning.training.optim import OptimConfig, OptimizerFactory, group_parameters, make_adamw, make_schedule
from sat_lightning.training.runs import is_trial
from sat_lightning.training.throughput import count_flops, count_rows, count_tokens

ModelFactory = Callable[[], BaseModel]
MixinFactory = Callable[[TransformerConfig], BaseMixin]
Step = Tensor | tuple[Tensor, dict[str, Tensor]]

_DEFAULT_OPTIM = OptimConfig()


class SATLightningModule(L.LightningModule):
    """A model, its mixins and its optimizer as a Lightning module; a task overrides `forward_step`, nothing else.

    Logged are `train_loss` (the mean since it was last logged, every `log_every_n_steps`), `val_loss` and `test_loss`
    (exact means over all targets of all ranks), and whatever else `forward_step` returns, as `<stage>_<name>`; of
    several validation sets with names, each under its own too, as `val_loss/<set>`.

    Args:
        model: builds the model; called in `configure_model`, so that a sharding strategy can build it in pieces. A
            model that stands already will do too.
        mixins: builders of mixins to add, by name; each receives the model's configuration. A second `--config` that
            lists mixins replaces the first one's, so a model's own mixins belong in its class.
        trainable: regular expressions over parameter names; only what matches trains. See `freeze_parameters`.
        frozen: regular expressions over parameter names; what matches does not train, also inside `trainable`.
        compile: compile the model in place; a dict holds arguments of `torch.compile`.
        optimizer: builds an optimizer from parameter groups, instead of AdamW.
        optim: settings of AdamW, and of the schedule of any optimizer.
    """

    model: BaseModel
    """The model with its mixins, once `configure_model` has run; None before."""

    def __init__(
        self,
        model: ModelFactory,
        mixins: dict[str, MixinFactory] | None = None,
        trainable: list[str] | None = None,
        frozen: list[str] | None = None,
        compile: bool | dict[str, Any] = False,
        optimizer: OptimizerFactory | None = None,
        optim: OptimConfig = _DEFAULT_OPTIM,
    ) -> None:
        super().__init__()
        self.optim = OptimConfig.from_dict(optim) if isinstance(optim, Mapping) else optim
        # From the command line these are the words of the YAML, and a checkpoint rebuilds the whole task from them.
        # From Python, builders are objects, which a safely read checkpoint cannot hold: they are to be given again.
        is_from_words = _given_hyperparameters.get() is not None
        self.save_hyperparameters(
            ignore=[] if is_from_words else ["model", "mixins", "optimizer", "optim"], logger=False
        )
        if not is_from_words:
            self.save_hyperparameters({"optim": asdict(self.optim)}, logger=False)
        self.model = None  # type: ignore[assignment]
        self._model_factory = model
        self._mixin_factories = dict(mixins or {})
        self._trainable, self._frozen = trainable, frozen
        self._compile_options = compile
        self._optimizer_factory = optimizer
        self._train_means = WeightedMeans()
        self._epoch_means: dict[int, WeightedMeans] = {}
        self.evaluated_set: str | None = None
        self._batch_shape = (0, 0)
        if isinstance(model, BaseModel):
            self._finish(model)

    def forward_step(self, batch: Any) -> Step:  # noqa: ANN401
        """Compute the loss of one batch; a task overrides this.

        Args:
            batch: what the data module gives.

        Returns:
            The loss, or the loss and other scalars to log by name: means over the targets of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward_step(self, batch), returning the loss.")

    def count_targets(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return how much a batch counts in a mean; override it where a batch has no `target_ids`.

        Args:
            batch: what the data module gives.

        Returns:
            A scalar: the number of `target_ids` that are not -100, or without them the number of rows.
        """
        if isinstance(batch, Mapping) and "target_ids" in batch:
            return (batch["target_ids"] != IGNORED_TARGET).sum()
        return torch.tensor(count_rows(batch))

    def summarise(self, stage: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Derive further metrics from the means of a whole epoch; a task may override this.

        Args:
            stage: `val` or `test`.
            means: `loss` and whatever `forward_step` returned.

        Returns:
            More to log, by name, without the stage.
        """
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the model."""
        return self._built_model()(*args, **kwargs)

    def configure_model(self) -> None:
        """Build the model, add the mixins, freeze and compile; a second call changes nothing.

        Raises:
            ConfigError: a pattern of `trainable` or `frozen` matches nothing.
            DataError: the data does not fit the model.
        """
        if not self._is_built:
            model = self._model_factory()
            if not isinstance(model, BaseModel):
                raise ConfigError(f"model builds a {type(model).__name__}, it must build a BaseModel.")
            self._finish(model)
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(datamodule, "check_model"):
            config = self._built_model().config
            length = config.max_sequence_length
            datamodule.check_model(vocab_size=config.vocab_size, max_sequence_length=length)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over what is trainable, and its schedule over optimizer steps.

        Returns:
            Both, in Lightning's form.

        Raises:
            ConfigError: nothing is trainable, or the schedule does not fit the run.
        """
        groups = group_parameters(self)
        if self._optimizer_factory is None:
            # Lightning refuses to clip what a fused optimizer unscales (fp16).
            clips_fp16 = self.trainer.precision == "16-mixed" and bool(self.trainer.gradient_clip_val)
            optimizer: Optimizer = make_adamw(groups, self.optim, fused=not clips_fp16)
        else:
            optimizer = self._optimizer_factory(groups)
            if unused := self.optim.unused_with_own_optimizer:
                rank_zero_warn(f"optim: {', '.join(unused)} are AdamW's, and {type(optimizer).__name__} is used.")
        schedule = make_schedule(optimizer, self._optim_of_run(), self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Say which parameters train."""
        rank_zero_info(describe_trainable(self._built_model()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Return the loss of a batch, and log when it is time."""
        loss, values = self._run(batch)
        self._train_means.add(values, self.count_targets(batch))
        if self._logs_after(batch_idx):
            self._log_train_means()
        return loss

    def on_train_epoch_end(self) -> None:
        """Log what no step has logged, so that no step is lost and short runs have a loss too."""
        if self._train_means:
            self._log_train_means()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Add a batch to the means of the epoch."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Add a batch to the means of the epoch."""
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        """Return the loss and the other scalars of a batch, by name."""
        return self._run(batch)[1]

    def on_validation_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self._log_epoch_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self._log_epoch_means("test")

    @property
    def flops_per_batch(self) -> int:
        """Estimated operations of the latest batch, which `ThroughputMonitor` turns into model FLOPs utilisation."""
        return count_flops(self._built_model(), *self._batch_shape, is_training=self.trainer.training)

    def _finish(self, model: BaseModel) -> None:
        for name, factory in self._mixin_factories.items():
            model.add_mixin(name, factory(model.config))
        model.reinit(list(self._mixin_factories))
        freeze_parameters(model, self._trainable, self._frozen)
        self.model = model
        if self._compile_options:
            # In place, so that no wrapper's name enters a checkpoint.
            model.compile(**(self._compile_options if isinstance(self._compile_options, dict) else {}))

    @property
    def _is_built(self) -> bool:
        return "model" in self._modules

    def _built_model(self) -> BaseModel:
        if not self._is_built:
            raise ConfigError("The model is built in configure_model(), which the Trainer calls. Call it first.")
        return self.model

    def _optim_of_run(self) -> OptimConfig:
        """A run of a few steps to try things out has no room for a warm-up, and does not need one."""
        return replace(self.optim, warmup_steps=0) if is_trial(self.trainer) else self.optim

    def _run(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ANN401
        num_rows = count_rows(batch)
        self._batch_shape = (num_rows, count_tokens(batch) // max(1, num_rows))
        step = self.forward_step(batch)
        loss, metrics = step if isinstance(step, tuple) else (step, {})
        return loss, {"loss": loss.detach()} | {name: torch.as_tensor(value) for name, value in metrics.items()}

    def _logs_after(self, batch_idx: int) -> bool:
        """Whether the optimizer steps after this batch, and the trainer's loggers want that step."""
        trainer = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return False
        interval: int = 1 if is_trial(trainer) else trainer.log_every_n_steps  # type: ignore[attr-defined]
        return interval > 0 and (trainer.global_step + 1) % interval == 0

    def _log_train_means(self) -> None:
        means = self._train_means.pop(self.trainer.strategy)
        self.log_dict({f"train_{name}": mean for name, mean in means.items()}, prog_bar=True, batch_size=1)

    def _evaluate(self, batch: Any, dataloader_idx: int) -> None:  # noqa: ANN401
        values = self._run(batch)[1]
        self._epoch_means.setdefault(dataloader_idx, WeightedMeans()).add(values, self.count_targets(batch))

    def _log_epoch_means(self, stage: str) -> None:
        epoch_means, self._epoch_means = self._epoch_means, {}
        names = self._set_names(stage)
        if len(epoch_means) > 1 and len(names) == len(epoch_means):
            epoch_means[-1] = WeightedMeans.union(epoch_means.values())
        for index, weighted in sorted(epoch_means.items()):
            means = weighted.pop(self.trainer.strategy)
            self.evaluated_set = names[index] if index >= 0 and -1 in epoch_means else None
            is_whole = index < 0 or len(epoch_means) == 1
            suffix = "" if is_whole else f"/{self.evaluated_set or f'dataloader_idx_{index}'}"
            named = {f"{stage}_{name}{suffix}": value for name, value in (means | self.summarise(stage, means)).items()}
            self.log_dict(named, prog_bar=True, batch_size=1, add_dataloader_idx=False)

    def _set_names(self, stage: str) -> list[str]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        is_named = hasattr(datamodule, "set_names")
        return datamodule.set_names("validation" if stage == "val" else stage) if is_named else []
