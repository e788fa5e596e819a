"""The command line: `sat-lightning`, or `python -m sat_lightning`.

Training verbs are Lightning's CLI in subclass mode: any LightningModule and any LightningDataModule, named by class in
YAML, ours by their short names. Our other verbs are one line each in `VERBS`. Nothing heavy is imported before a verb
is known, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from sat_lightning import __version__
from sat_lightning.errors import CheckpointError, ConfigError, DataError, HookError, SatError, nearest

PROGRAM = "sat-lightning"

#: What each verb does, and the function that does it, as module:name; it receives the verb and the words after it.
VERBS: dict[str, tuple[str, str]] = {
    "fit": ("train a model, from the beginning or from a checkpoint", "sat_lightning.cli:run_trainer"),
    "validate": ("measure a model on the validation split", "sat_lightning.cli:run_trainer"),
    "test": ("measure a model on the test split", "sat_lightning.cli:run_trainer"),
    "predict": ("run a model over the test split", "sat_lightning.cli:run_trainer"),
}

HELP = """usage: {program} VERB [options]

{verbs}

  {program} fit --config recipes/gpt2_quickstart.yaml            train by a recipe
  {program} fit --config ... --data.path my.txt                  change any value of it
  {program} fit --config ... --print_config                      show the whole configuration
  {program} VERB --help                                          all options of a verb
  {program} --version
"""

# Packages whose classes a configuration may name without their module.
_OURS = ("sat_lightning.models", "sat_lightning.mixins", "sat_lightning.training")


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the words after the program's name. Default: those of the process.

    Raises:
        SystemExit: with code 2 for a command that cannot be understood, 1 for a run that cannot start; the reason
            stands on one line of stderr.
    """
    words = sys.argv[1:] if args is None else list(args)
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS)) + 3
        verbs = "\n".join(f"  {name:<{width}}{description}" for name, (description, _) in VERBS.items())
        sys.stdout.write(HELP.format(program=PROGRAM, verbs=verbs))
    elif verb == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
    elif verb not in VERBS:
        _fail(f"there is no verb '{verb}', only {', '.join(VERBS)}.{nearest(verb, VERBS)}")
    else:
        module, _, function = VERBS[verb][1].partition(":")
        getattr(importlib.import_module(module), function)(verb, words[1:])


def run_trainer(verb: str, words: list[str]) -> None:
    """Run a method of Lightning's Trainer on the classes that the options name.

    Args:
        verb: `fit`, `validate`, `test` or `predict`.
        words: options.

    Raises:
        SystemExit: see `main`.
    """
    _share_cores()
    _find_in_current_folder()
    _quieten()
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule

    _import_ours()
    try:
        _make_cli_class()(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"logger": _default_logger(words)},
            args=[verb, *words],
        )
    except (ConfigError, HookError, DataError, CheckpointError, MisconfigurationException) as error:
        _fail(" ".join(str(error).split()), verb=verb, code=1, cause=error)


def _make_cli_class() -> Any:  # noqa: ANN401 - a class of a module that is imported late
    from jsonargparse import ArgumentError, ArgumentParser
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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
                    _fail(explain_refusal(str(error), options), verb=args[0], cause=error)

        def _parse_ckpt_path(self) -> None:
            """Leave the configuration as it was given: Lightning would let the checkpoint's overrule it unseen."""

        def before_instantiate_classes(self) -> None:
            # A checkpoint is data; Lightning's default would run what a pickle says.
            if self.config[self.subcommand].get("weights_only") is None:
                self.config[self.subcommand]["weights_only"] = True

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


def explain_refusal(text: str, options: Iterable[str] = ()) -> str:
    """Say in one line what jsonargparse refused, and what was probably meant.

    Args:
        text: its message: nested, with one alternative of each union a line.
        options: known options of the verb.

    Returns:
        Where, what, and the nearest known word.
    """
    # The message descends from key to key, and for a union of types lists what each alternative would not take.
    keys = [key for line in text.splitlines() if (key := _first(r'Parser key "([^"]+)":', line))]
    where = ".".join(keys) + ": " if keys else ""
    classes = [name for name in re.findall(r"class_path[ =]'([\w.]+)'", text) if "." in name]
    if expanded := re.search(r"Option '--(\S+)' was expanded to '--(\S+)'", text):
        return f"{where}there is no option '{expanded[1]}'. Did you mean '{expanded[2]}'?"
    if option := _first(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.+-]+)", text):
        words = list(_option_names(classes)) or list(options)
        guess = nearest(option, words) or nearest(option.rpartition(".")[2], [w.rpartition(".")[2] for w in words])
        group = _first(r"Group '([^']+)' does not accept", text)
        return f"{where}there is no option '{f'{group}.' if group else ''}{option}'.{guess}"
    if name := _first(r"Expected a dot import path string: (\S+)", text):
        guess = nearest(name, _class_names())
        return f"{where}there is no class '{name}'.{guess} Name it as module.Class if it is yours."
    if module := _first(r"No module named '([^']+)'", text):
        files = [path.stem for path in Path.cwd().glob("*.py")]
        return f"{where}there is no module '{module}' in the current folder, nor installed.{nearest(module, files)}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        module, name = found.groups()
        return f"{where}module '{module}' has no '{name}'.{nearest(name, dir(sys.modules.get(module)))}"
    if name := _first(r"expects a function or a callable class: (.+?)\. Got value", text):
        return f"{where}{name}"
    if found := re.search(r"typing\.Literal\[([^\]]+)\]\. Got value: (\S+)", text):
        choices = re.findall(r"'([^']+)'", found[1])
        return f"{where}unknown value '{found[2]}', known are {', '.join(choices)}.{nearest(found[2], choices)}"
    reasons = [line.strip(" -") for line in text.splitlines() if line.strip() and not _is_boilerplate(line)]
    return where + re.sub(r'^Parser key "[^"]+": ', "", reasons[0] if reasons else " ".join(text.split()))


def _is_boilerplate(line: str) -> bool:
    start = r"\s*(- )?(Parser key .*:$|Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path|"
    return re.match(start + r"Expected a <class 'NoneType'>)", line) is not None


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _option_names(classes: Iterable[str]) -> Iterator[str]:
    """Yield what can be set in classes given by their paths, and in the dataclasses that they take."""
    for path in classes:
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        if inspect.isclass(cls):
            yield from inspect.signature(cls).parameters
            hints = typing.get_type_hints(cls.__init__).values()
            for part in [part for hint in hints for part in (hint, *typing.get_args(hint))]:
                if is_dataclass(part):
                    yield from (field.name for field in fields(part))


def _class_names() -> list[str]:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer

    from sat_lightning.model import BaseMixin, BaseModel

    found: list[str] = []
    waiting: list[type] = [
        Callback, LightningDataModule, LightningModule, Logger, Strategy, Optimizer, BaseMixin, BaseModel
    ]  # fmt: skip
    while waiting:
        cls = waiting.pop()
        found.append(cls.__name__)
        waiting += cls.__subclasses__()
    return found


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


def _fail(message: str, *, verb: str = "", code: int = 2, cause: BaseException | None = None) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}{f' {verb}' if verb else ''}: error: {message}\n")
    raise SystemExit(code) from cause
