"""What a command line that cannot be understood was meant to say, in one line."""

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from sat_lightning.errors import nearest


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
    if reason := _first(r"(Multiple subclasses with name .+)", text):
        return f"{where}{reason}"
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
