"""Where a model is: a folder, a known name, `hf://organisation/name`, or a URL; copies are kept under `SAT_HOME`.

- `SAT_HOME`: where models are kept. Default: `~/.sat_models`, as in SAT.
- `SAT_MIRROR`: base address that serves `<name>.zip`, asked in place of the addresses of `known_models`.
- `SAT_OFFLINE=1` (or `HF_HUB_OFFLINE=1`): no network; what is not there is an error.
- `models.json` in `SAT_HOME`: `{"my-bert": {"url": ..., "size": ..., "sha256": ...}}` adds names.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sat_lightning.checkpoint.files import read_json
from sat_lightning.checkpoint.known_models import KNOWN_MODELS, KnownModel
from sat_lightning.errors import CheckpointError, nearest

UNKNOWN = KnownModel(None)
_HF_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.bin"]


def sat_home(home: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that models are kept in: `home`, `SAT_HOME`, or `~/.sat_models`; it need not exist."""
    return Path(home or os.environ.get("SAT_HOME") or "~/.sat_models").expanduser()


def is_offline(offline: bool | None = None) -> bool:
    """Tell whether the network is off limits, by the argument or the environment."""
    if offline is not None:
        return offline
    values = (os.environ.get(name, "").lower() for name in ("SAT_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in values)


def known_models(home: str | os.PathLike[str] | None = None) -> dict[str, KnownModel]:
    """Return the models that can be named, with those of `models.json` in `SAT_HOME`."""
    file = sat_home(home) / "models.json"
    if not file.is_file():
        return dict(KNOWN_MODELS)
    added = {}
    for name, entry in read_json(file).items():
        if not isinstance(entry, dict) or "url" not in entry or entry.keys() - {"url", "size", "sha256"}:
            raise CheckpointError(
                f'{file}: \'{name}\' must be {{"url": ..., "size": ..., "sha256": ...}}, url at least.'
            )
        added[name] = KnownModel(**entry)
    return KNOWN_MODELS | added


def locate(
    name: str | os.PathLike[str],
    *,
    home: str | os.PathLike[str] | None = None,
    url: str | None = None,
    offline: bool | None = None,
) -> Path:
    """Find a model's folder, and fetch it first where that needs the network.

    Args:
        name: a file or folder, a known name, `hf://organisation/name[@revision]`, or the URL of a zip.
        home: where copies are kept. Default: see `sat_home`.
        url: where `name` is fetched from. Default: what `known_models` or the mirror say.
        offline: whether the network is off limits. Default: what the environment says.

    Returns:
        The file or folder; one that does not exist is left for the reader to complain about.

    Raises:
        CheckpointError: if the name is unknown, or it cannot be fetched.
    """
    text = os.fspath(name)
    if not isinstance(name, str) or Path(text).expanduser().exists():
        return Path(text).expanduser()
    if "://" in text:
        return _locate_address(text, sat_home(home), is_offline(offline), text)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", text):
        return Path(text).expanduser()
    folder = sat_home(home) / text
    if folder.exists():
        return folder
    models = known_models(home)
    if url is None and text not in models:
        local = sorted(path.name for path in sat_home(home).iterdir()) if sat_home(home).is_dir() else []
        beside = sorted(path.name for path in Path.cwd().iterdir() if path.is_dir())
        raise CheckpointError(
            f"'{text}' is neither a folder here, nor one of SAT_HOME ({sat_home(home)}), nor a known name."
            f"{nearest(text, [*beside, *local, *models])} Known are {', '.join(sorted(models))}."
        )
    known = KnownModel(url) if url is not None else models[text]
    mirror = os.environ.get("SAT_MIRROR")
    address = f"{mirror.rstrip('/')}/{text}.zip" if mirror and url is None else known.url
    if address is None:
        raise CheckpointError(
            f"'{text}' is served from a private bucket only. Pass url=, set SAT_MIRROR, or unpack it as {folder}."
        )
    return _locate_address(address, sat_home(home), is_offline(offline), text, known, folder)


def _locate_address(
    address: str, home: Path, offline: bool, what: str, known: KnownModel = UNKNOWN, folder: Path | None = None
) -> Path:
    scheme = urlsplit(address).scheme
    if scheme == "hf":
        return _fetch_hf(address, home, offline)
    if scheme not in ("http", "https"):
        raise CheckpointError(
            f"{address}: cannot fetch '{scheme}', only http, https and hf. Copy it to a folder first."
        )
    if folder is None:
        stem = re.sub(r"[^\w.-]", "_", Path(unquote(urlsplit(address).path)).stem) or "model"
        folder = home / f"{stem.lstrip('.')}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    if folder.exists():
        return folder
    if offline:
        raise CheckpointError(
            f"'{what}' is not in {home}, and the network is off (SAT_OFFLINE). Put it there as {folder}."
        )
    from filelock import FileLock  # what only a download needs is not loaded before one

    from sat_lightning.checkpoint.download import download, unzip

    _make(home / ".locks")
    with FileLock(home / ".locks" / f"{folder.name}.lock"):
        if not folder.exists():  # another process may have fetched it meanwhile
            archive = home / f".{folder.name}.zip"
            try:
                download(address, archive, size=known.size, sha256=known.sha256)
                unzip(archive, folder)
            finally:
                archive.unlink(missing_ok=True)
    return folder


def _fetch_hf(address: str, home: Path, offline: bool) -> Path:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if found is None:
        raise CheckpointError(f"{address} is no address: write hf://organisation/name, perhaps with @revision.")
    repository, revision = found.groups()
    folder = home / "hf" / (repository.replace("/", "--") + (f"@{revision.replace('/', '--')}" if revision else ""))
    if (folder / "config.json").is_file() and offline:
        return folder
    if offline:
        raise CheckpointError(f"{address} is not in {folder}, and the network is off (SAT_OFFLINE). Copy it there.")
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise CheckpointError(f"{address} needs huggingface_hub. Run: pip install huggingface_hub.") from error
    _make(folder)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        patterns = [p for p in _HF_PATTERNS if p != "*.bin" or not any(f.endswith(".safetensors") for f in files)]
        snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=patterns)
    except Exception as error:  # the library has an error for each of its layers
        raise CheckpointError(
            f"{address} cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())[:300]}). Check the "
            "name, the network, and HF_TOKEN if the repository is gated."
        ) from error
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made ({error.strerror}). Set SAT_HOME to a folder you own."
        ) from error
