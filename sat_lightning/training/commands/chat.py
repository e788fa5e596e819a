"""`sat-lightning chat --ckpt PATH`: talk with a model that has a chat template.

/reset begins a new talk, /exit (or the end of the input) ends it, and Ctrl-C ends an answer. When a talk grows longer
than the model reads, its oldest rounds are left out.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sat_lightning.data.templates import Message
from sat_lightning.errors import ConfigError, DataError, InputError, UsageError
from sat_lightning.generation import GenerationOptions, stream
from sat_lightning.model import EncoderDecoderModel
from sat_lightning.training.commands.generate import say
from sat_lightning.training.commands.source import Source, load_source
from sat_lightning.training.commands.template import Template, use_template
from sat_lightning.training.commands.words import make_generation_options, make_parser, make_strategy

PROMPT = "> "


def run_chat(verb: str, words: list[str]) -> None:
    """Run the verb.

    Args:
        verb: its name.
        words: what stands after it.

    Raises:
        UsageError: the words cannot be understood.
        SatError: there is no model, no tokenizer or no template.
    """
    parser = make_parser(verb, __doc__)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--template", metavar="FILE", help="a jinja chat template; default: the model's own")
    options = parser.parse_args(words)
    if options.num_beams > 1:
        raise UsageError("--num-beams revises what it wrote, and a talk is shown as it is written. Leave it out.")
    source = load_source(options.ckpt, tokenizer=options.tokenizer, dtype=options.dtype, device=options.device)
    if isinstance(source.model, EncoderDecoderModel):
        raise ConfigError(f"A {type(source.model).__name__} reads one text and writes another. Use generate.")
    talk = Talk(source, use_template(source, options.template), options)
    sys.stderr.write("/reset begins a new talk, /exit ends.\n")
    while (line := _ask()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            talk.reset()
        elif line:
            _answer(talk, line)


def _answer(talk: Talk, line: str) -> None:
    try:
        talk.answer(line)
    except (DataError, InputError) as error:  # the talk goes on without this message
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        say("\n")


def _ask() -> str | None:
    """Return the next message; None when there is no more."""
    try:
        if sys.stdin.isatty():
            return input(PROMPT).strip()
    except (EOFError, KeyboardInterrupt):
        say("\n")
        return None
    line = sys.stdin.readline()
    return line.strip() if line else None


class Talk:
    """The rounds so far.

    Args:
        source: who answers.
        template: in what form it is asked.
        options: of `make_parser`, and `system`.
    """

    def __init__(self, source: Source, template: Template, options: argparse.Namespace) -> None:
        self.source, self.template = source, template
        self.strategy: Any = make_strategy(options, source)
        self.settings: GenerationOptions = make_generation_options(options, source)
        self.system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
        self.rounds: list[Message] = []
        self.num_answers = 0
        self.room = source.model.config.max_sequence_length - int(self.settings.max_new_tokens or 0)
        self.template.encode([*self.system, {"role": "user", "content": "?"}])  # refused now, or not at all

    def reset(self) -> None:
        """Forget all but the system message."""
        self.rounds = []

    def answer(self, text: str) -> str:
        """Write the model's answer to the terminal as it comes, and remember both.

        Args:
            text: the user's message.

        Returns:
            The answer; of one that was broken off, what was written is remembered.

        Raises:
            DataError: the message alone is too long.
        """
        asked: Message = {"role": "user", "content": text}
        ids = self._fit(asked)
        parts: list[str] = []
        self.num_answers += 1
        answers = stream(
            self.source.model, [ids], strategy=self.strategy, tokenizer=self.source.tokenizer, options=self.settings,
            row_ids=[self.num_answers],
        )  # fmt: skip
        try:
            for part in answers:
                text = part.text if any(parts) else part.text.lstrip()  # templates put their own space before it
                parts.append(text)
                say(text)
        finally:
            answers.close()  # type: ignore[attr-defined]
            if parts:
                self.rounds += [asked, {"role": "assistant", "content": "".join(parts)}]
        say("\n")
        return "".join(parts)

    def _fit(self, asked: Message) -> list[int]:
        """Return the ids of the talk, and leave its oldest rounds out where it is too long."""
        kept = self.rounds
        while len(ids := self.template.encode([*self.system, *kept, asked])) > self.room:
            if not kept:
                raise DataError(
                    f"The message has {len(ids)} tokens; {self.room} are left beside the answer "
                    f"(--max-new-tokens {self.settings.max_new_tokens}). Shorten it, or lower that."
                )
            kept = kept[2:]
        self.rounds = kept
        return ids
