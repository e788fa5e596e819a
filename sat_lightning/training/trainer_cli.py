"""The training verbs: Lightning's CLI in subclass mode.

Any LightningModule and any LightningDataModule can be named by class in YAML, ours by their short names.
"""

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

from sat_lightning.errors import ConfigError

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
    from sat_lightning.training.trainer_class import TrainerCLI

    _import_ours()
    plan = read_resume(words) if verb == "fit" else None
    words = words if plan is None else plan.words
    try:
        TrainerCLI(
            plan,
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
    warnings.filterwarnings("ignore", message=r".*torch.distributed.* is deprecated", module="torch|lightning")
    # Our metrics are means over all ranks before they are logged; Lightning cannot know.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(train|val|test)_")
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
