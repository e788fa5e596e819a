"""What a load did, and what it was allowed to leave undone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by names of the state dict; `str(report)` gives counts and the first names."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """In the model, not in the file: these keep the values they had."""
    unexpected: tuple[str, ...] = ()
    """In the file, not in the model."""
    mismatched: tuple[str, ...] = ()
    """Of another shape in the file, which an option allowed: these keep the values they had."""
    reinitialised: tuple[str, ...] = ()
    """Mixins without weights in the file, whose `reinit` was called."""
    renamed: tuple[str, ...] = ()
    """`old -> new`, and other repairs of old files."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched", "reinitialised", "renamed"):
            if names := getattr(self, kind):
                parts.append(f"{len(names)} {kind}: {some(names)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Tolerance:
    """What may differ between a file and a model. By default nothing; names are patterns with `*`.

    Args:
        strict: whether all else is an error.
        may_miss: names of the model that the file may lack: they keep their initial values.
        may_mismatch: names that may have another shape in the file: they keep their initial values.
        ignore: names of the file that the model may lack.
        reinit: mixins (or True for all) whose weights the file may lack: their `reinit` is called then.
    """

    strict: bool = True
    may_miss: tuple[str, ...] = ()
    may_mismatch: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    reinit: bool | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Accept one pattern in place of a tuple."""
        for name in ("may_miss", "may_mismatch", "ignore", "reinit"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif not isinstance(value, bool):
                object.__setattr__(self, name, tuple(value))

    def reinitialises(self, name: str) -> str | None:
        """Return the mixin that owns `name` and may be without weights, or None."""
        parts = name.split(".")
        if "mixins" not in parts[:-1] or self.reinit is False:
            return None
        start = parts.index("mixins")
        mixin = ".".join([*parts[:start], parts[start + 1]])  # "head", or "decoder.head" of a composed model
        return mixin if self.reinit is True or mixin in self.reinit else None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def some(names: Collection[str], limit: int = 5) -> str:
    """Write the first names of many."""
    shown = ", ".join(list(names)[:limit]) or "nothing"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
