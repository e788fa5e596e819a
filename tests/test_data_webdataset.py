"""Shards: samples by number and as a stream, each exactly once, resumed exactly; and what is said of a broken one."""

from __future__ import annotations

import gzip
import io
import json
import logging
import pickle
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from sat_lightning.data import shards as shards_module
from sat_lightning.data import stream as stream_module
from sat_lightning.data import webdataset as webdataset_module
from sat_lightning.data.records import open_records
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.shards import count_samples, expand_shards
from sat_lightning.data.stream import ShardStream, StreamOptions
from sat_lightning.errors import DataError

SIZES = [7, 1, 12, 5, 30, 9]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SAT_HOME", str(folder))
    shards_module._open_by_number.cache_clear()
    return folder


def image_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), color=(1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def array_bytes(values: object, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values), allow_pickle=allow_pickle)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for sample in samples:
            for field, content in sample.items():
                if field != "__key__":
                    member = tarfile.TarInfo(f"{sample['__key__']}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, kind: str = "tar", sizes: list[int] = SIZES) -> str:
    """Shards whose samples are numbered through; returns their pattern."""
    number = 0
    for shard, size in enumerate(sizes):
        numbers = range(number, number := number + size)
        if kind.startswith("tar"):
            samples = [{"__key__": f"{one:05}", "id": str(one).encode()} for one in numbers]
            write_tar(folder / f"{shard:03}.{kind}", samples, "w:gz" if kind.endswith("gz") else "w")
        else:
            text = "".join(json.dumps({"id": one}) + "\n\n" for one in numbers).encode()
            (folder / f"{shard:03}.{kind}").write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    return str(folder / f"{{000..{len(sizes) - 1:03}}}.{kind}")


def ids_of(samples: object) -> list[int]:
    return [sample["id"] for sample in samples]


# By number


def test_samples_by_number_are_decoded_by_name(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a/one", "png": image_bytes(), "cls": b"3", "txt": "ü".encode(), "seg.npy": array_bytes([1, 2])},
        {"__key__": "b/one", "json": b'{"x": [1]}', "bin": b"\0\1", "pkl": pickle.dumps({})},
    ]
    rows = open_records(str(write_tar(tmp_path / "a.tar", samples)))
    first, second = rows[0], pickle.loads(pickle.dumps(rows))[1]
    assert len(rows) == 2 and first["__key__"] == "a/one" and first["__shard__"].endswith("a.tar")
    assert first["png"].shape == (2, 3, 3) and first["png"][0, 0].tolist() == [1, 2, 3]
    assert (first["cls"], first["txt"], first["seg.npy"].tolist()) == (3, "ü", [1, 2])
    assert (second["json"], second["bin"], second["pkl"]) == ({"x": [1]}, b"\0\1", pickle.dumps({}))
    assert set(open_records(str(tmp_path / "a.tar"), fields=["cls"])[0]) == {"__key__", "__shard__", "cls"}
    with pytest.raises(BadSampleError, match=r"a\.tar, key b/one: no field 'cls'; fields there: .*json"):
        open_records(str(tmp_path / "a.tar"), fields=["cls"])[1]


def test_keys_and_fields_are_those_of_the_webdataset_library(tmp_path: Path) -> None:
    names = [{"__key__": "x/y.z/00", "a.b.txt": b"1", "id": b"2"}, {"__key__": "01", "id": b"3"}]
    file = write_tar(tmp_path / "a.tar", names)
    theirs = list(webdataset.WebDataset(str(file), shardshuffle=False))
    ours = open_records(str(file), decode=False)
    for index, sample in enumerate(theirs):
        values = {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")}
        assert values == {key: value for key, value in ours[index].items() if key != "__shard__"}


def test_several_folders_and_braces(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, sizes=[2, 3])
    rows = open_records(str(tmp_path / "{a,b}" / "{000..001}.tar"))
    assert ids_of(rows[index] for index in range(len(rows))) == [*range(5), *range(5)]
    assert [Path(shard).parts[-2:] for shard in expand_shards([str(tmp_path / "b"), str(tmp_path / "a/00*.tar")])] == [
        ("b", "000.tar"), ("b", "001.tar"), ("a", "000.tar"), ("a", "001.tar"),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["local", "memory"])
def test_metadata_beside_a_shard_is_joined_by_key(tmp_path: Path, place: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [{"__key__": key, "id": b"1"} for key in ("x", "y", "z")])
    meta = [{"key": "z", "score": 0.5}, {"key": "x", "score": 0.1, "caption": "ü"}]
    (tmp_path / "a.meta.jsonl").write_text("\n".join(json.dumps(row) for row in meta))
    if place == "local":
        rows = open_records(str(shard))
        read = [rows[index] if index != 1 else None for index in range(3)]
        with pytest.raises(BadSampleError, match=r"a\.tar, key y: no row with this key in its \.meta\.jsonl\. Add it"):
            rows[1]
    else:
        for file in (shard, tmp_path / "a.meta.jsonl"):
            fsspec.filesystem("memory").pipe(f"/meta/{file.name}", file.read_bytes())
        options = StreamOptions(shuffle=False, num_epochs=1, on_bad_sample="skip")
        read = list(ShardStream("memory://meta/a.tar", options))
    assert [None if row is None else (row["__key__"], row["score"], row.get("caption")) for row in read] == [
        ("x", 0.1, "ü"), None, ("z", 0.5, None),
    ]  # fmt: skip
    (tmp_path / "a.meta.jsonl").write_text('{"key": "x"}\n{"name": "y"}\n')
    with pytest.raises(DataError, match=r"a\.meta\.jsonl, line 2: no field 'key'; fields there: name\. Give every row"):
        open_records(str(shard))


@pytest.mark.parametrize("keep", [-1, 600, 1024 * 3, 1024 * 3 + 100, 1024 * 3 + 512])
@pytest.mark.parametrize("is_stream", [False, True])
def test_truncated_tar_is_named(tmp_path: Path, keep: int, is_stream: bool) -> None:
    file = write_tar(tmp_path / "a.tar", [{"__key__": f"{number}", "bin": b"x" * 512} for number in range(5)])
    content = file.read_bytes()
    content = content[: content.rindex(b"x") - 5] if keep == -1 else content[:keep]
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar \(.*\); the last key read was \w+.*Copy or write"):
        list(ShardStream(str(file), StreamOptions(num_epochs=1))) if is_stream else open_records(str(file))


@pytest.mark.parametrize("is_stream", [False, True])
def test_broken_header_is_no_end(tmp_path: Path, is_stream: bool) -> None:
    file = write_tar(tmp_path / "a.tar", [{"__key__": f"{number}", "bin": b"x" * 512} for number in range(5)])
    content = bytearray(file.read_bytes())
    content[1024 * 3 + 150] ^= 255
    file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"a\.tar: not a whole tar \((invalid header|bad checksum).*\); the last key read was 2\. Copy"
    ):
        list(ShardStream(str(file), StreamOptions(num_epochs=1))) if is_stream else open_records(str(file))


def test_bad_members_are_named(tmp_path: Path) -> None:
    bad = {"png": image_bytes()[:30], "json": b"{", "cls": b"x", "npy": array_bytes([{}], allow_pickle=True)}
    file = write_tar(tmp_path / "a.tar", [{"__key__": field, field: content} for field, content in bad.items()])
    rows = open_records(str(file))
    for index, field in enumerate(bad):
        with pytest.raises(
            BadSampleError, match=rf"a\.tar, key {field}: field '{field}' cannot be decoded \(.*Replace"
        ):
            rows[index]
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"empty\.tar is empty: no sample in it"):
        open_records(str(tmp_path / "empty.tar"))


