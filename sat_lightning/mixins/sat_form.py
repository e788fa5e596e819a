"""SAT's constructors of fine-tuning mixins: sizes where ours take the configuration that knows them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError

Init = TypeVar("Init", bound=Callable[..., None])
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def accepts_sat_form(form: Callable[..., Arguments]) -> Callable[[Init], Init]:
    """Let a constructor take the arguments of SAT's class of that name as well.

    Args:
        form: has SAT's parameters, and returns arguments of ours; the first is a configuration of the sizes given.

    Returns:
        A decorator of `__init__`. What a file records are our arguments.
    """

    def decorate(init: Init) -> Init:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            if isinstance(args[0] if args else kwargs.get("config"), TransformerConfig):
                init(self, *args, **kwargs)
                return
            args, kwargs = _translate(type(self).__name__, init, form, args, kwargs)
            if type(self).__init__ is wrapper:  # no subclass with arguments of its own
                object.__setattr__(self, "init_arguments", (args, kwargs))
            init(self, *args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def _translate(
    name: str, init: Callable[..., None], form: Callable[..., Arguments], args: Any, kwargs: dict[str, Any]
) -> Arguments:
    try:
        inspect.signature(form).bind(*args, **kwargs)
        numbers = args[:1]
        is_fitting = all(isinstance(number, int) for number in numbers)
    except TypeError:
        is_fitting = False
    if not is_fitting:
        raise ConfigError(
            refusal(name, init, args, f" or SAT's arguments ({', '.join(inspect.signature(form).parameters)}),")
        )
    return form(*args, **kwargs)


def refusal(name: str, init: Callable[..., None], args: Sequence[Any], more: str = "") -> str:
    """Say what a constructor takes."""
    settings = list(inspect.signature(init).parameters)[2:]
    return (
        f"{name} takes the model's configuration, which knows the sizes,{more} and got {args[0] if args else None!r}. "
        f"Write {name}(model.config, ...), with its settings by name: {', '.join(settings) or 'none'}."
    )


def sizes(
    num_layers: int = 1,
    hidden_size: int = 1,
    num_attention_heads: int = 1,
    **more: Any,  # noqa: ANN401
) -> TransformerConfig:
    """Return a configuration of what SAT's constructors are told of a model."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        vocab_size=1,
        max_sequence_length=1,
        **more,
    )
