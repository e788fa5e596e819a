"""Tokenizers that lie beside weights: found by name, equal to their libraries' own, refused with a cure."""

import json
import sys

import pytest

from sat_lightning.data import ByteTokenizer, get_tokenizer, load_tokenizer
from sat_lightning.errors import DataError
from tests.test_data_tokenizer import make_tokenizer

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat ##s on a mat , . ! caf ##e Cat".split()
TEXT = "The cats sat on a mat, café! Cat [SEP] dog"


@pytest.fixture
def bert(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "bert"


@pytest.mark.parametrize("is_lower", [True, False, None])
def test_word_pieces_equal_hugging_face(bert, is_lower):
    transformers = pytest.importorskip("transformers")
    if is_lower is not None:
        (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": is_lower}))
    ours = get_tokenizer(bert)
    theirs = transformers.BertTokenizerFast(vocab=str(bert / "vocab.txt"), do_lower_case=is_lower is not False)
    assert ours.encode(TEXT).tolist() == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.vocab_size == len(WORDS) and ours.end_of_document_id == WORDS.index("[SEP]")
    assert load_tokenizer(str(bert)).fingerprint == ours.fingerprint


def test_byte_level_pieces_round_trip(tmp_path):
    made = json.loads(make_tokenizer(tmp_path / "t.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(made["vocab"] | {"<|endoftext|>": 0}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = get_tokenizer(folder)
    text = " the cat 漢字 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == load_tokenizer(str(tmp_path / "t.json")).encode(text).tolist()
    assert tokenizer.encode("a<|endoftext|>").tolist()[-1] == tokenizer.end_of_document_id == 0


def test_names_are_looked_up_in_the_home(tmp_path, bert, monkeypatch):
    monkeypatch.setenv("SAT_HOME", str(tmp_path))
    assert get_tokenizer("bert").vocab_size == len(WORDS)
    assert isinstance(get_tokenizer("bytes"), ByteTokenizer)
    make_tokenizer(bert / "tokenizer.json")
    assert get_tokenizer("bert").vocab_size != len(WORDS), "tokenizer.json goes first"
    with pytest.raises(DataError, match=r"tokenizer 'byte' is neither 'bytes'.*Did you mean 'bytes'\?"):
        get_tokenizer("byte")


def test_a_folder_without_one_says_what_is_there(tmp_path):
    with pytest.raises(DataError, match="vocab.json with merges.txt is there, only nothing."):
        get_tokenizer(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps({"tokenizer_type": "THUDM/chatglm-6b"}))
    with pytest.raises(DataError, match="only model_config.json. Its model_config.json names 'THUDM/chatglm-6b'"):
        get_tokenizer(tmp_path)


def test_without_the_library_the_install_line_is_said(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="needs the sentencepiece library.* pip install"):
        get_tokenizer(tmp_path)


def test_sentencepiece_models_round_trip(tmp_path):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nthe dog sat on the cat\n" * 20)
    library.SentencePieceTrainer.Train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, byte_fallback=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = get_tokenizer(path)
        theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert tokenizer.encode("the cat sat").tolist() == theirs.encode("the cat sat")
        assert [ids.tolist() for ids in tokenizer.encode_batch(["the", b"dog"])] == theirs.encode(["the", "dog"])
        assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
        assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (len(theirs), theirs.eos_id())
    assert get_tokenizer(tmp_path, "<s>").end_of_document_id == theirs.bos_id()
    with pytest.raises(DataError, match="none of <nope> is among its"):
        get_tokenizer(tmp_path, "<nope>")
    (tmp_path / "tokenizer.model").write_bytes(b"half")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        get_tokenizer(tmp_path)
