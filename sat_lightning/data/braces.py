"""Several paths written as one."""

from sat_lightning.data.samples import import_extra
from sat_lightning.errors import DataError


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..031}` and `{a,b}` as a shell does.

    Args:
        pattern: a path or URL.

    Returns:
        One path or more.

    Raises:
        DataError: the braces do not match, or the library that expands them is missing.
    """
    if "{" not in pattern:
        return [pattern]
    library = import_extra("braceexpand", f"the braces in '{pattern}'")
    try:
        return list(library.braceexpand(pattern))
    except library.UnbalancedBracesError as error:
        raise DataError(
            f"'{pattern}': the braces do not match ({error}). Write for instance {{000..031}}.tar."
        ) from error
