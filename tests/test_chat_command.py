"""`sat-lightning chat`: templates as Hugging Face renders them, and talks that remember, forget and fit."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from sat_lightning.cli import main
from sat_lightning.errors import DataError
from sat_lightning.generation import generate, greedy
from sat_lightning.models import GPT2Model
from sat_lightning.training.commands import chat
from sat_lightning.training.commands.source import load_source
from sat_lightning.training.commands.template import JinjaTemplate, NumberedRounds, find_template

tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}{{ bos_token }}<|im_start|>system
{{ messages[0]['content'] | trim }}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
WORDS = ["<|endoftext|>", "[UNK]", "system", "user", "assistant", *"abcdefgh"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20, "max_sequence_length": 64}
    net = GPT2Model(GPT2Model.config_class(**sizes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 14}')
    return folder


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, said: str, *words: object) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    capsys.readouterr()
    main(["chat", *map(str, words)])
    return capsys.readouterr().out


def answers(model: Path, *talk: str, system: str | None = None, num: int = 6) -> list[str]:
    """What greedy decoding answers to each message, each behind those before it and their answers."""
    source = load_source(str(model), device="cpu")
    template = find_template(source)
    messages = [{"role": "system", "content": system}] if system else []
    texts = []
    for text in talk:
        messages.append({"role": "user", "content": text})
        options = {"max_new_tokens": num, "end_tokens": source.end_tokens, "strategy": greedy()}
        found = generate(source.model, [template.encode(messages)], tokenizer=source.tokenizer, **options)[0]
        texts.append(found.text.lstrip())
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_templates_are_rendered_as_hugging_face_renders_them(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), bos_token="<|endoftext|>", chat_template=TEMPLATE
    )
    template = find_template(load_source(str(model), device="cpu"))
    system, first = {"role": "system", "content": " a b "}, {"role": "user", "content": "c d"}
    rounds = [first, {"role": "assistant", "content": "e"}, {"role": "user", "content": "f <|im_end|> a"}]
    for messages in ([first], [system, first], rounds, [system, *rounds]):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert template.encode(messages) == list(expected)
    with pytest.raises(DataError, match="refuses this talk: system comes first"):
        template.encode([first, system])


def test_a_template_lies_in_a_file_of_its_own_or_among_several_or_is_given(model: Path, tmp_path: Path) -> None:
    source = load_source(str(model), device="cpu")
    source.weights = tmp_path
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]})
    )
    asked = [{"role": "user", "content": "c"}]
    place = WORDS.index
    assert find_template(source).encode(asked) == [place("b")]
    (tmp_path / "chat_template.jinja").write_text("c")
    assert find_template(source).encode(asked) == [place("c")]
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }} d {{ messages | tojson | length > 5 }}")
    assert find_template(source, str(tmp_path / "own.jinja")).encode(asked)[:2] == [place("c"), place("d")]


def test_marks_of_what_was_generated_are_no_text() -> None:
    inside = "{{ m.content }}{% if loop.last %}!{% endif %}"
    text = f"{{% for m in messages %}}{{% generation %}}{inside}{{% endgeneration %}}{{% endfor %}}"
    template = JinjaTemplate(text, lambda text: map(ord, text))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.encode(said) == [ord(letter) for letter in "ab!"]


def test_a_template_is_data_and_runs_in_a_sandbox() -> None:
    template = JinjaTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", list)
    with pytest.raises(DataError, match="refuses this talk"):
        template.encode([])
    with pytest.raises(DataError, match="the chat template is none"):
        JinjaTemplate("{% if %}", list)


def test_a_talk_is_remembered_until_it_is_reset(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base = ["--ckpt", model, "--temperature", 0, "--max-new-tokens", 6]
    one, two = answers(model, "a b", "c")
    assert talk(monkeypatch, capsys, "a b\n\nc\n/reset\na b\n", *base) == f"{one}\n{two}\n{one}\n"
    (fresh,) = answers(model, "c")
    assert fresh != two
    assert talk(monkeypatch, capsys, "a b\n/reset\nc\n/exit\na b\n", *base) == f"{one}\n{fresh}\n"
    (told,) = answers(model, "a b", system="d d d")
    assert told != one
    assert talk(monkeypatch, capsys, "a b\n", *base, "--system", "d d d") == f"{told}\n"


def test_same_seed_same_talk(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", model, "--max-new-tokens", 8, "--temperature", 3]
    texts = [talk(monkeypatch, capsys, "a\na\n", *words, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_oldest_rounds_make_room_and_a_message_too_long_is_refused_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked, real = [], chat.stream
    monkeypatch.setattr(chat, "stream", lambda net, rows, **kw: (asked.append(rows[0]), real(net, rows, **kw))[1])
    said = "\n".join(["a", "b " * 60, *"bcdefgh"])
    words = ["--ckpt", model, "--temperature", 0, "--max-new-tokens", 5, "--ignore-end", "--system", "d"]
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    main(["chat", *map(str, words)])
    err = capsys.readouterr().err
    assert "tokens; 59 are left beside the answer (--max-new-tokens 5)" in err
    assert len(asked) == 8 and max(map(len, asked)) <= 59 and len(asked[-1]) > 40
    begin = load_source(str(model), device="cpu").tokenizer.encode("<|endoftext|><|im_start|>system d<|im_end|>")
    assert all(ids[: len(begin)] == list(begin) for ids in asked)
    assert WORDS.index("a") not in asked[-1] and WORDS.index("h") in asked[-1]


def test_an_answer_that_is_broken_off_is_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked, real = [], chat.stream

    def interrupted(net, rows, **kw):
        asked.append(rows[0])
        for number, part in enumerate(real(net, rows, **kw)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(chat, "stream", interrupted)
    talk(monkeypatch, capsys, "a\nb\n", "--ckpt", model, "--temperature", 0, "--max-new-tokens", 6, "--ignore-end")
    assert len(asked) == 2 and asked[1][: len(asked[0])] == asked[0]


def test_chatglm_rounds() -> None:
    first = NumberedRounds(lambda text: map(ord, text), [], [7, 8], is_second=False)
    assert first.render(["hi"]) == "hi"
    assert first.render(["a", "b", "c"]) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："
    assert first.encode([{"role": "user", "content": "x"}]) == [ord("x"), 7, 8]
    second = NumberedRounds(lambda text: map(ord, text), [5, 6], [], is_second=True)
    assert second.render(["a", "b", "c"]) == "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："
    with pytest.raises(DataError, match="no place for a system message"):
        second.encode([{"role": "system", "content": "x"}])


def test_one_line_says_what_is_wrong(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model_config.json", "model.safetensors", "tokenizer.json"):
        (bare / name).write_bytes((model / name).read_bytes())
    for words, code, message in (
        (["--ckpt", bare], 1, "has no chat template: neither chat_template.jinja nor a chat_template in"),
        (["--ckpt", model, "--num-beams", "3"], 2, "--num-beams revises what it wrote"),
        (["--ckpt", model, "--template", tmp_path / "no"], 1, "cannot be read"),
        (["--ckpt", tmp_path / "nothing"], 1, "nothing"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["chat", *map(str, words)])
        err = capsys.readouterr().err.strip()
        assert (stop.value.code, len(err.splitlines())) == (code, 1) and message in err, err
