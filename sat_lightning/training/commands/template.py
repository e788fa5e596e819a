"""From the rounds of a talk to the ids that a model expects: by its folder's chat template, or ChatGLM's rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sat_lightning.errors import ConfigError, DataError
from sat_lightning.training.commands.source import Source

Message = Mapping[str, str]
Encode = Callable[[str], Any]  # ids, in whatever holds integers
TEMPLATE_NAME, TOKENIZER_CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"


class Template(Protocol):
    """What turns a talk into a prompt."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids behind which the model answers.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, the last one of the user.
        """


class JinjaTemplate:
    """A chat template as Hugging Face's folders carry it, run in a sandbox: it is a program from a file.

    Args:
        text: of the template.
        encode: turns text into ids, special tokens that it spells included.
        names: what the template may read beside the messages, such as `bos_token`.

    Raises:
        DataError: it is no template.
    """

    def __init__(self, text: str, encode: Encode, names: Mapping[str, Any] | None = None) -> None:
        import jinja2  # torch brings it along
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        extensions = [loopcontrols, _answer_mark()]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._encode, self._names, self._error = encode, dict(names or {}), jinja2.TemplateError
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is none: {error}.") from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Render the messages, and turn the text into ids.

        Raises:
            DataError: the template refuses them.
        """
        values = {"tools": None, "documents": None, **self._names}
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **values)
        except self._error as error:
            raise DataError(f"the chat template refuses this talk: {error}.") from error
        return [int(token) for token in self._encode(text)]


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
        source: its folder and tokenizer.
        path: a file with a template, in the place of the model's own.

    Returns:
        The template.

    Raises:
        ConfigError: the model has none.
        DataError: a file cannot be read.
    """
    folder = source.weights if source.weights.is_dir() else source.weights.parent
    settings = _read_json(folder / TOKENIZER_CONFIG_NAME)
    text = _read(Path(path)) if path is not None else _template_of(folder, settings)
    encode = source.tokenizer.encode
    if text is not None:
        special = {**_read_json(folder / "special_tokens_map.json"), **settings}
        names = {name: _spelling(value) for name, value in special.items() if name.endswith("_token")}
        return JinjaTemplate(text, encode, names)
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


def _template_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE_NAME).is_file():
        return _read(folder / TEMPLATE_NAME)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name, as Hugging Face once wrote them
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def _answer_mark() -> Any:  # noqa: ANN401 - the library is loaded when it is needed
    """Return what reads `{% generation %}`, by which Hugging Face's templates mark answers, as the text inside."""
    from jinja2.ext import Extension

    class AnswerMark(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:  # noqa: ANN401
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return AnswerMark


def _spelling(value: Any) -> Any:  # noqa: ANN401
    return value.get("content") if isinstance(value, dict) else value


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    import datetime

    return datetime.datetime.now().strftime(form)
