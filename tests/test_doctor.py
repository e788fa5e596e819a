from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_lightning.cli import main
from sat_lightning.errors import ConfigError
from sat_lightning.training import doctor
from sat_lightning.training.ranks import Place, compare, describe_rank, find_place, hash_files, table

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name in VARIABLES or name.startswith(("SLURM", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    # Limits are for what never comes: what comes slowly on a busy machine is waited for.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    was_initialized = torch.distributed.is_initialized()
    yield
    assert torch.distributed.is_initialized() == was_initialized


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int, port: int) -> None:
    for name, value in zip(VARIABLES, (rank, rank, num_ranks, "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, str(value))


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> str:
    """The reasons of a refusal; its exit code is checked."""
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--accelerator", "cpu", *words])
    assert stop.value.code == code
    return capsys.readouterr().err


def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--accelerator", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "rank host device python torch lightning deepspeed cuda nccl".split()
    assert lines[1].split()[:2] == ["0", socket.gethostname()] and torch.__version__ in lines[1]
    assert lines[2] == "started by: alone"
    assert lines[3].startswith("all-reduce (gloo): ") and lines[-1] == "ok: 1 rank can train together"


def test_a_group_of_the_caller_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    was_initialized = torch.distributed.is_initialized()
    if not was_initialized:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    main(["doctor", "--accelerator", "cpu"])
    assert torch.distributed.is_initialized() and "ok: 1 rank can train" in capsys.readouterr().out
    if not was_initialized:
        torch.distributed.destroy_process_group()


@pytest.mark.timeout(600)
def test_two_processes_started_here(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed_everything: 1")
    command = [sys.executable, "-m", "sat_lightning", "doctor", "--devices", "2", "--accelerator", "cpu"]
    result = subprocess.run(
        [*command, "--config", "run.yaml", "--timeout=500"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"] and lines[3] == "started by: doctor"
    assert lines[-1] == "ok: 2 ranks can train together"


IMPORTS = """
import os
import sys
from sat_lightning.cli import main
from sat_lightning.training import doctor
"""


def start_instead(monkeypatch: pytest.MonkeyPatch, script: Path, text: str) -> None:
    """Let the other ranks run a script, which can break what a real rank would not."""
    script.write_text(IMPORTS + text)
    popen = subprocess.Popen

    def start(command: list[str], **settings: Any) -> subprocess.Popen:
        return popen([sys.executable, str(script), *command[3:]], **settings)

    monkeypatch.setattr(doctor.subprocess, "Popen", start)


DIFFERS = """
describe = doctor.describe_rank
doctor.describe_rank = lambda *args: {**describe(*args), "host": "node-7", "torch": "1.0", "config run.yaml": "abc"}
main(["doctor", *sys.argv[2:]])
"""


@pytest.mark.timeout(600)
def test_a_rank_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("a")
    start_instead(monkeypatch, tmp_path / "differs.py", DIFFERS)
    error = refused(capsys, "--devices", "2", "--timeout", "500", "--config", "run.yaml")
    assert error.splitlines() == [
        f"sat-lightning doctor: error: rank 1 on node-7: torch is 1.0, rank 0 has {torch.__version__}.",
        f"sat-lightning doctor: error: rank 1 on node-7: config run.yaml is abc, rank 0 has "
        f"{hash_files(Path('run.yaml'))}.",
    ]


DIES = """
doctor.all_reduce = lambda *args: os._exit(1)
main(["doctor", *sys.argv[2:]])
"""


@pytest.mark.timeout(600)
def test_a_rank_that_dies_in_the_middle_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start_instead(monkeypatch, tmp_path / "dies.py", DIES)
    wait = doctor._collect

    def collect(store: Any, name: str, ranks: Any, seconds: float, processes: Any) -> Any:
        return wait(store, name, ranks, seconds if name == "report" else 0.1, processes)

    monkeypatch.setattr(doctor, "_collect", collect)
    reduce = doctor.all_reduce

    def impatient(place: Any, store: Any, options: Any) -> Any:
        options.timeout = 1.0
        return reduce(place, store, options)

    monkeypatch.setattr(doctor, "all_reduce", impatient)
    lines = refused(capsys, "--devices", "2", "--timeout", "500").splitlines()
    host = socket.gethostname()
    assert lines[0].startswith(f"sat-lightning doctor: error: rank 0 on {host}: the all-reduce failed: ")
    assert lines[0].endswith("See GLOO_SOCKET_IFNAME if the network has several interfaces.")
    assert lines[1].endswith(f"rank 1 on {host}: the all-reduce failed: it gave no sign within 500 s, or ended before.")


def test_ranks_that_never_come_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    be_rank(monkeypatch, 0, 3, port=0)
    error = refused(capsys, "--timeout", "0.2")
    prefix = "sat-lightning doctor: error: "
    assert error.splitlines() == [
        f"{prefix}rank {n} is missing: it gave no sign within 0.2 s, or ended before." for n in (1, 2)
    ]


def test_rank_zero_that_never_comes_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        be_rank(monkeypatch, 1, 2, port)
        assert refused(capsys, "--timeout", "0.2") == (
            f"sat-lightning doctor: error: rank 1: rank 0 does not answer at 127.0.0.1:{port} within 0.2 s. It has not "
            "started, or a firewall or a wrong MASTER_ADDR stands between.\n"
        )


def test_rank_zero_that_falls_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    be_rank(monkeypatch, 1, 2, store.port)
    assert "rank 1: rank 0 fell silent; no plan within 0.4 s." in refused(capsys, "--timeout", "0.2")
    # It has claimed its place, which nobody else can have.
    assert "another process is rank 1 already." in refused(capsys, "--timeout", "0.2")


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        be_rank(monkeypatch, 0, 2, taken.getsockname()[1])
        error = refused(capsys, "--timeout", "1")
    assert "rank 0 cannot listen at 127.0.0.1:" in error and "set MASTER_PORT to another." in error


@pytest.mark.timeout(600)
def test_a_rank_that_cannot_start_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda command, **settings: popen([sys.executable, "-c", "1 / 0"]))
    with pytest.raises(SystemExit):
        main(["doctor", "--accelerator", "cpu", "--devices", "2", "--timeout", "100000"])
    assert "ZeroDivisionError" in (error := capfd.readouterr().err)
    assert error.endswith("error: rank 1 is missing: it gave no sign within 100000 s, or ended before.\n")


UNDER_TORCHRUN = """
import os
from sat_lightning.cli import main
from sat_lightning.training import doctor
describe = doctor.describe_rank
if os.environ["RANK"] == "1":
    doctor.describe_rank = lambda *args: {**describe(*args), "deepspeed": "0.1"}
try:
    main(["doctor", "--accelerator", "cpu", "--timeout", "500"])
except SystemExit as stop:
    # torchrun ends all ranks as soon as one fails; here each is to be heard.
    open(f"code-{os.environ['RANK']}", "w").write(str(stop.code))
"""


@pytest.mark.timeout(600)
def test_under_torchrun_every_rank_fails_together(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert result.stderr.count("doctor: error: rank 1 on") == 1 and "deepspeed is 0.1, rank 0 has" in result.stderr
    assert "started by: torchrun" in result.stdout and "ok: " not in result.stdout


def test_place_from_torchrun_slurm_and_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_place() == Place() and Place().launcher == "alone"
    slurm = dict(NTASKS=4, PROCID=3, LOCALID=1, NODEID=1, NODELIST="node[3-4]", JOB_ID=12345, NTASKS_PER_NODE=2)
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert find_place() == Place(3, 1, 4, "node3", 17345, "SLURM")
    be_rank(monkeypatch, 1, 2, 29500)
    assert find_place() == Place(1, 1, 2, "127.0.0.1", 29500, "torchrun")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert find_place() == Place()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", None, "RANK is 0, but WORLD_SIZE is not set. Let torchrun set them all."),
        ("WORLD_SIZE", "two", "The launcher's variables are no numbers: "),
        ("RANK", "2", "RANK is 2, and WORLD_SIZE 2: ranks count from 0 to 1."),
    ],
)
def test_what_a_launcher_cannot_mean(
    name: str, value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(monkeypatch, 0, 2, 29500)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        find_place()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "2"], "unrecognized arguments: --device 2. The options are --devices, --accelerator"),
        (["--devices", "0"], "--timeout must be above 0, and --devices at least 1."),
        (["--devices", "two"], "argument --devices: invalid int value: 'two'."),
    ],
)
def test_options_that_do_not_exist(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words, code=2)


def test_devices_are_the_launchers_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_rank(monkeypatch, 0, 2, 0)
    assert "--devices starts processes, but torchrun has started them." in refused(capsys, "--devices", "2", code=2)


def test_the_many_are_right() -> None:
    reports = {rank: {"host": f"n{rank}", "torch": "2.6", "chip": "A100"} for rank in range(4)}
    assert compare(reports) == ([], [])
    reports[0]["torch"] = "2.5"
    reports[3]["chip"] = "H100"
    reports[2]["error"] = "no device"
    problems, notes = compare(reports)
    assert problems == ["rank 2 on n2: no device", "rank 0 on n0: torch is 2.5, 3 ranks have 2.6."]
    assert notes == ["rank 3 on n3: chip is H100, 3 ranks have A100."]
    assert table(reports, "SLURM").splitlines()[1].split() == ["0", "n0", "?", "?", "2.5", "?", "?", "?", "?"]


def test_two_ranks_on_one_device() -> None:
    problems, _ = compare({rank: {"host": "n", "uuid": "GPU-1" if rank else "GPU-0"} for rank in range(3)})
    assert problems == [
        "rank 2 on n: shares its device with rank 1. Give each rank its own: see LOCAL_RANK and CUDA_VISIBLE_DEVICES."
    ]


def test_a_rank_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = describe_rank(1, 2, "cuda")
    assert report["error"] == "local rank 1 has no device: 0 are visible, CUDA_VISIBLE_DEVICES is ."
    assert "local rank 0 has no device" in refused(capsys, "--accelerator", "cuda")


def test_a_hash_tells_files_apart(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = hash_files(tmp_path)
    assert len(first) == 12 and hash_files(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert hash_files(tmp_path) != first and hash_files(tmp_path / "b.py") == "missing"
