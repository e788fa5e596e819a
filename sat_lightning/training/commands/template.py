"""From a talk to the ids that a model expects: by the form of training, a chat template, or ChatGLM's rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sat_lightning.data.templates import (
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    Encode,
    Form,
    JinjaTemplate,
    Message,
    find_chat_template,
    make_chat_template,
    read_template,
    read_text,
)
from sat_lightning.errors import ConfigError, DataError
from sat_lightning.training.commands.source import Source


class Template(Protocol):
    """What turns a talk into a prompt."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids behind which the model answers.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, the last one of the user.
        """


class SingleForm:
    """A form with fields, in which each message is asked alone: it has no rounds.

    Args:
        form: that a run was trained with.
        encode: turns text into ids.

    Raises:
        DataError: it has not one field before the answer.
    """

    def __init__(self, form: Form, encode: Encode) -> None:
        if len(form.asked) != 1:
            raise DataError(
                f"The run was trained with a form that has {len(form.asked)} fields before the answer "
                f"({', '.join(form.asked)}), and a message fills one. Write the whole text: generate --prompt."
            )
        self._form, self._encode = form, encode

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Put the last message into the form.

        Raises:
            DataError: there is a system message, which a form has no place for.
        """
        if any(message["role"] == "system" for message in messages):
            raise DataError("The form that the run was trained with has no place for a system message: leave it out.")
        return [
            int(token) for token in self._encode(self._form.question({self._form.asked[0]: messages[-1]["content"]}))
        ]


class NumberedRounds:
    """ChatGLM's form: `[Round 1]`, a question behind 问：, an answer behind 答：, with the marks of its family.

    Args:
        encode: turns text into ids.
        before: ids before the text.
        after: ids behind it.
        is_second: ChatGLM2's form, with empty lines and rounds from 1 on; ChatGLM's begins with 0, and puts a first
            question as it is.
    """

    def __init__(self, encode: Encode, before: Sequence[int], after: Sequence[int], is_second: bool) -> None:
        self._encode, self._before, self._after, self._is_second = encode, list(before), list(after), is_second

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Put the rounds one behind the other.

        Raises:
            DataError: there is a system message, which this form has no place for.
        """
        if any(message["role"] == "system" for message in messages):
            raise DataError("ChatGLM's rounds have no place for a system message: leave --system out.")
        text = self.render([message["content"] for message in messages])
        return [*self._before, *(int(token) for token in self._encode(text)), *self._after]

    def render(self, contents: Sequence[str]) -> str:
        """Return the text of questions and answers by turns, the last one a question."""
        gap, first = ("\n\n", 1) if self._is_second else ("\n", 0)
        if len(contents) == 1 and not self._is_second:
            return contents[0]
        parts = []
        for number, question in enumerate(contents[::2]):
            parts.append(f"[Round {number + first}]{gap}问：{question}{gap}答：")
            answers = contents[2 * number + 1 : 2 * number + 2]
            parts += [f"{answer}{gap}" for answer in answers]
        return "".join(parts)


def find_template(source: Source, path: str | None = None) -> Template:
    """Find the form in which a model expects a talk.

    Args:
        source: its folder and tokenizer, and of a run the form that it was trained with.
        path: a file with a template, in the place of the model's own.

    Returns:
        The template.

    Raises:
        ConfigError: the model has none.
        DataError: a file cannot be read.
    """
    folder = source.weights if source.weights.is_dir() else source.weights.parent
    encode = source.tokenizer.encode
    if path is None and isinstance(trained := source.samples.get("template"), str):
        found = read_template(trained, source.tokenizer, source.samples.get("learned"))
        return found if isinstance(found, JinjaTemplate) else SingleForm(found, encode)
    text = read_text(Path(path)) if path is not None else find_chat_template(folder)
    if text is not None:
        return make_chat_template(text, folder, encode)
    config, name = source.model.config, type(source.model).__name__
    if name == "ChatGLMModel":
        return NumberedRounds(encode, [], [config.gmask_token_id, config.bos_token_id], is_second=False)
    if name == "ChatGLM2Model":
        # Its marks stand behind the pieces: [MASK], [gMASK], [sMASK], sop, eop.
        first = source.tokenizer.vocab_size
        return NumberedRounds(encode, [first + 1, first + 3], [], is_second=True)
    raise ConfigError(
        f"{source.weights} has no chat template: neither {TEMPLATE_NAME} nor a chat_template in "
        f"{TOKENIZER_CONFIG_NAME}, and a {name} has no form of its own. Give --template FILE.jinja, or use generate."
    )


def use_template(source: Source, path: str | None = None) -> Template:
    """Find the form of talks, let prompts be put into it, and let texts end where it closes an answer.

    Args:
        source: gets `template`, and more `end_tokens`.
        path: see `find_template`.

    Returns:
        The template.
    """
    template = find_template(source, path)
    source.template = template
    if isinstance(template, JinjaTemplate):
        source.end_tokens = sorted({*source.end_tokens, *_find_closing(template, source.tokenizer)})
    return template


def _find_closing(template: JinjaTemplate, tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Return the special token, one without text, that a template puts behind an answer."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "OK"}]
    try:
        asked, answered = template.render(talk[:1], is_open=True), template.render(talk, is_open=False)
    except DataError:  # it refuses this talk: it has rules of its own
        return []
    closing = answered[len(asked) :].partition("OK")[2].strip() if answered.startswith(asked) else ""
    first = template.ids(closing)[:1] if closing else []
    return first if first and not tokenizer.decode(first) else []
