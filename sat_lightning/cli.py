"""The command line: `sat-lightning`, or `python -m sat_lightning`.

Each verb is one line in `VERBS`. Nothing heavy is imported before a verb is known, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from sat_lightning import __version__
from sat_lightning.errors import InputError, SatError, UsageError, nearest

PROGRAM = "sat-lightning"
_CONVERT = "sat_lightning.checkpoint.convert:run_convert"
_TRAINER = "sat_lightning.training.trainer_cli:run_trainer"

#: What each verb does, and the function that does it, as module:name; it receives the verb and the words after it.
VERBS: dict[str, tuple[str, str]] = {
    "chat": ("talk with a trained model", "sat_lightning.training.commands.chat:run_chat"),
    "convert": ("write a checkpoint in another format: native, SAT's or Hugging Face's", _CONVERT),
    "fit": ("train a model, from the beginning or from a checkpoint", _TRAINER),
    "generate": ("continue prompts with a trained model", "sat_lightning.training.commands.generate:run_generate"),
    "validate": ("measure a model on the validation split", _TRAINER),
    "test": ("measure a model on the test split", _TRAINER),
    "clean-cache": ("remove prepared data that nobody used for a month", "sat_lightning.data.cache:run_clean"),
    "merge": (
        "put what was fine-tuned into the weights of its base",
        "sat_lightning.training.commands.merge:run_merge",
    ),
    "predict": ("run a model over the test split", _TRAINER),
    "doctor": ("see whether the ranks of a run can work together", "sat_lightning.training.doctor:run_doctor"),
}

HELP = """usage: {program} VERB [options]

{verbs}

  {program} fit --config recipes/gpt2_quickstart.yaml            train by a recipe
  {program} fit --config ... --data.path my.txt                  change any value of it
  {program} fit --config ... --print_config                      show the whole configuration
  {program} fit --resume runs/gpt2_quickstart/version_0          go on after a stop, in the same folder
  {program} fit --resume ... --reset optimizer,scheduler         all but optimizer, scheduler, data or step
  {program} generate --ckpt runs/tiny/version_0 --prompt Hi      go on from a prompt, shown as it comes
  {program} generate ... --input in.jsonl --output out.jsonl     answer a file; after a kill, go on with it
  {program} chat --ckpt chatglm3-6b                              talk with a model that has a chat template
  {program} VERB --help                                          all options of a verb
  {program} --version
"""


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
        _run(verb, words[1:])


def _run(verb: str, words: list[str]) -> None:
    module, _, function = VERBS[verb][1].partition(":")
    try:
        getattr(importlib.import_module(module), function)(verb, words)
    except InputError:
        raise  # a tensor of the wrong shape: where it came from says more than one line
    except SatError as error:
        _fail(" ".join(str(error).split()), verb=verb, code=2 if isinstance(error, UsageError) else 1, cause=error)


def _fail(message: str, *, verb: str = "", code: int = 2, cause: BaseException | None = None) -> NoReturn:
    sys.stderr.write(f"{PROGRAM}{f' {verb}' if verb else ''}: error: {message}\n")
    raise SystemExit(code) from cause
