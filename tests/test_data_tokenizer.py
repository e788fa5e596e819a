"""Bytes and `tokenizers` files: round trips, the end of a document, and what is said when a file will not do."""

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sat_lightning.data.tokenizer import ByteTokenizer, TokenizersFile, load_tokenizer
from sat_lightning.errors import DataError

TEXTS = ["", "plain", "tabs\tand\r\nlines\n", "äöü ß €", "🙂👩‍👩‍👧 العربية 漢字", "\x00\x7f\u0080\uffff"]


def make_tokenizer(path: Path, end_of_document: str = "<|endoftext|>") -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end_of_document], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the cat sat"] * 20, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode([*ids.tolist(), 256]) == text


def test_bytes_vocabulary_and_bytes_that_are_no_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (257, 256)
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.decode([255, 65]) == "\ufffdA"
    assert tokenizer.encode("\ud800").tolist() == [0xED, 0xA0, 0x80]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_file_round_trip(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(make_tokenizer(tmp_path / "tokenizer.json")))
    assert tokenizer.decode(tokenizer.encode(text)) == text  # neither truncated nor padded, whatever the file says
    assert np.array_equal(tokenizer.encode(text.encode()), tokenizer.encode(text))
    assert tokenizer.encode_batch([text, "the"])[1].tolist() == tokenizer.encode("the").tolist()


def test_tokenizers_file_describes_itself(tmp_path: Path) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = TokenizersFile(str(tmp_path))  # a folder with tokenizer.json will do
    library = Tokenizer.from_file(str(file))
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.end_of_document_id == library.token_to_id("<|endoftext|>")
    assert len(tokenizer.encode("the cat sat")) < len("the cat sat")
    assert tokenizer.fingerprint == load_tokenizer(str(file)).fingerprint
    other = load_tokenizer(str(make_tokenizer(tmp_path / "other.json", "</s>")))
    assert other.fingerprint != tokenizer.fingerprint


def test_end_of_document_token_of_an_unusual_name(tmp_path: Path) -> None:
    file = str(make_tokenizer(tmp_path / "odd.json", "<stop>"))
    with pytest.raises(DataError, match=r"no end-of-document token: none of <\|endoftext\|>.*among its \d+ tokens"):
        load_tokenizer(file)
    assert load_tokenizer(file, "<stop>").end_of_document_id == 0


def test_missing_library_gives_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r'needs the tokenizers library.*Run: pip install "sat_lightning\[data\]"'):
        load_tokenizer(str(file))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'byte' is neither 'bytes' nor a tokenizers JSON file\. Did you mean 'bytes'"):
        load_tokenizer("byte")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"Nearest names in .*: tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokeniser.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json' is not a tokenizers JSON file \(.*Give its tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
