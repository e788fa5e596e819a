"""What every test stands on: one thread, one seed, no network, and a SAT_HOME of its own."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# Read by the libraries at their import, hence set before any of them is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import pytest
import torch

from sat_lightning.model.unfinished_kernels import drop_unfinished_kernels

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test draws the same numbers, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_rank() -> Iterator[None]:
    """A strategy that ran in this process leaves its rank in the environment; processes started later must not take it.

    Of two that inherit the address of a group that stands here, the first cannot listen, and the second waits forever.
    """
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_remote_files() -> None:
    """What a test put under `memory://` is gone for the next one, whichever that is."""
    if memory := sys.modules.get("fsspec.implementations.memory"):
        memory.MemoryFileSystem.store.clear()
        memory.MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def no_unfinished_kernels() -> None:
    """A run that was stopped while it compiled decides nothing here; for tests that go through the code generator."""
    drop_unfinished_kernels()


@pytest.fixture(autouse=True)
def sat_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> os.PathLike[str]:
    """An empty folder as SAT_HOME: no test reads or writes the user's own."""
    home = tmp_path_factory.mktemp("sat_home")
    monkeypatch.setenv("SAT_HOME", str(home))
    return home