# As a stream


def stream(pattern: str, rank: int = 0, num_ranks: int = 1, **options: object) -> ShardStream:
    return ShardStream(pattern, StreamOptions(**{"shuffle_size": 8, "num_epochs": 1, **options}), None, rank, num_ranks)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "jsonl", "jsonl.gz"])
def test_every_sample_once_an_epoch_in_an_order_of_the_seed(tmp_path: Path, kind: str) -> None:
    pattern = write_shards(tmp_path, kind)
    orders = [ids_of(stream(pattern, seed=seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(sum(SIZES)))
    assert orders[0] == orders[1] != orders[2]
    assert ids_of(stream(pattern, shuffle=False)) == list(range(sum(SIZES)))
    two = ids_of(stream(pattern, num_epochs=2))
    assert two[:64] == orders[0] and sorted(two[64:]) == sorted(two[:64]) and two[64:] != two[:64]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_ranks_and_workers_share_an_epoch(tmp_path: Path, num_ranks: int, num_workers: int) -> None:
    pattern = write_shards(tmp_path, "jsonl")  # 6 shards for up to 12 consumers
    seen: Counter[int] = Counter()
    for rank in range(num_ranks):
        loader = DataLoader(stream(pattern, rank, num_ranks), batch_size=5, num_workers=num_workers, collate_fn=ids_of)
        seen.update(one for batch in loader for one in batch)
    assert seen == dict.fromkeys(range(sum(SIZES)), 1)


@pytest.mark.parametrize("kind", ["tar", "jsonl.gz"])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2), (3, 5)])
def test_a_loader_resumes_exactly(tmp_path: Path, kind: str, num_workers: int, rank: int, num_ranks: int) -> None:
    pattern = write_shards(tmp_path, kind)
    arguments = {"batch_size": 3, "num_workers": num_workers, "collate_fn": ids_of}

    def loader(state: dict | None = None) -> DataLoader:
        source = stream(pattern, rank, num_ranks, num_epochs=None)
        if state is not None:
            source.load_state_dict(json.loads(json.dumps(state)))
        return DataLoader(source, **arguments)

    whole = list(islice(loader(), 40))
    for num_batches in (0, 1, 2, 13, 27):
        states = [
            stream(pattern, any_rank, num_ranks).state_after(num_batches, 3, num_workers)
            for any_rank in range(num_ranks)
        ]
        assert all(state == states[0] for state in states)
        assert list(islice(loader(states[0]), 40 - num_batches)) == whole[num_batches:]


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2)])
def test_a_stream_that_ends_is_read_to_the_end_by_every_worker(tmp_path: Path, rank: int, num_ranks: int) -> None:
    pattern = write_shards(tmp_path, "jsonl")  # of very different sizes: workers end at very different times

    def loader(num_batches: int) -> DataLoader:
        source = stream(pattern, rank, num_ranks, num_epochs=2)
        source.load_state_dict(source.state_after(num_batches, 3, 3))
        return DataLoader(source, batch_size=3, num_workers=3, collate_fn=ids_of)

    whole = list(loader(0))
    if num_ranks == 1:
        assert Counter(one for batch in whole for one in batch) == dict.fromkeys(range(64), 2)
    workers = [stream_module._deal_batches([2, 9, 5], number) for number in range(17)]
    assert workers[0] == ([0, 0, 0], 0) and workers[6] == ([2, 2, 2], 0) and workers[7] == ([2, 3, 2], 2)
    assert workers[13][0] == [2, 6, 5] and workers[15][0] == [2, 8, 5] and workers[16][0] == [2, 9, 5]
    for num_batches in (1, 4, len(whole) - 5, len(whole) - 1, len(whole)):
        assert list(loader(num_batches)) == whole[num_batches:]


