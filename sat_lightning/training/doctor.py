"""`sat-lightning doctor`: can these processes train together, and if not, who stands in the way?

Alone it looks at this process; with `--devices 2` it starts two here; under torchrun or SLURM it is one of those that
were started. Every rank writes what it is to a store that rank 0 holds. Rank 0 compares, lets all of them add a
number up, and says what it found. Every wait has an end, and nobody waits for a rank that never came.
"""

import argparse
import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from sat_lightning.errors import ConfigError, UsageError
from sat_lightning.training.ranks import Place, Report, compare, describe_rank, find_place, table

PROGRAM = "sat-lightning doctor"
Processes = dict[int, "subprocess.Popen[bytes]"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. The options are --devices, --accelerator, --config and --timeout.")


def run_doctor(verb: str, words: list[str]) -> None:
    """Examine the ranks of a run to be.

    Args:
        verb: `doctor`.
        words: options.

    Raises:
        UsageError: an option is not known.
        ConfigError: rank 0 cannot be reached, or what the launcher says contradicts itself.
        SystemExit: with code 1, and the reasons on stderr, if these ranks cannot train together.
    """
    parser = _Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--devices", type=int, help="processes to start here; not under torchrun or SLURM")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--config", action="append", default=[], help="a file that has to be the same on all ranks")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the other ranks, each time")
    options = parser.parse_args(words)
    if options.timeout <= 0 or (options.devices is not None and options.devices < 1):
        raise UsageError("--timeout must be above 0, and --devices at least 1.")
    place = find_place()
    if options.devices is not None and place.launcher != "alone":
        raise UsageError(f"--devices starts processes, but {place.launcher} has started them. Leave it out.")
    if options.accelerator == "auto":
        options.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    # What none of the limits below may catch, such as a driver that does not return, ends here.
    faulthandler.dump_traceback_later(4 * options.timeout + 120, exit=True, file=2)
    try:
        problems = _examine(place, options, words)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if problems:
        sys.stdout.flush()
        if place.rank == 0:
            sys.stderr.write("".join(f"{PROGRAM}: error: {problem}\n" for problem in problems))
        raise SystemExit(1)


def _examine(place: Place, options: argparse.Namespace, words: list[str]) -> list[str]:
    if place.launcher == "alone" and (options.devices or 1) > 1:
        place = Place(num_ranks=options.devices, launcher="doctor")
    server = _connect(place, options.timeout)
    # Each attempt of torchrun speaks for itself, though its store may be the same.
    store = PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    report = describe_rank(place.local_rank, place.num_ranks, options.accelerator, options.config)
    if store.add(f"claim/{place.rank}", 1) > 1:
        raise ConfigError(f"rank {place.rank} on {report['host']}: another process is rank {place.rank} already.")
    store.set(f"report/{place.rank}", json.dumps(report))
    if place.rank:
        return _follow(place, store, options)
    num_started = place.num_ranks if place.launcher == "doctor" else 0
    with _started(num_started, server.port, words) as processes:
        return _lead(place, store, options, processes)


