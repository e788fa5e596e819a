"""Templates of training data: what is learned, and that generation asks with the very tokens of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_lightning.cli import main
from sat_lightning.data import ByteTokenizer, SampleOptions, TokenizersFile
from sat_lightning.data.templated import TokenizeChat, TokenizeForm
from sat_lightning.data.templates import Form, read_template
from sat_lightning.errors import DataError
from sat_lightning.training import DataOptions, SATDataModule
from sat_lightning.training.commands.source import load_source
from sat_lightning.training.commands.template import find_template, use_template

tokenizers = pytest.importorskip("tokenizers")

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ \
message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"
WORDS = "a cat sat on the mat , and what did it do then ? nothing at all .".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer that joins letters, spaces and line ends, with the names of special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [" ".join(WORDS), "user\n\nassistant: the cat\n\n\n sat", "[INST] what [/INST] nothing"] * 50
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHATML, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_talk(dice: random.Random, num_rounds: int) -> list[dict[str, str]]:
    def say() -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(1, 6)))

    talk = [{"role": "system", "content": say()}] if dice.random() < 0.3 else []
    for _ in range(num_rounds):
        talk += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
    return talk


def tokens_of(sample: dict[str, torch.Tensor]) -> tuple[list[int], list[bool]]:
    """All ids of a sample, and which of them are targets."""
    ids = [*sample["input_ids"].tolist()[:1]]
    targets = sample["target_ids"].tolist()
    inputs = sample["input_ids"].tolist()
    ids += [target if target >= 0 else other for target, other in zip(targets, [*inputs[1:], -1], strict=True)]
    return ids, [False, *(target >= 0 for target in targets)]


@pytest.mark.parametrize("text", [CHATML, PLAIN], ids=["chatml", "plain"])
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_before_each_answer_stand_the_tokens_that_a_talk_is_asked_with(
    text: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(text)
    tokenizer: Any = ByteTokenizer() if kind == "bytes" else TokenizersFile(str(folder))
    template: Any = read_template(str(tmp_path / "own.jinja"), tokenizer)
    tokenize, dice = TokenizeChat(tokenizer, template), random.Random(0)
    for _ in range(40):
        talk = make_talk(dice, dice.randint(1, 3))
        ids, is_learned = tokens_of(tokenize({"messages": talk}))
        start = 0
        for place, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            asked = template.encode(talk[:place])
            assert ids[: len(asked)] == asked
            assert not any(is_learned[start : len(asked)])
            stop = next((n for n in range(len(asked), len(ids)) if not is_learned[n]), len(ids))
            start = stop
            said = tokenizer.decode(ids[len(asked) : stop])
            assert said.strip().removesuffix("<|im_end|>") == message["content"]
        assert start == len(ids) and ids[-1] == tokenizer.end_of_document_id
        if kind == "bpe" and text == CHATML:  # the mark that ends an answer is learned
            assert is_learned.count(True) > 0 and ids[-3] == tokenizer._tokenizer.token_to_id("<|im_end|>")


def test_a_template_that_closes_itself_is_not_closed_twice(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(LLAMA)
    tokenizer = TokenizersFile(str(folder), end_of_document_token="</s>")
    template: Any = read_template(str(tmp_path / "own.jinja"), tokenizer)
    talk = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "nothing"}]
    ids, is_learned = tokens_of(TokenizeChat(tokenizer, template)({"messages": [*talk, talk[0]]}))
    assert ids[0] == tokenizer._tokenizer.token_to_id("<s>")
    assert ids.count(tokenizer.end_of_document_id) == 1 and ids[-1] == tokenizer.end_of_document_id
    asked = template.encode(talk[:1])
    assert ids[: len(asked)] == asked and is_learned == [n >= len(asked) for n in range(len(ids))]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hi"}, "field 'messages' holds str, not a list of messages"),
        ({"mesages": []}, "no field 'messages'; fields there: mesages. Did you mean 'mesages'"),
        ({"messages": [{"from": "human", "value": "x"}]}, "has from, value, and needs role and content.*ShareGPT"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant, so there is nothing to learn"),
    ],
)
def test_a_talk_that_cannot_be_learned_is_refused(row: dict, said: str, folder: Path) -> None:
    tokenizer = TokenizersFile(str(folder))
    with pytest.raises(DataError, match=said):
        TokenizeChat(tokenizer, read_template("chat", tokenizer))(row)  # type: ignore[arg-type]


def test_a_template_that_rewrites_what_was_said_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages | length }}" + CHATML)
    tokenizer = TokenizersFile(str(folder))
    template: Any = read_template(str(tmp_path / "own.jinja"), tokenizer)
    with pytest.raises(DataError, match="writes message . of the talk otherwise than it asks for it"):
        TokenizeChat(tokenizer, template)({"messages": make_talk(random.Random(1), 1)})


def test_a_form_is_learned_where_it_says_and_asked_with_the_rest(folder: Path) -> None:
    form = Form("Question: {prompt}\nAnswer: {answer}\n", ["answer"])
    row = {"prompt": "2 + 2?", "answer": "4"}
    assert form.pieces(row) == [("Question: 2 + 2?\nAnswer: ", False), ("4\n", True)]
    assert form.asked == ["prompt"] and form.question(row) == "Question: 2 + 2?\nAnswer: "
    assert Form("{a}{{x}}{b}").pieces({"a": "1", "b": "2"}) == [("1{x}", True), ("2", True)]
    later = Form("{a}: {b} ({c})", ["b"])
    assert later.pieces({"a": "1", "b": "2", "c": "3"}) == [("1: ", False), ("2 (", True), ("3)", False)]
    for tokenizer in (ByteTokenizer(), TokenizersFile(str(folder))):
        ids, is_learned = tokens_of(TokenizeForm(tokenizer, form)(row))
        asked = tokenizer.encode(form.question(row)).tolist()
        assert ids[: len(asked)] == asked and is_learned == [n >= len(asked) for n in range(len(ids))]
        assert tokenizer.decode(ids[len(asked) :]) in ("4\n", "4\n<|endoftext|>")
    cut = TokenizeForm(ByteTokenizer(), form, max_length=10, too_long="truncate")(row)
    assert len(cut["input_ids"]) == 10 and (cut["target_ids"] == -100).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "no fields"}, "samples.template has no field that is learned. Write fields in braces"),
        ({"template": "{a} {"}, "samples.template: .*Double the braces"),
        ({"template": '{"q": 1}'}, "braces hold the name of a field and nothing else. Double all others"),
        ({"template": "{prompt}", "learned": ["promt"]}, "learned names 'promt', which is no field .*Did you mean"),
        ({"template": "{a}", "read": ["b"]}, "samples.template is for one text that is learned"),
        ({"template": "chat", "learned": ["user"]}, "of these the assistant's are learned; .*Leave learned out"),
    ],
)
def test_templates_that_make_no_sense_are_refused_at_once(options: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        SampleOptions(**options)


def test_where_there_is_no_template_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(ByteTokenizer\) lies neither chat_template.jinja nor a tokenizer_config"):
        read_template("chat", ByteTokenizer())
    with pytest.raises(DataError, match="nothing.jinja cannot be read"):
        read_template(str(tmp_path / "nothing.jinja"), ByteTokenizer())


def fit(folder: Path, tokenizer: str, samples: dict[str, Any]) -> Path:
    """Train for two steps, by the command line."""
    sizes = dict(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=420, max_sequence_length=256)
    settings = {
        "model": {
            "class_path": "LanguageModelingTask",
            "init_args": {"model": {"class_path": "GPT2Model", "init_args": {"config": sizes}}},
        },
        "data": {
            "class_path": "SATDataModule",
            "init_args": {
                "path": "rows.jsonl",
                "validation": 0,
                "batch_size": 4,
                "tokenizer": tokenizer,
                "options": {"samples": samples, "cache_dir": "cache"},
            },
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    main(["fit", "--config", "run.yaml"])
    return folder / "runs" / "run" / "version_0"


def first_sample(folder: Path, tokenizer: str, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
    options = DataOptions(samples=SampleOptions(**samples), cache_dir="cache")
    data = SATDataModule("rows.jsonl", 256, 4, tokenizer, validation=0, options=options)
    data.prepare_data()
    data.setup()
    return data.rows("train")[0]


@pytest.mark.parametrize("kind", ["chat", "form"])
def test_a_run_is_asked_as_it_was_taught(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "chat":
        talk = make_talk(random.Random(3), 1)[-2:]
        row, samples, tokenizer = {"messages": talk}, {"template": "chat"}, str(folder)
    else:
        talk = [{"role": "user", "content": "why ?"}]
        row, tokenizer = {"q": "why ?", "a": "because"}, "bytes"
        samples = {"template": "Q: {q}\nA: {a}", "learned": ["a"]}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    run = fit(tmp_path, tokenizer, samples)
    source = load_source(str(run), device="cpu")
    asked = use_template(source).encode(talk[:1])
    ids, is_learned = tokens_of(first_sample(tmp_path, tokenizer, samples))
    assert ids[: len(asked)] == asked and is_learned.index(True) == len(asked)
    if kind == "chat":  # an answer ends where the template closes it
        assert source.tokenizer._tokenizer.token_to_id("<|im_end|>") in source.end_tokens  # type: ignore[attr-defined]
    else:
        with pytest.raises(DataError, match="no place for a system message"):
            find_template(source).encode([{"role": "system", "content": "x"}, *talk])
    words = ["--ckpt", str(run), "--temperature", "0", "--max-new-tokens", "3"]
    main(["generate", *words, "--prompt", talk[0]["content"], "--chat", "--only-new"])
    with_chat = capsys.readouterr().out
    text = "Q: why ?\nA: " if kind == "form" else None
    if text is not None:
        main(["generate", *words, "--prompt", text, "--only-new"])
        assert capsys.readouterr().out == with_chat