def test_an_iteration_resumes_at_every_sample_even_without_known_lengths(tmp_path: Path, home: Path) -> None:
    pattern = write_shards(tmp_path, "jsonl")
    whole = ids_of(islice(stream(pattern, num_epochs=None), 150))
    for position in range(0, 150, 7):
        for file in (home / "data" / "lengths").glob("*"):
            file.unlink()
        source = stream(pattern, num_epochs=None)
        first = iter(source)
        taken = ids_of(islice(first, position))
        resumed = stream(pattern, num_epochs=None)
        resumed.load_state_dict(source.state_dict())
        assert taken + ids_of(islice(resumed, 150 - position)) == whole


def test_resuming_reads_no_shard_whose_length_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path, "jsonl", [50] * 10)
    assert len(list(stream(pattern))) == 500
    opened = []
    real = shards_module.open_binary
    monkeypatch.setattr(shards_module, "open_binary", lambda path: opened.append(path) or real(path))
    resumed = stream(pattern, num_epochs=None)
    resumed.load_state_dict(resumed.state_after(470, 1))
    next(iter(resumed))
    assert len(opened) == 1


def test_a_state_belongs_to_its_ranks_and_workers(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path)
    with pytest.raises(DataError, match=r"saved with 2 rank\(s\), and this run has 1\. A stream resumes on the same"):
        stream(pattern).load_state_dict(stream(pattern, 0, 2).state_after(3, 4))
    source = stream(pattern)
    source.load_state_dict(source.state_after(3, 4, num_workers=2))
    with pytest.raises(DataError, match=r"saved with num_workers=2, and this loader has 1 \(0 counts as 1\)"):
        next(iter(source))


