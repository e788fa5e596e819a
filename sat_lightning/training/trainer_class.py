"""The class of the training verbs: Lightning's CLI, with errors of one line, resuming, and weights to begin with."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from sat_lightning.errors import SatError, UsageError
from sat_lightning.training.callbacks.predictions import PredictionWriter
from sat_lightning.training.checkpoints import CONFIG_NAME, find_resume_checkpoint
from sat_lightning.training.initialise import init_from
from sat_lightning.training.module import SATLightningModule
from sat_lightning.training.refusals import explain_refusal
from sat_lightning.training.resume import Resumption, begin_resume


class TrainerCLI(LightningCLI):
    """Lightning's CLI, whose refusals fit on one line.

    Args:
        plan: of a run that goes on.
        *args: of `LightningCLI`.
        **kwargs: of `LightningCLI`.
    """

    def __init__(self, plan: Resumption | None, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.plan = plan
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        """Let errors be raised, and no option be abbreviated."""
        return super().init_parser(exit_on_error=False, allow_abbrev=False, **kwargs)

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Read the words, and say on one line what is wrong with them."""
        with _every_deprecation(), warnings.catch_warnings():
            # A nested parser completes a misspelt option to one that begins so; we want to hear of it.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("error", message="(?s).*was expanded to")
            try:
                self.config = parser.parse_args(args)
            except (ArgumentError, DeprecationWarning) as error:
                options = [action.dest for action in self._subcommand_parsers[args[0]]._actions]
                raise UsageError(explain_refusal(str(error), options)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--init_from`."""
        about = "begin with the weights, alone, of a training checkpoint, a model folder or a .safetensors file"
        parser.add_argument("--init_from", type=str | None, default=None, help=about)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resume and begin with weights behind the back of the configuration, which is saved as a recipe."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        config = self.config[subcommand]
        run = arguments.get("ckpt_path")
        if run and (Path(run) / CONFIG_NAME).is_file():
            if subcommand == "fit":
                raise UsageError(f"--ckpt_path names one checkpoint, and {run} is a run. Go on with it by --resume.")
            arguments["ckpt_path"] = str(find_resume_checkpoint(run))
        if self.plan is not None:
            said = yaml.safe_load(self._parser(subcommand).dump(config, skip_none=False))
            begin_resume(self.plan, self.trainer, said)
            arguments["ckpt_path"] = self.plan.checkpoint
        if subcommand == "predict" and arguments.get("return_predictions") is None:
            writers = [each for each in self.trainer.callbacks if isinstance(each, BasePredictionWriter)]  # type: ignore[attr-defined]
            # What is written batch by batch need not be kept.
            arguments["return_predictions"] = any(each.interval.on_epoch for each in writers)
        if config.get("init_from") and (self.plan is None or not self.plan.has_base):
            init_from(self.model, config["init_from"])
        elif subcommand != "fit" and not arguments.get("ckpt_path"):
            rank_zero_warn(
                f"{subcommand}: neither --ckpt_path nor --init_from is given, so the weights are those that the "
                "configuration builds: random, unless its model reads some."
            )
        return arguments

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it was given: Lightning would let the checkpoint's overrule it unseen."""

    def before_instantiate_classes(self) -> None:
        """Have checkpoints read safely, and leave a recipe's bar out where none is wanted."""
        settings = self.config[self.subcommand]["trainer"]
        if settings.get("enable_progress_bar") is False and isinstance(settings.get("callbacks"), list):
            settings["callbacks"] = [each for each in settings["callbacks"] if not _is_bar(each)]
        # A checkpoint is data; Lightning's default would run what a pickle says.
        if self.config[self.subcommand].get("weights_only") is None:
            self.config[self.subcommand]["weights_only"] = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """Leave Lightning's table of parameters out where ours is shown, and have predictions written."""
        is_unsaid = self.config[self.subcommand]["trainer"].get("enable_model_summary") is None
        if is_unsaid and isinstance(self.model, SATLightningModule):
            kwargs["enable_model_summary"] = False  # ours prints a table of its own
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.subcommand == "predict" and not any(isinstance(each, BasePredictionWriter) for each in callbacks):
            callbacks.append(PredictionWriter())  # nobody would see what was predicted
        return trainer

    def instantiate_classes(self) -> None:
        """Pass a class's own refusal on, unwrapped."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # A class's own refusal comes wrapped, once for each union of types that could have held the class.
            refusal = next((link for link in _chain(error) if isinstance(link, SatError)), None)
            if refusal is None:
                raise
            raise refusal from None


def _is_bar(callback: Any) -> bool:  # noqa: ANN401 - of jsonargparse
    """Tell whether an entry of `callbacks` is a progress bar."""
    path = callback.get("class_path", "") if hasattr(callback, "get") else ""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    return isinstance(kind, type) and issubclass(kind, ProgressBar)


@contextmanager
def _every_deprecation() -> Iterator[None]:
    """Let jsonargparse give each of its warnings every time, and none about how often it gives them."""
    name = "JSONARGPARSE_DEPRECATION_WARNINGS"
    before, os.environ[name] = os.environ.get(name), "all"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
