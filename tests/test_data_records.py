"""Rows by number: what each format gives, when it decodes, how little it holds, and what is said when it cannot."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import lmdb
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from sat_lightning.data import lines, sources
from sat_lightning.data import records as records_module
from sat_lightning.data.records import open_records
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.sources import register_source
from sat_lightning.errors import DataError

ROOT = Path(__file__).parents[1]
ROWS = [{"text": "one", "n": 1}, {"text": "ü\u2028two", "n": 2}, {"text": 'q"uote', "n": 3}]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("SAT_HOME", str(folder))
    monkeypatch.setattr(sources, "_RECORD_BUILDERS", dict(sources._RECORD_BUILDERS))
    monkeypatch.setattr(records_module, "_RECORD_BUILDERS", sources._RECORD_BUILDERS)
    return folder


def write_jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def all_of(path: object, **options: object) -> list:
    rows = open_records(path, **options)
    return [rows[index] for index in range(len(rows))]


# Text formats


@pytest.mark.parametrize("ending", ["", "\n", "\n\n  \n"])
def test_jsonl_rows_by_number_blank_lines_aside(tmp_path: Path, ending: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + " \n\n".join(json.dumps(row) for row in ROWS) + ending)
    rows = open_records(str(tmp_path / "a.jsonl"))
    assert len(rows) == 3 and [rows[2], rows[0], rows[1]] == [ROWS[2], ROWS[0], ROWS[1]]
    assert rows.__getitems__([1, 1]) == [ROWS[1], ROWS[1]]
    assert [rows.where(index).rpartition(" ")[2] for index in range(3)] == ["2", "4", "6"]
    assert all_of(str(tmp_path / "a.jsonl"), fields=["n"]) == [{"n": 1}, {"n": 2}, {"n": 3}]
    with pytest.raises(IndexError, match=r"row 3 of .*a\.jsonl, which has 3 rows \(0 to 2\)"):
        rows[3]
    with pytest.raises(IndexError):
        rows[-1]


def test_mark_of_utf8_at_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}', encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text("n,m\n1,2", encoding="utf-8-sig")
    assert all_of(str(tmp_path / "a.jsonl")) == [{"n": 1}, {"n": 2}]
    assert all_of(str(tmp_path / "a.csv")) == [{"n": "1", "m": "2"}]


def test_lines_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sat_lightning.data.lines._BLOCK_SIZE", 7)
    rows = [{"text": "x" * length} for length in (0, 1, 30, 5, 100)]
    rows_read = open_records(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert [rows_read[index] for index in range(5)] == rows
    assert rows_read.where(4).endswith("line 5")


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\r\n\n  indented\nlast ü".encode())
    assert all_of(str(tmp_path / "a.txt")) == [{"text": "first"}, {"text": "  indented"}, {"text": "last ü"}]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_tables_agree_with_the_csv_module(tmp_path: Path, suffix: str, delimiter: str, line_end: str) -> None:
    cells = [["a", "b"], ["plain", "1"], ["line\nbreak", 'say "hi"'], [delimiter, "ü"], ["x" * 200_000, ""]]
    file = tmp_path / f"t{suffix}"
    with file.open("w", newline="", encoding="utf-8") as target:
        csv.writer(target, delimiter=delimiter, lineterminator=line_end).writerows(cells)
    rows = open_records(str(file))
    assert [rows[index] for index in range(len(rows))] == [dict(zip("ab", cell, strict=True)) for cell in cells[1:]]
    assert rows.where(2).endswith("line 5")  # the row before it spans two lines
    assert all_of(str(file), fields=["b"])[1] == {"b": 'say "hi"'}


def test_table_without_header_or_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2\n\n3,4\n")
    assert all_of(str(tmp_path / "a.csv"), header=["x", "y"]) == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    (tmp_path / "a.tsv").write_text('size\tname\n5"\t"open\n')
    assert all_of(str(tmp_path / "a.tsv"), quoted=False) == [{"size": '5"', "name": '"open'}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"n": 1}\n\n{"n": \n',
            r"a\.jsonl, line 3: not valid JSON \(Expecting value at column \d+\)\. Mend",
        ),
        ("a.jsonl", b'{"n": 1}\n[1]\n', r"a\.jsonl, line 2: a JSON list, not an object with fields\. Mend or remove"),
        ("a.jsonl", b'{"n": 1}\n{"m": 1}\n', r"line 2: no field 'n'; fields there: m\..*Name another field, or mend"),
        ("a.jsonl", b'{"n": 1}\n{"n": "\xff"}\n', r"line 2: not UTF-8 \(byte 7\)"),
        (
            "a.csv",
            b"n,b\n1,2\n1,2,3\n",
            r"a\.csv, line 3: 3 fields, and the header has 2 \(n, b\)\. Mend the row, quote",
        ),
        ("a.csv", b"n,b\n1,2\n1,\xff\n", r"a\.csv, line 3: not UTF-8 \(byte 2 of the row\)\. Convert the file"),
    ],
)
def test_bad_row_names_file_line_and_cure(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    rows = open_records(str(tmp_path / name), fields=["n"])
    assert str(rows[0]["n"]) == "1"
    with pytest.raises(BadSampleError, match=message):
        rows[1]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", "\n \n", {}, r"a\.jsonl is empty: no line in it holds anything\. Give a file with rows"),
        ("a.csv", "", {}, r"a\.csv is empty"),
        ("a.csv", "a,b\n", {}, r"a\.csv is empty: a header and no rows"),
        (
            "a.csv",
            "text,b\n1,2\n",
            {"fields": ["txt"]},
            r"line 1: no column 'txt'; columns there: text, b\. Did you mean",
        ),
        ("a.csv", "a,a\n1,2\n", {}, r"line 1: two columns are named 'a'"),
        (
            "a.csv",
            'a,b\n1,2\n1,"2\n3,4\n',
            {},
            r"a\.csv, line 3: the row that begins there cannot be parsed \(unexp.*Close",
        ),
        (
            "a.csv",
            "a\n1\n",
            {"field": ["a"]},
            r"unknown option 'field'; TableRecords takes delimiter, fields.*'fields'\?",
        ),
        (
            "a.xls",
            "x",
            {},
            r"no source of rows is registered for '\.xls'.*Known: .*\.csv.*@register_source\('\.xls', rec",
        ),
    ],
)
def test_source_that_cannot_be_opened(tmp_path: Path, name: str, content: str, options: dict, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_records(str(tmp_path / name), **options)


def test_index_is_kept_and_renewed_with_the_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    assert len(open_records(str(file), cache_dir=tmp_path / "cache")) == 3
    (kept,) = (tmp_path / "cache" / "index").glob("*.offsets")
    written = kept.stat().st_ino  # a use renews the file's time, for clean-cache; a new file is another one
    assert len(open_records(str(file), cache_dir=tmp_path / "cache")) == 3 and kept.stat().st_ino == written
    write_jsonl(file, [*ROWS, *ROWS])
    assert len(open_records(str(file), cache_dir=tmp_path / "cache")) == 6
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_pickled_source_carries_no_rows(tmp_path: Path) -> None:
    rows = open_records(str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 1000)))
    assert rows[999]
    assert len(pickle.dumps(rows)) < 1000 and pickle.loads(pickle.dumps(rows))[999] == rows[999]


MILLION = """
import resource, sys
from sat_lightning.data.records import open_records
import sat_lightning.data
path, cache = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = open_records(path, cache_dir=cache)
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, rows[999_999])
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_million_rows_take_little_memory_and_show_progress(tmp_path: Path, suffix: str) -> None:
    line = '{"text": "some words in a row"}\n' if suffix == ".jsonl" else '"some, words",in a row\n'
    with (tmp_path / f"a{suffix}").open("w") as file:
        file.write("text,b\n" if suffix == ".csv" else "")
        file.write(line * 1_000_000)
    command = [sys.executable, "-c", MILLION, str(tmp_path / f"a{suffix}"), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    num_rows, kibibytes, row = done.stdout.split(" ", 2)
    assert int(num_rows) == 1_000_000 and "words" in row
    assert int(kibibytes) < 200 * 1024


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = lines.tqdm
    monkeypatch.setattr(lines, "tqdm", lambda **options: real(**{**options, "disable": False}))
    file = write_jsonl(tmp_path / "a.jsonl")
    open_records(str(file))
    assert f"indexing {file}: 100%" in capsys.readouterr().err


# Binary formats


def test_arrow_parquet_and_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "a.parquet", arrow, tmp_path / "saved"):
        assert all_of(str(path), cache_dir=str(tmp_path / "hf")) == ROWS
        rows = open_records(str(path), cache_dir=str(tmp_path / "hf"), fields=["n"])
        assert rows.__getitems__([2, 0]) == [{"n": 3}, {"n": 1}]
    with pytest.raises(DataError, match=r"no column 'txt'; columns there: text, n\. Did you mean 'text'\?"):
        open_records(str(arrow), fields=["txt"])
    for suffix, kind in ((".parquet", "Parquet file"), (".arrow", "Arrow stream")):
        (tmp_path / f"bad{suffix}").write_bytes(b"nothing of the kind")
        with pytest.raises(DataError, match=rf"bad\{suffix}: not a whole {kind} \(.*Write it"):
            open_records(str(tmp_path / f"bad{suffix}"), cache_dir=str(tmp_path / "hf"))


