"""What a data module may be given: paths, datasets, functions that make datasets, and how much of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sat_lightning.data.records import NamedRecords
from sat_lightning.data.samples import import_object
from sat_lightning.errors import DataError, nearest

Where = str | list[str] | Dataset[Any]

_WHERE = {"path", "dataset", "create_dataset", "class_path"}


@dataclass(frozen=True)
class WeightedPath:
    """One source of a mixture, and how much of it; at most one of the three shares, see `Share`."""

    path: str | list[str] = ""
    """A file, folder, glob, scheme, or several of them."""
    name: str | None = None
    """What logs and messages call it; default the path's last part."""
    weight: float | None = None
    """Scales the source's size: an epoch holds this many times its samples."""
    probability: float | None = None
    """Its fraction of the samples."""
    tokens: float | None = None
    """Its fraction of the tokens, relative to the other sources' `tokens`."""
    dataset: Dataset[Any] | None = None
    """In the place of a path: a map-style dataset of ready samples; in YAML its `class_path` and `init_args`."""
    create_dataset: str | Callable[..., Any] | None = None
    """A function `(path, **options)`, or its import path, that makes a map-style dataset of ready samples."""
    process_fn: str | Callable[[Any], Any] | None = None
    """A function, or its import path, that makes a sample of each row."""
    options: Mapping[str, Any] | None = None
    """Of this source alone: of text, those of `SourceOptions`, for instance another `text_field`; of rows that are
    samples, those of their format, for instance a `delimiter`; or those of `create_dataset`."""

    @property
    def where(self) -> Where:
        """The dataset or the path."""
        return self.path if self.dataset is None else self.dataset

    @property
    def has_own_samples(self) -> bool:
        """Whether its rows become samples in a way of their own."""
        return any(given is not None for given in (self.dataset, self.create_dataset, self.process_fn))


def list_sources(path: Where | Sequence[str | WeightedPath | Mapping[str, Any] | Dataset[Any]]) -> list[WeightedPath]:
    """Read what was given as training data: one source, or a mixture of several.

    Args:
        path: a path or dataset; a list of paths, which are one source; or a list with at least one `WeightedPath` (or
            a mapping with its fields, or a dataset) in it, of which every entry is a source.

    Returns:
        The sources, each with a name of its own.

    Raises:
        DataError: a mapping has a field that `WeightedPath` has not.
    """
    if isinstance(path, (str, Dataset)) or all(isinstance(entry, str) for entry in path):
        sources = [_read_entry(path)]
    else:
        sources = [_read_entry(entry) for entry in path]
    names: list[str] = []
    for source in sources:
        name = source.name or _name(source.where) or str(getattr(source.create_dataset, "__name__", "dataset"))
        others = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{others + 1}" if others else name)
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def held_out_sources(
    held_out: float | str | Mapping[str, Any] | Dataset[Any] | None, trained: Sequence[WeightedPath]
) -> dict[str, WeightedPath]:
    """List the sources of their own that validation or test have.

    Args:
        held_out: a fraction; a path or dataset, or the fields of a `WeightedPath`; or several of these by name.
        trained: what is trained on; a bare path is read as it is, where it is one source.

    Returns:
        Sources by name, which is empty for the only one; none for a fraction.

    Raises:
        DataError: a mapping has a field that `WeightedPath` has not, or a share.
    """
    if held_out is None or isinstance(held_out, (int, float)):
        return {}
    known = {field.name for field in fields(WeightedPath)} | {"class_path", "init_args"}
    is_several = isinstance(held_out, Mapping) and not (held_out.keys() <= known and held_out.keys() & _WHERE)
    named: Mapping[str, Any] = held_out if is_several else {"": held_out}  # type: ignore[assignment]
    found = {name: _read_entry(value) for name, value in named.items()}
    for name, source in found.items():
        if any(share is not None for share in (source.weight, source.probability, source.tokens)):
            raise DataError(f"data: the set {name or source.path} has a share, and of it every row counts. Remove it.")
        if isinstance(named[name], str) and len(trained) == 1:
            alike = {field: getattr(trained[0], field) for field in ("create_dataset", "process_fn", "options")}
            found[name] = replace(source, **alike)
    return found


def build_object(value: Any, what: str) -> Any:  # noqa: ANN401 - whatever a configuration says
    """Build what is written as `{class_path: module.Class, init_args: {...}}`, however deep; all else is as it is.

    Args:
        value: of a configuration.
        what: the setting, for messages.

    Returns:
        The object, or the value.

    Raises:
        DataError: there is no such class, or it does not take these arguments.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = build_object(dict(value.get("init_args") or {}), what)
        try:
            return import_object(str(value["class_path"]), what)(**arguments)
        except TypeError as error:
            raise DataError(f"{what}: {value['class_path']} cannot be built ({error}). Mend its init_args.") from error
    if isinstance(value, Mapping):
        return {key: build_object(one, what) for key, one in value.items()}
    return [build_object(one, what) for one in value] if isinstance(value, list) else value


def _read_entry(entry: Any) -> WeightedPath:
    if isinstance(entry, Mapping) and "class_path" in entry:
        entry = build_object(entry, "path")
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(WeightedPath)]
        for key in entry:
            if key not in known:
                raise DataError(
                    f"data: a source of path has no field '{key}', only {', '.join(known)}.{nearest(str(key), known)}"
                )
        for key in ("weight", "probability", "tokens"):
            if not isinstance(entry.get(key), (int, float, type(None))):
                raise DataError(f"data: {key} of a source of path is {entry[key]!r}. Give a number above 0.")
        built = {key: build_object(entry[key], key) for key in ("dataset", "process_fn", "options") if entry.get(key)}
        entry = WeightedPath(**{**entry, **built})
    elif isinstance(entry, Dataset):
        entry = WeightedPath(dataset=entry)
    elif not isinstance(entry, WeightedPath):
        entry = WeightedPath(entry)
    return _checked(entry)


def _checked(entry: WeightedPath) -> WeightedPath:
    if entry.dataset is None and not entry.path and entry.create_dataset is None:
        raise DataError(f"data: a source has no path: {entry}. Say where its data is.")
    if entry.dataset is not None and (entry.path or entry.create_dataset is not None):
        raise DataError(f"data: a source has both a dataset and a path or create_dataset: {entry}. Keep one of them.")
    dataset: Any = entry.dataset
    if dataset is None or isinstance(dataset, Dataset):
        return entry
    kind = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"data: dataset of a source is a {kind}. Give a map-style dataset, or its class_path.")
    return replace(entry, dataset=NamedRecords(kind, dataset))


def _name(path: Where) -> str:
    if isinstance(path, str):
        return Path(path.removesuffix("://").rstrip("/")).stem or path
    return _name(path[0]) if isinstance(path, list) else str(getattr(path, "name", type(path).__name__))
