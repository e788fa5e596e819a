"""Forms in which a model is taught and asked: text with named fields, or a chat template over messages.

What is learned is encoded behind what stands before it, and never together with it. So the ids before an answer are the
same in training and in generation, whatever the tokenizer would have joined.
"""

import json
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sat_lightning.data.samples import BadSampleError
from sat_lightning.errors import DataError, nearest

Message = Mapping[str, Any]
Encode = Callable[[str], Any]  # ids, in whatever holds integers
CHAT = "chat"
TEMPLATE_NAME, TOKENIZER_CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"


class Form:
    r"""Text with named fields, as `Question: {prompt}\nAnswer: {answer}`; a brace of the text itself is doubled.

    Args:
        text: the form.
        learned: fields that are learned, the text right behind the last of them too; default all of it.

    Raises:
        DataError: it has no fields, a brace is not closed, or `learned` names another field.
    """

    def __init__(self, text: str, learned: Sequence[str] | None = None) -> None:
        try:
            found = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(f"samples.template: {error}. Double the braces that belong to the text.") from error
        if any(spec or conversion or name == "" for _, name, spec, conversion in found if name is not None):
            raise DataError("samples.template: braces hold the name of a field and nothing else. Double all others.")
        parts = [part for literal, name, *_ in found for part in ((literal, False), (name, True)) if part[0]]
        self.text = text
        self.fields = [str(name) for name, is_field in parts if is_field]
        if unknown := set(learned or ()) - set(self.fields):
            raise DataError(
                f"samples.learned names '{min(unknown)}', which is no field of samples.template "
                f"({', '.join(self.fields)}).{nearest(min(unknown), self.fields)}"
            )
        places = [place for place, (name, is_field) in enumerate(parts) if is_field]
        chosen = places if learned is None else [place for place in places if parts[place][0] in learned]
        if not chosen:
            raise DataError("samples.template has no field that is learned. Write fields in braces: {prompt}.")
        self._parts = [(str(value), is_field) for value, is_field in parts]
        #: Where the answer begins: all before it is what a model is asked with.
        self._answer = chosen[-1] if learned is None else chosen[0]
        closing = next((place for place in places if place > chosen[-1]), len(parts))
        self._is_learned = [
            learned is None or place in chosen or chosen[-1] < place < closing for place in range(len(parts))
        ]

    @property
    def asked(self) -> list[str]:
        """The fields before the answer."""
        return [name for name, is_field in self._parts[: self._answer] if is_field]

    def question(self, row: Mapping[str, str]) -> str:
        """Return the text before the answer.

        Args:
            row: with text in the fields `asked`.
        """
        return "".join(row[value] if is_field else value for value, is_field in self._parts[: self._answer])

    def pieces(self, row: Mapping[str, str]) -> list[tuple[str, bool]]:
        """Return the texts that are to be encoded one by one, and of each whether it is learned.

        Args:
            row: with text in every field.
        """
        pieces: list[tuple[str, bool]] = []
        for place, (value, is_field) in enumerate(self._parts):
            text, is_learned = row[value] if is_field else value, self._is_learned[place]
            if pieces and place != self._answer and pieces[-1][1] == is_learned:
                text = pieces.pop()[0] + text
            pieces.append((text, is_learned))
        return pieces


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
        self.fingerprint = repr((text, sorted(self._names.items(), key=repr)))
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is none: {error}.") from error

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids behind which the model answers.

        Raises:
            DataError: the template refuses the messages.
        """
        return self.ids(self.render(messages, is_open=True))

    def ids(self, text: str) -> list[int]:
        """Turn a text of the template's into ids."""
        return [int(token) for token in self._encode(text)]

    def render(self, messages: Sequence[Message], is_open: bool) -> str:
        """Return the text of messages.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`.
            is_open: an answer is to follow.

        Raises:
            BadSampleError: the template refuses them.
        """
        values = {"tools": None, "documents": None, **self._names}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=is_open, **values)
        except self._error as error:
            raise BadSampleError(f"the chat template refuses this talk: {error}.") from error

    def teach(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a talk up to its last answer, and which of them are learned: answers and what ends them.

        Before each answer stand the ids that `encode` gives for the messages before it.

        Raises:
            BadSampleError: there is no answer, or the template does not leave earlier messages as they were.
        """
        ids: list[int] = []
        is_learned: list[bool] = []
        done = ""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:place], is_open=True)
            answered = self.render(messages[: place + 1], is_open=False)
            for text in (asked, answered):
                if not text.startswith(done):
                    raise BadSampleError(
                        f"the chat template writes message {place} of the talk otherwise than it asks for it, or "
                        "changes earlier ones. Give rows with one answer each, or another template, "
                        "samples.template: FILE.jinja."
                    )
                more = self._more(ids, text, done)
                ids, done = ids + more, text
                is_learned += [text is answered] * len(more)
        if not any(is_learned):
            raise BadSampleError("the talk has no message of the assistant, so there is nothing to learn. Remove it.")
        return ids, is_learned

    def _more(self, ids: list[int], text: str, done: str) -> list[int]:
        """Return what a longer text adds to ids: as it is encoded whole if that leaves them, else by itself."""
        whole = self.ids(text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self.ids(text[len(done) :])


def is_chat(template: str) -> bool:
    """Tell whether `samples.template` is about messages, and not a form with fields."""
    return template == CHAT or template.endswith(".jinja")


def read_template(template: str, tokenizer: Any, learned: Sequence[str] | None = None) -> Form | JinjaTemplate:  # noqa: ANN401
    """Read what `samples.template` says.

    Args:
        template: a form; or `chat`, the template in the tokenizer's folder; or the path of one, a .jinja file.
        tokenizer: turns text into ids.
        learned: fields of a form that are learned.

    Raises:
        DataError: there is no such template, or it cannot be read.
    """
    if not is_chat(template):
        return Form(template, learned)
    folder: Path | None = getattr(tokenizer, "folder", None)
    if template != CHAT:
        return make_chat_template(read_text(Path(template).expanduser()), folder, tokenizer.encode)
    text = None if folder is None else find_chat_template(folder)
    if text is None:
        raise DataError(
            f"samples.template is chat, and beside the tokenizer ({folder or type(tokenizer).__name__}) lies neither "
            f"{TEMPLATE_NAME} nor a {TOKENIZER_CONFIG_NAME} with a chat_template. Give samples.template: FILE.jinja."
        )
    return make_chat_template(text, folder, tokenizer.encode)


def make_chat_template(text: str, folder: Path | None, encode: Encode) -> JinjaTemplate:
    """Make a chat template that knows the special tokens of a folder.

    Args:
        text: of the template.
        folder: of the tokenizer.
        encode: turns text into ids.
    """
    settings = {} if folder is None else _settings_of(folder)
    special = {} if folder is None else {**_read_json(folder / "special_tokens_map.json"), **settings}
    names = {name: _spelling(value) for name, value in special.items() if name.endswith("_token")}
    return JinjaTemplate(text, encode, names)


def find_chat_template(folder: Path) -> str | None:
    """Return the chat template that lies in a folder, a file of its own or among the tokenizer's settings.

    Args:
        folder: of a model or a tokenizer.
    """
    if (folder / TEMPLATE_NAME).is_file():
        return read_text(folder / TEMPLATE_NAME)
    found = _settings_of(folder).get("chat_template")
    if isinstance(found, list):  # several by name, as Hugging Face once wrote them
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def read_text(path: Path) -> str:
    """Read a file of text.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _settings_of(folder: Path) -> dict[str, Any]:
    return _read_json(folder / TOKENIZER_CONFIG_NAME)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path))
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
