"""The cache: everything goes where it is told to, and what nobody uses any more can be removed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from filelock import FileLock

from sat_lightning import SATDataModule
from sat_lightning.cli import main
from sat_lightning.data import SampleOptions, SourceOptions, open_source
from sat_lightning.data.cache import CacheEntry, clean_cache, list_cache
from sat_lightning.errors import DataError
from sat_lightning.training import DataOptions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two corpora, an index, lengths and a copy, and a default cache that must stay empty."""
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    with fsspec.open("memory://bucket/far.jsonl", "wb") as file:
        file.write(b'{"text": "far away"}\n' * 50)
    (tmp_path / "near.txt").write_text("near by " * 100)
    options = {"cache_dir": str(tmp_path / "cache")}
    for path in ("memory://bucket/far.jsonl", str(tmp_path / "near.txt")):
        SATDataModule(path, 8, 4, options=DataOptions(**options)).setup()
    samples = DataOptions(**options, samples=SampleOptions(), max_tokens=64)
    next(iter(SATDataModule("memory://bucket/far.jsonl", 8, 4, options=samples, validation=0).train_dataloader()))
    assert not (tmp_path / "home").exists()
    return tmp_path / "cache"


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(path / "meta.json" if path.is_dir() else path, (then, then))


def paths(entries: list[CacheEntry]) -> set[Path]:
    return {entry.path for entry in entries}


def kinds(cache: Path) -> list[str]:
    return sorted(entry.what.partition("/")[0] for entry in list_cache(cache))


def test_everything_goes_where_it_is_told_to(cache: Path) -> None:
    assert len(kinds(cache)) == 5
    assert kinds(cache)[:3] == ["index", "remote", "tokens"]
    names = {entry.what for entry in list_cache(cache)}
    assert {"tokens of memory://bucket/far.jsonl", f"tokens of {cache.parent}/near.txt"} < names
    assert sum(entry.num_bytes for entry in list_cache(cache)) > 1000


def test_a_cache_elsewhere_is_the_same_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    fingerprints = {
        open_source(str(tmp_path / "a.txt"), SourceOptions(cache_dir=place)).fingerprint() for place in (None, "x", "y")
    }
    assert len(fingerprints) == 1


def test_what_was_not_used_goes_and_using_it_keeps_it(cache: Path, tmp_path: Path) -> None:
    assert clean_cache(cache) == []
    for entry in list_cache(cache):
        age(entry.path, 40)
    SATDataModule(str(tmp_path / "near.txt"), 8, 4, options=DataOptions(cache_dir=str(cache))).setup()
    would = clean_cache(cache, dry_run=True)
    assert len(would) == 4 and len(kinds(cache)) == 5
    assert paths(clean_cache(cache)) == paths(would)
    assert [entry.what for entry in list_cache(cache)] == [f"tokens of {tmp_path}/near.txt"]
    # And what was removed is made again.
    again = SATDataModule("memory://bucket/far.jsonl", 8, 4, options=DataOptions(cache_dir=str(cache)))
    assert len(again.rows("train")) > 0 and len(kinds(cache)) == 3


def test_what_is_oldest_goes_until_the_rest_is_small_enough(cache: Path) -> None:
    for days, entry in enumerate(list_cache(cache)):
        age(entry.path, days + 1)
    entries = list_cache(cache)
    left = sum(entry.num_bytes for entry in entries[2:])
    assert paths(clean_cache(cache, max_gigabytes=left / 1e9)) == paths(entries[:2])
    assert paths(list_cache(cache)) == paths(entries[2:])


def test_what_is_being_prepared_stays(cache: Path, tmp_path: Path) -> None:
    (cache / "mine.txt").write_text("no part of the cache")
    (cache / "own").mkdir()
    store = next(entry.path for entry in list_cache(cache) if entry.what.endswith("near.txt"))
    with FileLock(store.with_name(store.name + ".lock")):
        assert len(clean_cache(cache, unused_days=0)) == 4
    assert [entry.path for entry in list_cache(cache)] == [store]
    (store / "tokens.bin").write_bytes(b"")
    assert list_cache(cache)[0].what == f"damaged tokens in {store.name}"
    assert len(clean_cache(cache, unused_days=0)) == 1 and (cache / "mine.txt").is_file() and (cache / "own").is_dir()
    assert clean_cache(tmp_path / "nowhere", unused_days=0) == []


def test_a_store_in_use_is_read_on(cache: Path, tmp_path: Path) -> None:
    data: Any = SATDataModule(str(tmp_path / "near.txt"), 8, 4, options=DataOptions(cache_dir=str(cache)))
    first = data.rows("train")[0]["input_ids"]
    clean_cache(cache, unused_days=0)
    assert np.array_equal(data.rows("train")[0]["input_ids"], first)


def test_as_a_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["clean-cache", "--cache_dir", str(cache), "--unused_days", "0", "--dry_run"])
    assert f"5 entries, 0.0 MB would be removed from {cache}" in capsys.readouterr().out
    main(["clean-cache", "--cache_dir", str(cache), "--max_gigabytes", "0"])
    out = capsys.readouterr().out
    assert "tokens of memory://bucket/far.jsonl" in out and "5 entries, 0.0 MB removed" in out
    for words, code, message in (
        (["--unused_dais", "3"], 2, "unrecognized arguments: --unused_dais 3. Known are --cache_dir"),
        (["--unused_days", "-3"], 1, "cache: unused_days is -3.0 and max_gigabytes inf. Give 0 or more."),
    ):
        with pytest.raises(SystemExit) as exit_of:
            main(["clean-cache", *words])
        assert exit_of.value.code == code and message in capsys.readouterr().err
    with pytest.raises(DataError, match="Give 0 or more"):
        clean_cache(cache, max_gigabytes=float("nan"))