def test_hub_path_names_dataset_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, **options: str) -> datasets.Dataset:
        asked.append((*names, options["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("hf://org/name", "hf://org/name/test", "hf://org/name/en/validation"):
        rows = open_records(path)
        assert rows.name == path and rows[1] == ROWS[1]
    assert asked == [("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "en", "validation")]
    with pytest.raises(DataError, match=r"'hf://name': 1 part\(s\)\. Give hf://org/name, "):
        open_records("hf://name")

    def refuse(*names: str, **options: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"'hf://org/name' cannot be read \(ConnectionError: no route\)\. Check the name"
    ):
        open_records("hf://org/name")


def test_arrays_and_token_files(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.arange(20, dtype=np.uint32))
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "flat.bin")
    for name in ("flat.npy", "flat.bin"):
        rows = pickle.loads(pickle.dumps(open_records(str(tmp_path / name), sequence_length=4)))
        assert len(rows) == 4 and rows.num_tokens(1) == 4
        assert rows[1]["input_ids"].tolist() == [4, 5, 6, 7] and rows[1]["target_ids"].tolist() == [5, 6, 7, 8]
        assert [row["input_ids"].tolist() for row in rows.__getitems__([3, 0])] == [[12, 13, 14, 15], [0, 1, 2, 3]]
    with pytest.raises(DataError, match=r"flat\.npy: token ids in one dimension have no rows\. Set sequence_length"):
        open_records(str(tmp_path / "flat.npy"))
    with pytest.raises(DataError, match=r"20 tokens are too few for one row of sequence_length=20, which takes 21"):
        open_records(str(tmp_path / "flat.bin"), sequence_length=20)
    np.save(tmp_path / "square.npy", np.arange(6.0).reshape(3, 2))
    rows = pickle.loads(pickle.dumps(open_records(str(tmp_path / "square.npy"), field="image")))
    assert [row["image"].tolist() for row in rows.__getitems__([2, 0])] == [[4.0, 5.0], [0.0, 1.0]]
    (tmp_path / "bad.npy").write_bytes((tmp_path / "square.npy").read_bytes()[:-3])
    with pytest.raises(DataError, match=r"bad\.npy: not a whole NumPy array file"):
        open_records(str(tmp_path / "bad.npy"))


@pytest.mark.parametrize("is_folder", [False, True])
def test_lmdb_by_the_order_of_keys(tmp_path: Path, is_folder: bool) -> None:
    path = str(tmp_path / "a.lmdb")
    with lmdb.open(path, subdir=is_folder) as environment, environment.begin(write=True) as transaction:
        for number in (2, 0, 1):
            transaction.put(f"{number:03}".encode(), json.dumps(ROWS[number]).encode())
        transaction.put(b"999", b"\x80\x04")
    rows = pickle.loads(pickle.dumps(open_records(path)))
    assert len(rows) == 4 and [rows[2], rows[0], rows[1]] == [ROWS[2], ROWS[0], ROWS[1]]
    assert list(DataLoader(rows, sampler=[1, 2, 0], num_workers=2, collate_fn=list)) == [
        [ROWS[1]],
        [ROWS[2]],
        [ROWS[0]],
    ]
    with pytest.raises(BadSampleError, match=r"a\.lmdb, key b'999': not UTF-8 .*set decode: bytes"):
        rows[3]
    assert open_records(path, decode="bytes")[3] == {"key": b"999", "bytes": b"\x80\x04"}
    (tmp_path / "bad.lmdb").write_bytes(b"x" * 9000)
    with pytest.raises(DataError, match=r"bad\.lmdb: not a readable LMDB \(.*\)\. Write it again"):
        open_records(str(tmp_path / "bad.lmdb"))
    with pytest.raises(DataError, match="decode is 'pickle'. Set it to 'json', 'text' or 'bytes'"):
        open_records(path, decode="pickle")


def test_images_by_class(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/deep/a.png", "cat/ä.jpg"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), color=200).save(tmp_path / "root" / name)
    rows = open_records(str(tmp_path / "root"))
    assert rows.classes == ["cat", "dog"] and [rows[i]["label"] for i in range(3)] == [0, 1, 1]
    row = pickle.loads(pickle.dumps(rows))[1]
    assert row["path"] == "dog/b.png" and row["image"].shape == (3, 4, 3) and (row["image"] == 200).all()
    content = (tmp_path / "root/dog/b.png").read_bytes()
    (tmp_path / "root/dog/b.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadSampleError, match=r"dog/b\.png: not a whole image \(.*\)\. Replace or remove it"):
        rows[1]
    (tmp_path / "flat").mkdir()
    (tmp_path / "root/cat/ä.jpg").rename(tmp_path / "flat/a.jpg")
    with pytest.raises(DataError, match=r"no image in a folder of its class\. Arrange them as .*/<class>/<name>\.png"):
        open_records(f"images://{tmp_path / 'flat'}")


# Paths, remote files, the user's own


def test_globs_folders_and_lists_follow_each_other(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    for path in (str(tmp_path / "*.jsonl"), str(tmp_path), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]):
        rows = open_records(path)
        assert len(rows) == 3 and [rows[index] for index in range(3)] == ROWS
        assert rows.where(2) == f"{tmp_path}/b.jsonl, line 1"
        assert rows.__getitems__([2, 0, 2]) == [ROWS[2], ROWS[0], ROWS[2]]
        for outside in (-1, 3):
            with pytest.raises(IndexError, match=f"row {outside} of "):
                rows.__getitems__([0, outside])
    with pytest.raises(DataError, match="the list of paths is empty"):
        open_records([])


def test_remote_file_is_copied_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", json.dumps(ROWS[0]).encode())
    assert all_of("memory://bucket/a.jsonl") == ROWS[:1]
    (copy,) = (home / "data" / "remote").glob("*a.jsonl")
    written = copy.stat().st_ino
    assert all_of("memory://bucket/a.jsonl") == ROWS[:1] and copy.stat().st_ino == written
    fsspec.filesystem("memory").pipe("/bucket/b.jsonl", json.dumps(ROWS[1]).encode())
    assert all_of("memory://bucket/*.jsonl") == all_of("memory://bucket/{a,b}.jsonl") == ROWS[:2]
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"remote path 's3://bucket/a\.jsonl': Install s3fs to access S3"):
        open_records("s3://bucket/a.jsonl")
    with pytest.raises(DataError, match=r"'memory://bucket/no\.jsonl' cannot be read \(FileNotFoundError.*credentials"):
        open_records("memory://bucket/no.jsonl")
    with pytest.raises(DataError, match=r"remote path 'nosuch://x/a\.jsonl': Protocol not known: nosuch"):
        open_records("nosuch://x/a.jsonl")


class Squares:
    """A user's dataset class."""

    def __init__(self, path: str, size: int = 5) -> None:
        self.path, self.size = path, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index**2


def create_dataset(path: str, **options: int) -> Squares:
    return Squares(path, options["size"])


def test_own_dataset_by_function_class_and_import_path() -> None:
    for own in (Squares, create_dataset, f"{__name__}.Squares", f"{__name__}.create_dataset"):
        rows = open_records("anything", create_dataset=own, size=4)
        assert (len(rows), rows[3], rows.name, rows.path) == (4, 9, "anything", "anything")
        assert pickle.loads(pickle.dumps(rows))[2] == 4
    with pytest.raises(DataError, match=r"create_dataset: cannot import 'tests\.nothing\.f' \(.*on PYTHONPATH"):
        open_records("x", create_dataset="tests.nothing.f")
    with pytest.raises(DataError, match=r"records 'x': generator is an iterable without __len__"):
        open_records("x", create_dataset=lambda path: (row for row in ROWS))
    with pytest.raises(DataError, match=r"records 'x' is empty: 0 rows"):
        open_records("x", create_dataset=Squares, size=0)


def test_own_format_by_extension_and_scheme(tmp_path: Path) -> None:
    register_source(".sq", "squares://", records=True)(Squares)
    (tmp_path / "a.sq").write_text("")
    assert all_of(str(tmp_path / "a.sq"), size=2) == [0, 1]
    assert open_records("squares://here").path == "here"
    with pytest.raises(DataError, match=r"'\.csv' is taken by TableRecords"):
        register_source(".csv", records=True)(Squares)


@pytest.mark.parametrize(
    ("module", "name", "library"),
    [("datasets", "a.parquet", "datasets"), ("lmdb", "a.lmdb", "lmdb"), ("PIL.Image", "images", "Pillow")],
)
def test_missing_library_gives_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, library: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    path = f"images://{tmp_path}" if name == "images" else str(tmp_path / name)
    with pytest.raises(DataError, match=rf'needs the {library} library.*Run: pip install "sat_lightning\[data\]"'):
        open_records(path)
