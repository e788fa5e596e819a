"""The token store: what it holds, that it is built once, and that nothing half-built or damaged is taken for it."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sat_lightning.data.preparation import default_cache_dir, prepare_store
from sat_lightning.data.sources import SourceOptions, Unfinished, open_source
from sat_lightning.data.store import TokenStore
from sat_lightning.data.tokenizer import ByteTokenizer
from sat_lightning.errors import DataError


class Documents:
    """Documents in a list, as a source."""

    name = "documents"
    num_bytes = 0

    def __init__(self, *documents: str | bytes | np.ndarray) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[str | bytes | np.ndarray]:
        return iter(self.documents)

    def fingerprint(self) -> str:
        return repr(self.documents)


class WideTokenizer(ByteTokenizer):
    """Byte values moved up to where two bytes are not enough."""

    vocab_size = 100257
    fingerprint = "wide"

    def encode(self, text: str | bytes) -> np.ndarray:
        return super().encode(text) + 100000


class NarrowTokenizer(ByteTokenizer):
    """Seven-bit text, closed by 0."""

    vocab_size = 128
    end_of_document_id = 0
    fingerprint = "narrow"


def prepare(source: object, cache: Path) -> TokenStore:
    return prepare_store(source, ByteTokenizer(), cache)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text("some text " * 1000)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_documents_follow_each_other_closed_by_an_end(cache: Path) -> None:
    store = prepare(Documents("ab", "", b"c", Unfinished(b"d"), Unfinished(b"e"), b"f", Unfinished(b"g"), b""), cache)
    assert store.tokens.tolist() == [97, 98, 256, 99, 256, 100, 101, 102, 256, 103, 256]
    meta = store.meta
    assert (meta.num_tokens, meta.num_documents, meta.max_token_id, meta.text_bytes) == (11, 4, 256, 7)
    assert store.bytes_per_token == 7 / 11
    assert json.loads((store.folder / "meta.json").read_text())["tokenizer_fingerprint"] == "bytes-257"


@pytest.mark.parametrize(
    ("tokenizer", "dtype"), [(NarrowTokenizer(), "uint8"), (ByteTokenizer(), "uint16"), (WideTokenizer(), "uint32")]
)
def test_smallest_element_type_that_fits(cache: Path, tokenizer: ByteTokenizer, dtype: str) -> None:
    store = prepare_store(Documents("ab"), tokenizer, cache)
    assert store.tokens.dtype == np.dtype(dtype)
    assert store.tokens.tolist() == [*tokenizer.encode("ab").tolist(), tokenizer.end_of_document_id]
    assert (store.folder / "tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_built_once_and_again_when_the_text_or_the_tokenizer_changes(text: Path, cache: Path) -> None:
    first = prepare(open_source(str(text)), cache)
    built = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = prepare(open_source(str(text)), cache)
    assert again.folder == first.folder and (again.folder / "tokens.bin").stat().st_mtime_ns == built

    text.write_text("other text, longer " * 1000)
    changed = prepare(open_source(str(text)), cache)
    assert changed.folder != first.folder and len(changed) == 19001
    assert prepare_store(open_source(str(text)), WideTokenizer(), cache).folder not in (first.folder, changed.folder)


def test_the_cache_is_in_sat_home_unless_said_otherwise(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    assert prepare(open_source(str(text)), None).folder.parent == tmp_path / "home" / "data"
    monkeypatch.delenv("SAT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "sat_lightning" / "data"


def test_store_is_mapped_not_loaded(text: Path, cache: Path) -> None:
    store = prepare(open_source(str(text)), cache)
    base = store.tokens.base
    assert isinstance(base, np.memmap) and not store.tokens.flags.writeable
    assert len(pickle.dumps(store)) < 2000  # what a worker is sent
    assert np.array_equal(pickle.loads(pickle.dumps(store)).tokens, store.tokens)


def test_building_does_not_hold_the_corpus_in_memory(cache: Path) -> None:
    class Endless(Documents):
        def __iter__(self) -> Iterator[bytes]:
            return (b"x" * 50_000 for _ in range(1000))  # 50 MB

    tracemalloc.start()
    try:
        store = prepare(Endless(), cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(store) == 50_001_000
    assert peak < 30_000_000


def test_killed_preparation_leaves_nothing_that_looks_complete(text: Path, cache: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from sat_lightning.data import preparation, sources, tokenizer\n"
        "class Killed(tokenizer.ByteTokenizer):\n"
        "    def encode(self, text):\n"
        "        os.kill(os.getpid(), signal.SIGKILL) if text[0] == 75 else None\n"
        "        return super().encode(text)\n"
        "preparation._BATCH_DOCUMENTS = 1\n"
        "source = sources.open_source(sys.argv[1].split(','))\n"
        "preparation.prepare_store(source, Killed(), sys.argv[2])\n"
    )
    killer = text.with_name("killer.txt")
    killer.write_text("K")
    paths = [str(text), str(killer)]
    process = subprocess.run([sys.executable, "-c", program, ",".join(paths), str(cache)], timeout=60)
    assert process.returncode == -9
    left = sorted(path.suffix for path in cache.iterdir())
    assert left == [".lock", ".partial"]
    assert (next(cache.glob("*.partial")) / "tokens.bin").exists()

    store = prepare(open_source(paths), cache)  # same fingerprints, hence the same place
    assert len(store) == 10003 and list(cache.glob("*.partial")) == []
    assert sorted(path.name for path in cache.iterdir()) == [store.folder.name, f"{store.folder.name}.lock"]


def test_failed_preparation_cleans_up(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(DataError, match="line 2"):
        prepare(open_source(str(tmp_path / "a.jsonl")), cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["truncated", "without meta", "version"])
def test_damaged_store_is_refused_and_prepared_again(text: Path, cache: Path, damage: str) -> None:
    store = prepare(open_source(str(text)), cache)
    tokens, meta = store.folder / "tokens.bin", store.folder / "meta.json"
    if damage == "truncated":
        tokens.write_bytes(tokens.read_bytes()[:-7])
        message = r"is damaged: tokens\.bin has 19995 bytes, and 10001 tokens of uint16 need 20002\. Delete the folder"
    elif damage == "without meta":
        meta.unlink()
        message = r"is no complete token store: meta\.json cannot be read .* Delete the folder"
    else:
        meta.write_text(meta.read_text().replace('"format_version": 1', '"format_version": 9'))
        message = r"has format version 9, and this is version 1\. Delete the folder"
    with pytest.raises(DataError, match=message):
        TokenStore(store.folder)
    with pytest.warns(UserWarning, match=r"It is prepared again now"):
        assert len(prepare(open_source(str(text)), cache)) == 10001


def test_one_token_file_is_mapped_where_it_lies(tmp_path: Path, cache: Path) -> None:
    ids = np.array([3, 1, 40000, 2], dtype=np.uint16)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", ids.astype(np.uint32))
    for name in ("a.bin", "b.npy"):
        store = prepare(open_source(str(tmp_path / name)), cache)
        assert store.tokens.tolist() == ids.tolist() and store.meta.max_token_id == 40000
        assert store.bytes_per_token is None and store.meta.num_documents is None
        assert store.meta.tokens_file == str(tmp_path / name)
        assert (store.folder / "tokens.bin").stat().st_size == 0
    both = prepare(open_source([str(tmp_path / "a.bin"), str(tmp_path / "b.npy")]), cache)
    assert both.tokens.tolist() == ids.tolist() * 2 and both.tokens.dtype == np.uint32


def test_bad_token_sources(tmp_path: Path, cache: Path, text: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, -2]))
    with pytest.raises(DataError, match=r"a\.npy: token id -2 is negative\. Write the file again"):
        prepare(open_source(str(tmp_path / "a.npy")), cache)
    np.array([1], dtype=np.uint16).tofile(tmp_path / "b.bin")
    for paths in ([text, tmp_path / "b.bin"], [tmp_path / "b.bin", text]):
        with pytest.raises(DataError, match=r"token files \(\.bin, \.npy\) and text in one source"):
            prepare(open_source([str(path) for path in paths]), cache)


def test_source_without_text_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.bin").touch()
    for name in ("empty.txt", "empty.bin"):
        with pytest.raises(DataError, match=rf"data path '.*{name}' is empty: 0 tokens in it\. Give a path with"):
            prepare(open_source(str(tmp_path / name), SourceOptions()), cache)


def test_next_document_looks_no_further_than_its_reach(cache: Path) -> None:
    store = prepare(Documents("abc", "de", "fghijk"), cache)  # documents start at 0, 4 and 7; 14 tokens
    assert [store.next_document(position, 2) for position in (0, 1, 2, 3, 4, 5, 7, 8, 13, 14)] == [
        *(0, 1, 4, 4, 4, 7, 7, 8, 14, 14)
    ]