def test_remote_shards(home: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/shards/{number}.jsonl", "".join(f'{{"id": {number * 4 + one}}}\n' for one in range(4)).encode())
    assert sorted(ids_of(stream("memory://shards/{0..2}.jsonl"))) == list(range(12))
    assert sorted(ids_of(stream("memory://shards/*.jsonl"))) == list(range(12))
    assert len(list((home / "data" / "lengths").glob("*"))) >= 3
    with pytest.raises(
        DataError, match=r"'memory://shards/7\.jsonl' cannot be read \(FileNotFoundError: .*Check that it"
    ):
        list(stream("memory://shards/7.jsonl"))
    with pytest.raises(DataError, match=r"'memory://shards/x\*\.jsonl': no file matches"):
        stream("memory://shards/x*.jsonl")


def test_too_few_samples_for_the_consumers(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, "jsonl", [1, 1])
    with pytest.raises(
        DataError, match=r"consumer 2 of 3 has no sample in epoch 0\. Give more samples than ranks times"
    ):
        next(iter(stream(pattern, 2, 3, num_epochs=None)))


def test_process_and_bad_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"id": number}) for number in range(100)]
    lines[7], lines[30] = '{"id": ', '{"ID": 30}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def double(row: dict) -> int:
        return row["id"] * 2

    def read(**options: object) -> list:
        source = ShardStream(str(tmp_path / "a.jsonl"), StreamOptions(shuffle=False, num_epochs=1, **options), double)
        return list(source)

    with pytest.raises(BadSampleError, match=r"a\.jsonl, line 8: not valid JSON \(Expecting value at column \d+\)"):
        read()
    with caplog.at_level(logging.WARNING):
        values = read(on_bad_sample="skip")
    assert [number for number, value in enumerate(values) if value is None] == [7, 30]
    assert [value for value in values if value is not None] == [2 * n for n in range(100) if n not in (7, 30)]
    assert [record.getMessage().split(": ", 1)[1][:60] for record in caplog.records] == [
        "bad sample 1 left out of 8 read: " + str(tmp_path / "a.jsonl")[:27],
        "bad sample 2 left out of 31 read: " + str(tmp_path / "a.jsonl")[:26],
    ]
    assert "double failed (KeyError: 'id'). Mend the row or the function." in caplog.text
    with pytest.raises(DataError, match=r"2 bad samples among 31 read, more than max_bad_fraction=0\.001 allows \(1\)"):
        read(on_bad_sample="skip", max_bad_fraction=0.001)


def test_workers_count_bad_samples_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n{\n" * 40)
    source = stream(str(tmp_path / "a.jsonl"), on_bad_sample="skip", max_bad_fraction=0.5)
    loader = DataLoader(source, batch_size=4, num_workers=2, collate_fn=list)
    assert sum(row is None for batch in loader for row in batch) == 40
    assert (source.bad_samples.num_bad, source.bad_samples.num_read) == (40, 80)


def test_rest_of_a_truncated_shard_is_one_bad_sample(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, "tar", [5, 5, 5])
    content = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(content[: 1024 * 3 + 100])  # a header and a block each
    assert ids_of(stream(pattern, shuffle=False, on_bad_sample="skip")) == [*range(7), *range(10, 15)]
    # The last sample read may lack members that were to follow, so it is lost, too.


@pytest.mark.parametrize("keep", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["tar.gz", "jsonl.gz"])
def test_broken_compression_is_named(tmp_path: Path, kind: str, keep: float) -> None:
    pattern = write_shards(tmp_path, kind, [2000])
    content = bytearray((tmp_path / f"000.{kind}").read_bytes())
    content = content[: int(len(content) * keep)]
    if keep == 1.0:
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / f"000.{kind}").write_bytes(content)
    with pytest.raises(BadSampleError, match=rf"000\.{kind}: (not a whole tar|cut off after line \d+) .*Copy or write"):
        list(stream(pattern))


def test_network_that_fails_is_no_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError("gone")

        readline = read

    for module in (shards_module, webdataset_module):
        monkeypatch.setattr(module, "open_binary", lambda path: Broken())
    for name in ("a.tar", "a.jsonl.gz"):
        fsspec.filesystem("memory").pipe(f"/net/{name}", b"x")
        with pytest.raises(DataError, match=rf"'memory://net/{name}' cannot be read \(ConnectionResetError: gone\)"):
            list(stream(f"memory://net/{name}", on_bad_sample="skip"))


def test_shards_that_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.zip is of no known format \(\.tar, \.tar\.gz.*\.jsonl\.gz\)"):
        expand_shards(str(tmp_path / "a.zip"))
    with pytest.raises(DataError, match="the list of shards is empty"):
        expand_shards([])
    with pytest.raises(DataError, match=r"'\{000\.\.1': the braces do not match \(.*\)\. Write for instance"):
        expand_shards("{000..1")
    with pytest.raises(DataError, match="shuffle_size is 0. Set it to at least 1"):
        stream(write_shards(tmp_path), shuffle_size=0)


def test_lengths_are_counted_once(tmp_path: Path, home: Path) -> None:
    write_shards(tmp_path, "tar.gz", [4])
    assert count_samples(str(tmp_path / "000.tar.gz")) == count_samples(str(tmp_path / "000.tar.gz")) == 4
    assert [file.read_text() for file in (home / "data" / "lengths").glob("*") if file.suffix != ".lock"] == ["4"]


def test_torch_workers_get_the_stream_by_pickle(tmp_path: Path) -> None:
    source = stream(write_shards(tmp_path))
    assert ids_of(pickle.loads(pickle.dumps(source))) == ids_of(source)
    assert isinstance(source.bad_samples._counts, torch.Tensor)
