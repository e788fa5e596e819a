"""Every error a user can cause, each a `ValueError` too, so that `except ValueError` keeps working."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SatError(ValueError):
    """Base of all errors of this package."""


class HookError(SatError):
    """A hook is misspelt, malformed, or broke a rule of the forward."""


class HookConflictError(HookError):
    """Two owners claim one seam."""


class ConfigError(SatError):
    """A configuration contradicts itself or names something unknown."""


class InputError(SatError):
    """A tensor given to a model has the wrong shape, length or values."""


class CheckpointError(SatError):
    """A checkpoint cannot be read, or does not fit the model."""


class UsageError(SatError):
    """A command line cannot be understood."""


class DataError(SatError):
    """A data source is missing, empty, or does not fit the model."""


class NonFiniteError(SatError):
    """Too many batches of a run gave a loss, a metric or a gradient that is not finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what a misspelt `name` probably meant, as the tail of an error message.

    Args:
        name: the word that was not understood.
        known: the words that would have been.

    Returns:
        ` Did you mean 'x'?` for the closest known word, or the empty string when none is close.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
