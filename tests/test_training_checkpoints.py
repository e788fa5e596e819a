"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sat_lightning.errors import CheckpointError
from sat_lightning.training.checkpoints import (
    COMPLETE_NAME,
    AtomicCheckpointIO,
    commit,
    find_resume_checkpoint,
    inspect_checkpoint,
    partial_path,
)
from sat_lightning.training.rng import capture_rng, derive_rng, restore_rng


def content(step: int = 1, saved_at: float | None = None) -> dict:
    known = {} if saved_at is None else {"exact_resume": {"saved_at": saved_at}}
    return {"loops": {}, "optimizer_states": [], "global_step": step, "weights": torch.rand(5000), **known}


def test_full_disk_is_an_error_and_the_earlier_checkpoint_stays(tmp_path: Path) -> None:
    writer, earlier = AtomicCheckpointIO(), tmp_path / "checkpoints" / "step=1.ckpt"
    writer.save_checkpoint(content(), earlier)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        for target in (tmp_path / "checkpoints" / "step=2.ckpt", earlier):
            with pytest.raises(CheckpointError) as refused:
                writer.save_checkpoint(content(2), target)
            assert f"{target} could not be written: " in str(refused.value)
            assert f"The earlier checkpoint {earlier} stays. Make room" in str(refused.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "checkpoints") == ["step=1.ckpt"]
    assert find_resume_checkpoint(tmp_path) == earlier
    assert inspect_checkpoint(earlier).global_step == 1


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, step, saved_at in (("a", 30, 100.0), ("b", 10, 300.0), ("c", 20, 200.0)):
        torch.save(content(step, saved_at), folder / f"{name}.ckpt")
    torch.save({"state_dict": {}}, folder / "weights.ckpt")
    torch.save(content(40, 400.0), folder / ".d.ckpt.partial")
    whole = (folder / "b.ckpt").read_bytes()
    (folder / "e.ckpt").write_bytes(whole[:-100])
    (folder / "last.ckpt").symlink_to("b.ckpt")
    assert find_resume_checkpoint(tmp_path) == folder / "b.ckpt"
    for name in ("a", "b", "c"):
        (folder / f"{name}.ckpt").unlink()
    with pytest.raises(CheckpointError) as refused:
        find_resume_checkpoint(tmp_path)
    for text in ("no complete checkpoint", "e.ckpt cannot be read", "holds weights", ".d.ckpt.partial was not written"):
        assert text in str(refused.value)


def test_last_one_written_is_never_removed_and_leftovers_are(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO()
    (tmp_path / ".old.ckpt.partial").write_bytes(b"half")
    writer.save_checkpoint(content(), tmp_path / "a.ckpt")
    writer.save_checkpoint(content(), tmp_path / "b.ckpt")
    writer.remove_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="b.ckpt is the newest checkpoint and stays"):
        writer.remove_checkpoint(tmp_path / "b.ckpt")
    assert os.listdir(tmp_path) == ["b.ckpt"]


def test_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step=1.ckpt"
    for step in (1, 2):
        partial = partial_path(target)
        partial.mkdir(parents=True)
        torch.save(content(step), partial / "state.ckpt")
        commit(partial, target)
        assert inspect_checkpoint(target).global_step == step
        assert find_resume_checkpoint(tmp_path) == target
    assert os.listdir(target.parent) == ["step=1.ckpt"]
    (target / COMPLETE_NAME).unlink()
    with pytest.raises(CheckpointError, match="has no file 'complete'"):
        find_resume_checkpoint(tmp_path)


def test_reading_executes_nothing(tmp_path: Path) -> None:
    torch.save({"x": OrderedDict(a=1), "path": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="holds objects that a safe read refuses"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["path"] == Path("x")


def test_random_states_come_back_and_derive_the_same_way_each_time() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))]

    draw()  # leaves half a pair of normal numbers in the state of each
    state = capture_rng(torch.device("cpu"))
    first = draw()
    assert draw() != first
    restore_rng(state, torch.device("cpu"))
    assert draw() == first
    drawn = []
    for rank, num_ranks in ((0, 2), (1, 2), (0, 3), (0, 2)):
        derive_rng([state], rank, num_ranks)
        drawn.append(tuple(draw()))
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
