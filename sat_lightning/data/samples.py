"""One sample that cannot be used: how it is named, counted and bounded; and how an optional library is asked for."""

import importlib
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

from sat_lightning.errors import DataError

OnBadSample = Literal["raise", "skip"]

_LOGGER = logging.getLogger(__name__)
_NUM_SHOWN = 10
_FIRST_WINDOW = 1000


class BadSampleError(DataError):
    """One row cannot be read or used; the text names its file, row and cure."""


class BadSamples:
    """Decides whether a bad sample stops the run, and keeps the count, shared by the workers of a loader.

    Args:
        name: the source, for messages.
        policy: `raise` lets the first error through; `skip` leaves the sample out, says so and counts it.
        max_bad_fraction: with `skip`, the share of the samples read so far that may be bad, 0 to 1; the first
            thousand samples (or the whole source, if it is smaller) count as read from the start.
        num_samples: size of the source, if known.

    Raises:
        DataError: the policy is unknown or the fraction is none.
    """

    def __init__(
        self,
        name: str,
        policy: OnBadSample = "raise",
        max_bad_fraction: float = 0.01,
        num_samples: int | None = None,
    ) -> None:
        if policy not in ("raise", "skip"):
            raise DataError(f"on_bad_sample is {policy!r}. Set it to 'raise' or 'skip'.")
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise DataError(f"max_bad_fraction is {max_bad_fraction}. Set it to a fraction, 0 to 1 (0.01 is 1 %).")
        self.name = name
        self.policy = policy
        self.max_bad_fraction = max_bad_fraction
        self._window = _FIRST_WINDOW if num_samples is None else min(num_samples, _FIRST_WINDOW)
        # In shared memory, so that the workers of a loader count together.
        self._counts = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def num_read(self) -> int:
        """Samples asked for so far, good and bad, by all workers of this process."""
        return int(self._counts[0])

    @property
    def num_bad(self) -> int:
        """Bad samples among them."""
        return int(self._counts[1])

    def count(self) -> None:
        """Count one sample as read."""
        self._counts[0] += 1

    def handle(self, error: BadSampleError) -> None:
        """Take an error: count and log it, or raise.

        Args:
            error: what is wrong with the sample.

        Raises:
            BadSampleError: the policy is `raise`.
            DataError: more samples are bad than `max_bad_fraction` allows.
        """
        if self.policy == "raise":
            raise error
        self._counts[1] += 1
        num_bad, allowed = self.num_bad, self.max_bad_fraction * max(self.num_read, self._window)
        if num_bad > allowed:
            raise DataError(
                f"{self.name}: {num_bad} bad samples among {self.num_read} read, more than max_bad_fraction="
                f"{self.max_bad_fraction} allows ({allowed:g}). Mend the data, or raise max_bad_fraction. The last: "
                f"{error}"
            ) from error
        if num_bad <= _NUM_SHOWN or num_bad & (num_bad - 1) == 0:
            _LOGGER.warning("%s: bad sample %d left out of %d read: %s", self.name, num_bad, self.num_read, error)


def resolve_process(process: Callable[[Any], Any] | str | None) -> Callable[[Any], Any] | None:
    """Find the function that a source's samples go through.

    Args:
        process: the function, its import path, or None.

    Returns:
        The function, or None.

    Raises:
        DataError: it cannot be imported.
    """
    return import_object(process, "process_fn") if isinstance(process, str) else process


def process_sample(process: Callable[[Any], Any] | None, sample: Any, where: Callable[[], str]) -> Any:  # noqa: ANN401
    """Put a sample through a function; whatever that raises becomes an error that names the sample.

    Args:
        process: the function, or None.
        sample: a row.
        where: called for the place of the row.

    Returns:
        What the function made of it.

    Raises:
        BadSampleError: the function failed.
    """
    if process is None:
        return sample
    try:
        return process(sample)
    except BadSampleError as error:
        raise BadSampleError(f"{where()}: {error}") from error
    except Exception as error:  # the user's own code
        name = getattr(process, "__qualname__", type(process).__name__)
        raise BadSampleError(
            f"{where()}: {name} failed ({type(error).__name__}: {error}). Mend the row or the function."
        ) from error


def import_extra(module: str, needed_by: str) -> Any:  # noqa: ANN401 - the library is optional
    """Import a library of the extra `[data]`.

    Args:
        module: its import name.
        needed_by: what needs it, the first words of the error.

    Returns:
        The module.

    Raises:
        DataError: it is not installed; gives the install line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        library = {"PIL": "Pillow"}.get(library, library)
        raise DataError(
            f'{needed_by} needs the {library} library, which is not installed. Run: pip install "sat_lightning[data]"'
        ) from error


def import_object(path: str, what: str) -> Any:  # noqa: ANN401 - whatever the user wrote
    """Import a function or class by its path.

    Args:
        path: `package.module.name`.
        what: the setting that holds the path, for messages.

    Returns:
        The object.

    Raises:
        DataError: there is none.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise DataError(f"{what} is '{path}'. Give an import path: package.module.name.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{what}: cannot import '{path}' ({error}). Give an importable path, package.module.name; a file of your "
            "own has to lie in the working folder or on PYTHONPATH."
        ) from error
