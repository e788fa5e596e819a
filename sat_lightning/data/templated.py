"""Rows -> samples by a template: fields in a form, or the messages of a talk."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.templates import Form, JinjaTemplate, Message
from sat_lightning.data.tokenizer import Tokenizer
from sat_lightning.data.transforms import Tokenize, TooLong

_OTHER_NAMES = {"from", "value"}  # ShareGPT's


class TokenizeForm(Tokenize):
    """Turn the fields of a row, put into a form, into `input_ids` and `target_ids`, as `Tokenize` does.

    Args:
        tokenizer: turns text into ids.
        form: the text around the fields, and which of them are learned.
        max_length: `n` at most; default unlimited.
        too_long: what happens to a longer sample.
        add_end: close the sample with the end-of-document id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        form: Form,
        max_length: int | None = None,
        too_long: TooLong = "raise",
        add_end: bool = True,
    ) -> None:
        super().__init__(tokenizer, form.fields, None, max_length, too_long, add_end)
        self.form = form

    def join(self, row: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return all ids of a row, whatever their number, and of each whether it is learned."""
        texts = {field: self._text(row, field) for field in self.fields}
        decoded = {name: text.decode() if isinstance(text, bytes) else text for name, text in texts.items()}
        pieces = self.form.pieces(decoded)
        return self.close(
            self.tokenizer.encode_batch([text for text, _ in pieces]), [is_learned for _, is_learned in pieces]
        )

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return f"{super().fingerprint()} {self.form.text!r}"


class TokenizeChat(Tokenize):
    """Turn a talk into `input_ids` and `target_ids`: the targets are what the assistant says, and what ends it.

    Args:
        tokenizer: turns text into ids.
        template: puts messages into text.
        field: of the row, that holds `[{"role": "user", "content": "..."}, ...]`.
        max_length: `n` at most; default unlimited.
        too_long: what happens to a longer sample.
        add_end: close the sample with the end-of-document id, unless the template does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: JinjaTemplate,
        field: str = "messages",
        max_length: int | None = None,
        too_long: TooLong = "raise",
        add_end: bool = True,
    ) -> None:
        super().__init__(tokenizer, [field], None, max_length, too_long, add_end)
        self.template = template

    def join(self, row: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return all ids of a row, whatever their number, and of each whether it is learned."""
        ids, is_learned = self.template.teach(self._messages(row))
        if self.add_end and ids[-1] != self.tokenizer.end_of_document_id:
            ids, is_learned = [*ids, self.tokenizer.end_of_document_id], [*is_learned, True]
        return np.array(ids, dtype=np.int64), np.array(is_learned)

    def fingerprint(self) -> str:
        """What identifies the lengths of the samples made."""
        return f"{super().fingerprint()} {self.template.fingerprint!r}"

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        field = self.fields[0]
        messages = self._take(row, field)
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise BadSampleError(
                f"field '{field}' holds {type(messages).__name__}, not a list of messages. Name another in "
                "samples.fields, or make messages of it in a process_fn."
            )
        for place, message in enumerate(messages):
            if not all(isinstance(message.get(name), str) for name in ("role", "content")):
                hint = (
                    " They are ShareGPT's: turn them into these in a process_fn."
                    if _OTHER_NAMES <= set(message)
                    else ""
                )
                raise BadSampleError(
                    f"message {place} of '{field}' has {', '.join(map(str, message)) or 'nothing'}, and needs role and "
                    f"content, both text.{hint}"
                )
        return messages
