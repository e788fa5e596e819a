"""Which rank a process is, what it stands on (host, device, versions), and how that compares with the others."""

import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sat_lightning import __version__
from sat_lightning.errors import ConfigError

Report = dict[str, str]

#: What the table shows of each rank.
COLUMNS = ("host", "device", "python", "torch", "lightning", "deepspeed", "cuda", "nccl")
#: What has to be the same on all ranks, beside the files given by name.
COMPARED = ("num_ranks", "sat_lightning", "python", "torch", "lightning", "deepspeed", "cuda", "nccl", "kind")


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where rank 0 is to be found."""

    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = "alone"


def find_place() -> Place:
    """Read from the environment which process this is, as torchrun or SLURM says it.

    Raises:
        ConfigError: a variable is lacking, is no number, or the rank is not below the number of ranks.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name) for name in names}
    launcher = "torchrun"
    if values["RANK"] is None and _is_slurm_task():
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm, launcher = SLURMEnvironment(), "SLURM"
        found = (slurm.global_rank(), slurm.local_rank(), slurm.world_size(), slurm.main_address, slurm.main_port)
        values = dict(zip(names, map(str, found), strict=True))
    elif values["RANK"] is None:
        return Place()
    if lacking := [name for name, value in values.items() if value is None]:
        raise ConfigError(f"RANK is {values['RANK']}, but {', '.join(lacking)} is not set. Let torchrun set them all.")
    try:
        rank, local_rank, num_ranks, port = (int(values[name] or "") for name in names if name != "MASTER_ADDR")
    except ValueError as error:
        raise ConfigError(f"The launcher's variables are no numbers: {values}.") from error
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"RANK is {rank}, and WORLD_SIZE {num_ranks}: ranks count from 0 to {num_ranks - 1}.")
    return Place(rank, local_rank, num_ranks, str(values["MASTER_ADDR"]), port, launcher)


def _is_slurm_task() -> bool:
    # An interactive shell has the variables of its allocation, but is no task of several.
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return os.environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in os.environ and not is_shell


def describe_rank(local_rank: int, num_ranks: int, accelerator: str, configs: Sequence[str] = ()) -> Report:
    """Say what this process stands on; nothing is imported for it but torch.

    Args:
        local_rank: its number on its host, and that of its device.
        num_ranks: how many ranks it thinks there are.
        accelerator: `cpu` or `cuda`.
        configs: files whose content is compared.

    Returns:
        Words by name, with an `error` if it has no device.
    """
    report = {
        "host": socket.gethostname(),
        "num_ranks": str(num_ranks),
        "kind": accelerator,
        "device": f"cpu, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "sat_lightning": f"{__version__} ({hash_files(Path(__file__).parents[1])})",
        **{name: _version_of(name) for name in ("torch", "lightning", "deepspeed")},
        "cuda": torch.version.cuda or "none",
        "nccl": "none",
    }
    report |= {f"config {path}": hash_files(Path(path)) for path in configs}
    if accelerator == "cuda":
        report |= _describe_gpu(local_rank)
    return report


def compare(reports: Mapping[int, Report]) -> tuple[list[str], list[str]]:
    """Find who differs from the most, rank 0 being right between equals.

    Args:
        reports: of the ranks that came.

    Returns:
        What hinders a run, one line for each rank and thing, and what may only slow it down.
    """
    problems = [f"{_name(rank, report)}: {report['error']}" for rank, report in reports.items() if "error" in report]
    files = dict.fromkeys(name for report in reports.values() for name in report if name.startswith("config "))
    for name in (*COMPARED, *files):
        problems += _who_differs(name, reports)
    owners: dict[str, int] = {}
    for rank, report in reports.items():
        if (device := report.get("uuid")) and owners.setdefault(device, rank) != rank:
            problems.append(
                f"{_name(rank, report)}: shares its device with rank {owners[device]}. Give each rank its own: see "
                "LOCAL_RANK and CUDA_VISIBLE_DEVICES."
            )
    return problems, _who_differs("chip", reports)


def table(reports: Mapping[int, Report], launcher: str) -> str:
    """Return one line for each rank.

    Args:
        reports: of the ranks that came.
        launcher: who started them.
    """
    rows: list[tuple[str, ...]] = [("rank", *COLUMNS)]
    rows += [(str(rank), *(report.get(name, "?") for name in COLUMNS)) for rank, report in sorted(reports.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"started by: {launcher}"])


def hash_files(path: Path) -> str:
    """Return the first letters of a hash of a file, or of all Python files of a folder.

    Args:
        path: `missing` is the answer if nothing is there.
    """
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return "missing"
        digest.update(file.relative_to(path).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _who_differs(name: str, reports: Mapping[int, Report]) -> list[str]:
    values = {rank: report.get(name, "none") for rank, report in sorted(reports.items())}
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    # Between equally many, the first one met, which is rank 0's: max keeps the first.
    usual = max(counts, key=lambda value: counts[value])
    others = f"{counts[usual]} ranks have" if counts[usual] > 1 else f"rank {_owner(values, usual)} has"
    return [
        f"{_name(rank, reports[rank])}: {name} is {value}, {others} {usual}."
        for rank, value in values.items()
        if value != usual
    ]


def _owner(values: Mapping[int, str], wanted: str) -> int:
    return next(rank for rank, value in values.items() if value == wanted)


def _name(rank: int, report: Report) -> str:
    return f"rank {rank} on {report['host']}"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _describe_gpu(local_rank: int) -> Report:
    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        reason = f"local rank {local_rank} has no device: {count} are visible, CUDA_VISIBLE_DEVICES is {visible}."
        return {"device": "none", "error": reason}
    properties = torch.cuda.get_device_properties(local_rank)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    chip, uuid = properties.name, str(getattr(properties, "uuid", ""))
    return {"device": f"cuda:{local_rank} {chip}", "chip": chip, "uuid": uuid, "nccl": nccl}