def _connect(place: Place, seconds: float) -> TCPStore:
    # torchrun's agent may hold the store of this address itself; then everybody is a guest.
    is_host = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{place.address}:{place.port}"
    if not is_host and not _answers(place, seconds):
        raise ConfigError(
            f"rank {place.rank}: rank 0 does not answer at {where} within {seconds:g} s. It has not started, or a "
            "firewall or a wrong MASTER_ADDR stands between."
        )
    limit = timedelta(seconds=seconds)
    try:
        return TCPStore(place.address, place.port, is_master=is_host, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        verb = "listen at" if is_host else "join the store at"
        raise ConfigError(
            f"rank {place.rank} cannot {verb} {where}: {_first_line(error)} Free the port, or set MASTER_PORT to "
            "another."
        ) from error


def _answers(place: Place, seconds: float) -> bool:
    """Knock until somebody listens: torch itself would fill the screen with what it tries."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((place.address, place.port), timeout=left).close()
            return True
        except OSError:
            time.sleep(min(0.2, left))
    return False


def _lead(place: Place, store: Store, options: argparse.Namespace, processes: Processes) -> list[str]:
    """Hear everybody, let them add up, and tell the verdict."""
    reports: dict[int, Report] = _collect(store, "report", range(place.num_ranks), options.timeout, processes)
    missing = [rank for rank in range(place.num_ranks) if rank not in reports]
    limit = f"within {options.timeout:g} s, or ended before."
    problems = [f"rank {rank} is missing: it gave no sign {limit}" for rank in missing]
    found, notes = compare(reports)
    problems += found
    can_reduce = not missing and all("error" not in report for report in reports.values())
    store.set("plan", "reduce" if can_reduce else "stop")
    sys.stdout.write(table(reports, place.launcher) + "\n" + "".join(f"note: {note}\n" for note in notes))
    if can_reduce:
        own = all_reduce(place, store, options)
        store.set("done/0", json.dumps(own))
        done = _collect(store, "done", range(place.num_ranks), options.timeout, processes)
        for rank in range(place.num_ranks):
            said = done.get(rank, {"error": f"it gave no sign {limit}"})
            if "error" in said:
                problems.append(f"rank {rank} on {reports[rank]['host']}: the all-reduce failed: {said['error']}")
        sys.stdout.write(f"{own['text']}\n" if "text" in own else "")
    store.set("verdict", json.dumps(problems))
    _collect(store, "bye", [rank for rank in reports if rank], min(options.timeout, 10.0), processes)
    if not problems:
        sys.stdout.write(f"ok: {place.num_ranks} {'rank' if place.num_ranks == 1 else 'ranks'} can train together\n")
    return problems


def _follow(place: Place, store: Store, options: argparse.Namespace) -> list[str]:
    """Do as rank 0 says."""
    if _hear(place, store, "plan", 2 * options.timeout) == "reduce":
        store.set(f"done/{place.rank}", json.dumps(all_reduce(place, store, options)))
    problems = _hear(place, store, "verdict", 3 * options.timeout)
    store.set(f"bye/{place.rank}", "{}")
    return list(json.loads(problems))


def all_reduce(place: Place, store: Store, options: argparse.Namespace) -> dict[str, Any]:
    """Add up a number of each rank, and then many.

    Args:
        place: this rank.
        store: where the ranks find each other.
        options: `accelerator` and `timeout`.

    Returns:
        `text`, what was measured, or `error`, what went wrong.
    """
    is_cuda = options.accelerator == "cuda"
    device, backend = (f"cuda:{place.local_rank}", "nccl") if is_cuda else ("cpu", "gloo")
    # A wait that ends in an error, not in the end of the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    limit, num_megabytes = timedelta(seconds=options.timeout), 64 if is_cuda else 4
    try:
        group, rank, num_ranks = PrefixStore("group", store), place.rank, place.num_ranks
        if is_cuda:
            torch.cuda.set_device(device)
            dist.init_process_group(backend, store=group, rank=rank, world_size=num_ranks, timeout=limit)
        # On CPUs a group of our own: a process that calls us may have one already.
        gloo: Any = None if is_cuda else dist.ProcessGroupGloo(group, rank, num_ranks, limit)
        seconds = []
        for size in (1, 1, num_megabytes << 18):
            numbers = torch.full((size,), place.rank + 1.0, device=device)
            start = time.perf_counter()
            dist.all_reduce(numbers) if gloo is None else gloo.allreduce([numbers]).wait()
            total = numbers[-1].item()  # waits
            seconds.append(time.perf_counter() - start)
            if total != (expected := place.num_ranks * (place.num_ranks + 1) / 2):
                return {"error": f"the sum is {total:g}, and should be {expected:g}."}
    except Exception as error:
        hint = "NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO" if is_cuda else "GLOO_SOCKET_IFNAME"
        return {"error": f"{_first_line(error)} See {hint} if the network has several interfaces."}
    rate = num_megabytes / 1024 / seconds[-1]
    text = f"all-reduce ({backend}): {1e3 * seconds[1]:.2f} ms for one number, {rate:.2f} GiB/s for {num_megabytes} MiB"
    return {"text": text}


def _collect(
    store: Store, name: str, ranks: Iterable[int], seconds: float, processes: Processes
) -> dict[int, dict[str, Any]]:
    """Return what the ranks have written, of those that do so in time and before they end."""
    deadline, found, waiting = time.monotonic() + seconds, {}, list(ranks)
    while waiting:
        # Known before we look: what was written in time is heard. Not wait(): it says on stderr that it waited.
        is_over = time.monotonic() >= deadline
        ended = {rank for rank in waiting if rank in processes and processes[rank].poll() is not None}
        for rank in [rank for rank in waiting if store.check([f"{name}/{rank}"])]:
            found[rank] = json.loads(store.get(f"{name}/{rank}"))
            waiting.remove(rank)
        waiting = [] if is_over else [rank for rank in waiting if rank not in ended]
        time.sleep(0.02 if waiting else 0.0)
    return found


def _hear(place: Place, store: Store, key: str, seconds: float) -> str:
    try:
        store.wait([key], timedelta(seconds=seconds))
        return store.get(key).decode()
    except RuntimeError as error:
        raise ConfigError(f"rank {place.rank}: rank 0 fell silent; no {key} within {seconds:g} s.") from error


@contextmanager
def _started(num_ranks: int, port: int, words: list[str]) -> Iterator[Processes]:
    """Start the other ranks here, and see to it that they end."""
    command = [sys.executable, "-m", "sat_lightning", "doctor", *_without_devices(words)]
    processes: Processes = {}
    for rank in range(1, num_ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1"}
        own["MASTER_PORT"] = port
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        processes[rank] = subprocess.Popen(command, env=environment)
    try:
        yield processes
    finally:
        for process in processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _without_devices(words: list[str]) -> list[str]:
    kept = [w for w, before in zip(words, ["", *words], strict=False) if "--devices" not in (w, before)]
    return [word for word in kept if not word.startswith("--devices=")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
