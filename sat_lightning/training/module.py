"""`SATLightningModule`: everything of a training run but the loss of a batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.mixins.no_mixin import NoMixin
from sat_lightning.model import AnyModel, BaseMixin
from sat_lightning.model.composed import owner_of
from sat_lightning.model.unfinished_kernels import drop_unfinished_kernels
from sat_lightning.training.callbacks.exact_resume import ExactResume
from sat_lightning.training.callbacks.gradient_norm import GradientNorm
from sat_lightning.training.callbacks.save_on_signal import SaveOnSignal
from sat_lightning.training.flops import count_flops
from sat_lightning.training.freezing import freeze_base, freeze_parameters
from sat_lightning.training.groups import freeze_by_rules, group_parameters, scale_learning_rates
from sat_lightning.training.optim import OptimConfig, OptimizerFactory, check_kind, make_adamw, make_schedule
from sat_lightning.training.runs import is_trial, total_steps
from sat_lightning.training.steps import StepModule
from sat_lightning.training.summary import report_run

ModelFactory = Callable[[], AnyModel]
MixinFactory = Callable[[TransformerConfig], BaseMixin]

_DEFAULT_OPTIM = OptimConfig()


class SATLightningModule(StepModule):
    """A model, its mixins and its optimizer as a Lightning module; a task overrides `forward_step`, nothing else.

    Logged are `train_loss` (the mean since it was last logged, every `log_every_n_steps`), `val_loss` and `test_loss`
    (exact means over all targets of all ranks), and whatever else `forward_step` returns, as `<stage>_<name>`; of
    several validation sets with names, each under its own too, as `val_loss/<set>`.

    Args:
        model: builds the model; called in `configure_model`, so that a sharding strategy can build it in pieces. A
            model that stands already will do too.
        mixins: builders of mixins to add, by name; each receives the configuration of the model that holds it.
            `NoMixin` removes the mixin of that name: a head that another one replaces. A second `--config` that lists
            mixins replaces the first one's, so a model's own mixins belong in its class.
        trainable: regular expressions over parameter names; only what matches trains. Default: everything, or where a
            mixin is a method of fine-tuning, such mixins and heads. See `freeze_base` and `freeze_parameters`.
        frozen: regular expressions over parameter names; what matches does not train, also inside `trainable`.
        compile: compile the model in place; a dict holds arguments of `torch.compile`.
        optimizer: builds an optimizer from parameter groups, instead of AdamW.
        optim: settings of AdamW, and of the parameter groups and the schedule of any optimizer.
    """

    model: AnyModel
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
        self._flops: dict[tuple[int, int, bool], int] = {}
        if isinstance(model, AnyModel):
            self._finish(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call the model."""
        return self._built_model()(*args, **kwargs)

    def configure_callbacks(self) -> list[Callback]:
        """Bring along what a run survives by, except for what the trainer has already.

        Returns:
            `ExactResume` and `SaveOnSignal`, and `GradientNorm` where gradients are clipped.
        """
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        needed: list[type[Callback]] = [ExactResume, SaveOnSignal]
        if self.trainer.gradient_clip_val:
            needed.append(GradientNorm)
        return [kind() for kind in needed if not any(isinstance(callback, kind) for callback in present)]

    def configure_model(self) -> None:
        """Build the model, add the mixins, freeze and compile; a second call changes nothing.

        Raises:
            ConfigError: a pattern of `trainable` or `frozen` matches nothing.
            DataError: the data does not fit the model.
        """
        if not self._is_built:
            model = self._model_factory()
            if not isinstance(model, AnyModel):
                raise ConfigError(
                    f"model builds a {type(model).__name__}, it must build a BaseModel or a ComposedModel."
                )
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
            ConfigError: nothing is trainable, a rule fits nothing, or the schedule does not fit the run.
        """
        groups = group_parameters(self, self.optim.groups, self.optim.layer_decay, prefix="model.")
        if self._optimizer_factory is None:
            check_kind(self.optim.kind, self.trainer)
            # Lightning refuses to clip what a fused optimizer could unscale by itself (fp16; it asks in bf16 as well).
            clips_mixed = self.trainer.precision in ("16-mixed", "bf16-mixed") and bool(self.trainer.gradient_clip_val)
            optimizer = make_adamw(groups, self.optim, fused=not clips_mixed)
        else:
            optimizer = self._optimizer_factory(groups)
            if unused := self.optim.unused_with_own_optimizer:
                rank_zero_warn(f"optim: {', '.join(unused)} are AdamW's, and {type(optimizer).__name__} is used.")
        scale_learning_rates(optimizer.param_groups)
        schedule = make_schedule(optimizer, self._optim_of_run(), total_steps(self.trainer) or math.inf)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Say what trains, and what a step holds."""
        report_run(self.trainer, self._built_model())

    def on_train_epoch_start(self) -> None:
        """Count operations anew: callbacks that freeze and unfreeze do so now."""
        self._flops.clear()

    @property
    def flops_per_batch(self) -> int:
        """Estimated operations of the latest batch, for model FLOPs utilisation; the formula stands in `flops.py`."""
        key = (*self._batch_shape, self.trainer.training)
        if key not in self._flops:
            num_rows, length, is_training = key
            self._flops[key] = count_flops(self._built_model(), num_rows, length, is_training=is_training)
        return self._flops[key]

    def _finish(self, model: AnyModel) -> None:
        if not model.training:  # from_pretrained builds for inference, and Lightning leaves the mode as it is
            model.train()
        added = []
        for name, factory in self._mixin_factories.items():
            mixin = factory(owner_of(model, name).config)
            if isinstance(mixin, NoMixin):
                model.del_mixin(name)
            else:
                model.add_mixin(name, mixin)
                added.append(name)
        model.reinit(added)
        if self._trainable is None:
            freeze_base(model, added)
        freeze_parameters(model, self._trainable, self._frozen)
        freeze_by_rules(model, self.optim.groups)
        self.model = model
        if self._compile_options:
            options = self._compile_options if isinstance(self._compile_options, dict) else {}
            if options.get("backend", "inductor") == "inductor":
                drop_unfinished_kernels()  # of a run that was stopped while it compiled, and goes on here
            # In place, so that no wrapper's name enters a checkpoint.
            model.compile(**options)

    @property
    def _is_built(self) -> bool:
        return "model" in self._modules

    def _built_model(self) -> AnyModel:
        if not self._is_built:
            raise ConfigError("The model is built in configure_model(), which the Trainer calls. Call it first.")
        return self.model

    def _optim_of_run(self) -> OptimConfig:
        """A run of a few steps to try things out has no room for a warm-up, and does not need one."""
        return replace(self.optim, warmup_steps=0) if is_trial(self.trainer) else self.optim
