"""The training verbs: Lightning's CLI in subclass mode.

Any LightningModule and any LightningDataModule can be named by class in YAML, ours by their short names.
"""

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sat_lightning.errors import ConfigError, SatError, UsageError
from sat_lightning.training.refusals import explain_refusal

# Packages whose classes a configuration may name without their module.
_OURS = ("sat_lightning.models", "sat_lightning.mixins", "sat_lightning.training")


def run_trainer(verb: str, words: list[str]) -> None:
    """Run a method of Lightning's Trainer on the classes that the options name.

    Args:
        verb: `fit`, `validate`, `test` or `predict`.
        words: options.

    Raises:
        UsageError: an option or a class is not known, or a value does not fit.
        SatError: the run cannot start.
    """
    _share_cores()
    _find_in_current_folder()
    _quieten()
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import SaveConfigCallback

    from sat_lightning.training.resume import SaveConfigAtStart, read_resume

    _import_ours()
    plan = read_resume(words) if verb == "fit" else None
    words = words if plan is None else plan.words
    try:
        _make_cli_class(plan)(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback if plan is None else SaveConfigAtStart,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"logger": _default_logger(words)},
            args=[verb, *words],
        )
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


def _make_cli_class(plan: Any) -> Any:  # noqa: ANN401 - a class of a module that is imported late
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from sat_lightning.training.initialise import init_from
    from sat_lightning.training.module import SATLightningModule
    from sat_lightning.training.resume import begin_resume

    class TrainerCLI(LightningCLI):
        """Lightning's CLI, whose refusals fit on one line."""

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
            return super().init_parser(exit_on_error=False, allow_abbrev=False, **kwargs)

        def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:  # noqa: ANN401
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
            about = "begin with the weights, alone, of a training checkpoint, a model folder or a .safetensors file"
            parser.add_argument("--init_from", type=str | None, default=None, help=about)

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            """Resume and begin with weights behind the back of the configuration, which is saved as a recipe."""
            arguments = super()._prepare_subcommand_kwargs(subcommand)
            config = self.config[subcommand]
            if plan is not None:
                said = yaml.safe_load(self._parser(subcommand).dump(config, skip_none=False))
                begin_resume(plan, self.trainer, said)
                arguments["ckpt_path"] = plan.checkpoint
            if config.get("init_from") and (plan is None or not plan.has_base):
                init_from(self.model, config["init_from"])
            return arguments

        def _parse_ckpt_path(self) -> None:
            """Leave the configuration as it was given: Lightning would let the checkpoint's overrule it unseen."""

        def before_instantiate_classes(self) -> None:
            # A checkpoint is data; Lightning's default would run what a pickle says.
            if self.config[self.subcommand].get("weights_only") is None:
                self.config[self.subcommand]["weights_only"] = True

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
            is_unsaid = self.config[self.subcommand]["trainer"].get("enable_model_summary") is None
            if is_unsaid and isinstance(self.model, SATLightningModule):
                kwargs["enable_model_summary"] = False  # ours prints a table of its own
            return super().instantiate_trainer(**kwargs)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                # A class's own refusal comes wrapped, once for each union of types that could have held the class.
                refusal = next((link for link in _chain(error) if isinstance(link, SatError)), None)
                if refusal is None:
                    raise
                raise refusal from None

    return TrainerCLI


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


def _default_logger(words: list[str]) -> dict[str, Any]:
    """Metrics go to `runs/<name of the first configuration>/version_N`, and all else of a run beside them."""
    configs = [after for word, after in zip(words, words[1:], strict=False) if word in ("--config", "-c")]
    configs += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    name = Path(configs[0]).stem if configs else "run"
    return {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": name}}


def _share_cores() -> None:
    """Let threads that wait for each other give way soon, where others want the cores too.

    GNU OpenMP spins through whole time slices by default; one busy neighbour then costs a CPU run up to nine tenths of
    its speed, and this setting almost nothing on a machine of its own. It counts if torch is not loaded yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _find_in_current_folder() -> None:
    """Let a configuration name the user's own modules, under the console script as under `python -m`."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _import_ours() -> None:
    """Import all modules whose classes have short names: a parser knows the subclasses that exist."""
    for package_name in _OURS:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__, prefix=f"{package_name}."):
            importlib.import_module(module.name)


def _quieten() -> None:
    """Keep advertisements, and warnings that our user can do nothing about, out of the first minute."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
