"""Rows to samples: what is learned and what is not, what is too long, and what becomes of a row that cannot be used."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader

from sat_lightning.data.collate import PadCollate
from sat_lightning.data.records import open_records
from sat_lightning.data.samples import BadSampleError, BadSamples
from sat_lightning.data.transforms import ProcessedRecords, Tokenize
from sat_lightning.errors import DataError

END = 256


def listed(sample: dict) -> tuple[list[int], list[int]]:
    return sample["input_ids"].tolist(), sample["target_ids"].tolist()


def test_targets_are_the_tokens_that_follow() -> None:
    a, b, c = b"abc"
    assert listed(Tokenize()({"text": "abc", "other": 1})) == ([a, b, c], [b, c, END])
    assert listed(Tokenize(add_end=False)({"text": b"abc"})) == ([a, b], [b, c])


def test_prompt_is_read_but_not_learned() -> None:
    tokenize = Tokenize(fields=["prompt", "answer"], learned=["answer"])
    q, w, a = b"qwa"
    row = {"answer": "a", "prompt": "qw"}
    assert listed(tokenize(row)) == ([q, w, a], [-100, a, END])
    assert listed(Tokenize(fields=["prompt", "answer"], learned=["prompt"])(row)) == ([q, w, a], [w, -100, -100])
    with pytest.raises(
        DataError, match=r"learned names 'answr', which is not among fields \(prompt, answer\)\. Did you"
    ):
        Tokenize(fields=["prompt", "answer"], learned=["answr"])


def test_tokenizer_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize = pickle.loads(pickle.dumps(Tokenize(str(tmp_path))))
    assert listed(tokenize({"text": "a b c"})) == ([1, 2, 0], [2, 0, 3])


def test_sample_longer_than_the_model() -> None:
    row = {"text": "abcd"}
    assert listed(Tokenize(max_length=4)(row)) == ([*b"abcd"], [*b"bcd", END])
    with pytest.raises(
        BadSampleError, match=r"4 tokens are more than max_length=3\. Set too_long: truncate, give the mo"
    ):
        Tokenize(max_length=3)(row)
    assert listed(Tokenize(max_length=3, too_long="truncate")(row)) == ([*b"abc"], [*b"bcd"])
    with pytest.raises(DataError, match="too_long is 'cut'. Set it to 'raise' or 'truncate'"):
        Tokenize(too_long="cut")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, r"no field 'text'; fields there: txt\. Did you mean 'txt'\? Name another in fields"),
        ({"text": 3}, r"field 'text' holds int, not text\. Name another in fields, or make text of it"),
        ({"text": ""}, r"1 token\(s\), and a target needs one before it\. Remove the empty row"),
    ],
)
def test_row_that_has_no_text(row: dict, message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        Tokenize()(row)


# Records put through a function


def test_configured_from_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=ProcessedRecords)
    (tmp_path / "a.csv").write_text("q,a\nx,y\n")
    process = {"class_path": "sat_lightning.data.Tokenize", "init_args": {"fields": ["q", "a"], "learned": ["a"]}}
    settings = {"source": str(tmp_path / "a.csv"), "process_fn": process, "options": {"cache_dir": str(tmp_path)}}
    config = {"class_path": "sat_lightning.data.ProcessedRecords", "init_args": settings}
    records = parser.instantiate(parser.parse_object({"data": config})).data
    assert listed(records[0]) == ([120, 121], [121, END])


def write(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def take_number(row: dict) -> int:
    return row["n"] + 1


def test_process_fn_by_function_and_import_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"n": number} for number in range(5)])
    for process in (take_number, f"{__name__}.take_number"):
        records = pickle.loads(pickle.dumps(ProcessedRecords(open_records(path), process)))
        assert len(records) == 5 and records[3] == 4 and records.__getitems__([1, 0]) == [2, 1]
    assert ProcessedRecords(open_records(path))[2] == {"n": 2}
    assert records[-1] is None and records.__getitems__([-1, 2]) == [None, 3]
    with pytest.raises(DataError, match=r"process_fn: cannot import 'nothing\.here' "):
        ProcessedRecords(open_records(path), "nothing.here")


def test_failure_names_file_line_function_and_cause(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"n": 1}, {"m": 1}])
    message = r"a\.jsonl, line 2: take_number failed \(KeyError: 'n'\)\. Mend the row or the function"
    with pytest.raises(BadSampleError, match=message):
        ProcessedRecords(open_records(path), take_number)[1]
    with pytest.raises(BadSampleError, match=message):
        ProcessedRecords(open_records(path), take_number).__getitems__([0, 1])
    with pytest.raises(BadSampleError, match=r"a\.jsonl, line 1: no field 'text'; fields there: n"):
        ProcessedRecords(open_records(path), Tokenize())[0]


def test_tokens_of_a_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "abc"}, "{"])
    records = ProcessedRecords(open_records(path), Tokenize(), on_bad_sample="skip", max_bad_fraction=1.0)
    assert (records.num_tokens(0), records.num_tokens(1)) == (3, 0)


def test_skipped_rows_are_counted_logged_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[object] = [{"n": number} for number in range(200)]
    rows[7], rows[150] = '{"n": ', {"m": 1}
    path = write(tmp_path / "a.jsonl", rows)
    records = ProcessedRecords(open_records(path), take_number, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        values = [value for batch in DataLoader(records, batch_size=16, collate_fn=list) for value in batch]
    assert [number for number, value in enumerate(values) if value is None] == [7, 150]
    assert (records.bad_samples.num_bad, records.bad_samples.num_read) == (2, 200)
    assert len(caplog.records) == 2 and "a.jsonl, line 8: not valid JSON" in caplog.text
    strict = ProcessedRecords(open_records(path), take_number, on_bad_sample="skip", max_bad_fraction=0.005)
    assert strict[7] is None
    with pytest.raises(
        DataError, match=r"a\.jsonl: 2 bad samples among 2 read, more than max_bad_fraction=0\.005 allows \(1"
    ):
        strict[150]


def test_workers_count_together_and_a_skipped_row_is_padding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "ab"}, "{"] * 20)
    records = ProcessedRecords(open_records(path), Tokenize(), on_bad_sample="skip", max_bad_fraction=0.5)
    batches = list(DataLoader(records, batch_size=4, num_workers=2, collate_fn=PadCollate()))
    assert records.bad_samples.num_bad == 20
    assert all(batch["target_ids"].tolist() == [[98, END], [-100, -100]] * 2 for batch in batches)


def test_a_stream_of_errors_is_logged_thinly(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples("source", "skip", 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            bad.count()
            bad.handle(BadSampleError("broken"))
    assert len(caplog.records) == 10 + 6  # then 16, 32, ..., 512
    with pytest.raises(DataError, match="on_bad_sample is 'ignore'. Set it to 'raise' or 'skip'"):
        BadSamples("source", "ignore")
    with pytest.raises(DataError, match=r"max_bad_fraction is 2\. Set it to a fraction"):
        BadSamples("source", "skip", 2)
