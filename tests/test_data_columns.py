"""Files of rows as text to pretrain on: their text field, one document a row."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import datasets
import pytest

from sat_lightning.data.preparation import prepare_store
from sat_lightning.data.sources import SourceOptions, open_source
from sat_lightning.data.tokenizer import ByteTokenizer
from sat_lightning.errors import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "two\nü", "n": 2}]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAT_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for row in ROWS:
            member = tarfile.TarInfo(f"{row['n']}.text")
            member.size = len(row["text"].encode())
            archive.addfile(member, io.BytesIO(row["text"].encode()))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".arrow", ".tar"])
def test_rows_are_documents(tmp_path: Path, suffix: str) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    file = tmp_path / f"a{suffix}"
    if suffix == ".arrow":
        dataset.save_to_disk(str(tmp_path / "saved"))
        (file,) = (tmp_path / "saved").glob("*.arrow")
    elif suffix == ".parquet":
        dataset.to_parquet(str(file))
    elif suffix == ".tar":
        write_tar(file)
    else:
        write_table(file, "," if suffix == ".csv" else "\t")
    assert list(open_source(str(file))) == ["one", "two\nü"]
    other = open_source(str(file), SourceOptions(text_field="txt"))
    if suffix in (".csv", ".tsv"):  # a table without the column is text as it stands
        assert b"".join(other) == file.read_bytes()
    else:
        with pytest.raises(
            DataError, match=r"no field 'txt'; .*text\. Did you mean 'text'\? Set text_field to the one"
        ):
            list(other)
        (tmp_path / "a.txt").write_text("plain")
        with pytest.warns(UserWarning, match="files are not text and were left out, for instance"):
            assert b"plain" in list(open_source(str(tmp_path), SourceOptions(text_field="txt")))


def test_field_that_is_no_text(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"a\.parquet, row 0: field 'n' holds int, not text\. Set text_field"):
        list(open_source(str(tmp_path / "a.parquet"), SourceOptions(text_field="n")))


def test_hub_dataset_is_prepared_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: datasets.Dataset.from_list(rows))

    def prepare() -> tuple[int, int | None]:
        meta = prepare_store(open_source("hf://org/name"), ByteTokenizer(), tmp_path).meta
        return meta.num_tokens, meta.num_documents

    assert prepare() == prepare() == (3 + 1 + 6 + 1, 2)
    rows = ROWS[:1]
    assert prepare() == (4, 1)
