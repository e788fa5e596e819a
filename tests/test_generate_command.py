"""`sat-lightning generate`: from a run, a checkpoint or a folder; to the terminal, or to a file that bears a kill."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from sat_lightning import AutoModel
from sat_lightning.cli import main
from sat_lightning.data import ByteTokenizer
from sat_lightning.generation import BaseStrategy, generate, greedy
from sat_lightning.training.commands import generate as command
from tests.writer_example import fit_writer

PROMPTS = ["To be", "or not to be, that", "x", "", "question", "Üb", "that is"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a tiny run was made."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / fit_writer(callbacks="[{class_path: ExportModel}]")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "id": f"p{i}"}) + "\n" for i, prompt in enumerate(PROMPTS))
    )
    return tmp_path


def run(*words: object) -> None:
    main(["generate", *map(str, words)])


def lines(path: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def alone(model, prompt: str, strategy: BaseStrategy, index: int = 0, num: int = 8, seed: int = 3) -> str:
    ids = list(ByteTokenizer().encode(prompt)) or [256]
    options = {"max_new_tokens": num, "end_tokens": [256], "seed": seed, "row_ids": [index]}
    return generate(model, [ids], strategy=strategy, tokenizer=ByteTokenizer(), **options)[0].text


def test_a_run_a_checkpoint_and_a_folder_write_the_same(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (checkpoint,) = (runs / "checkpoints").glob("*.ckpt")
    expected = alone(AutoModel.from_pretrained(runs / "model"), "To be", greedy())
    bare = shutil.copytree(runs, folder / "bare")
    shutil.rmtree(bare / "model")
    lone = shutil.copy(checkpoint, folder / "lone.ckpt")
    for source in ([runs], [checkpoint], [runs / "model"], [bare], [lone, "--tokenizer", "bytes"]):
        capsys.readouterr()
        run("--ckpt", *source, "--prompt", "To be", "--temperature", 0, "--max-new-tokens", 8)
        assert capsys.readouterr().out == f"To be{expected}\n", source


def test_prompts_are_written_on_one_after_the_other_as_it_goes(
    runs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModel.from_pretrained(runs / "model")
    strategy = BaseStrategy(temperature=0.9, top_k=20, min_p=0.01, signed_repetition_penalty=1.1)
    pieces, say = [], command.say
    monkeypatch.setattr(command, "say", lambda text: (pieces.append(text), say(text)))
    run(
        "--ckpt", runs, "--prompt", "To be", "--prompt", "", "--only-new", "--max-new-tokens", 8, "--seed", 3,
        "--temperature", 0.9, "--top-k", 20, "--min-p", 0.01, "--repetition-penalty", 1.1,
    )  # fmt: skip
    texts = [alone(model, prompt, strategy, index) for index, prompt in enumerate(("To be", ""))]
    assert capsys.readouterr().out == f"{texts[0]}\n\n{texts[1]}\n"
    assert len([piece for piece in pieces if piece]) > 4


def test_beams_give_the_best_and_those_behind(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", runs, "--num-beams", 3, "--n-best", 2, "--max-new-tokens", 6]
    run(*words, "--prompt", "To be", "--output", "out.jsonl")
    (line,) = lines()
    assert len(line["alternatives"]) == 1 and line["score"] >= line["alternatives"][0]["score"]
    capsys.readouterr()
    run(*words, "--prompt", "To be")
    out = capsys.readouterr().out
    assert out == f"To be{line['generated']}\nTo be{line['alternatives'][0]['generated']}\n"


def test_a_draft_changes_no_text(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", runs, "--temperature", 0, "--max-new-tokens", 8]
    run(*words, "--input", "prompts.jsonl", "--output", "plain.jsonl")
    run(*words, "--input", "prompts.jsonl", "--output", "out.jsonl", "--draft", runs, "--num-drafts", 3)
    assert lines() == lines("plain.jsonl") and len(lines()) == len(PROMPTS)
    assert str(runs / "model") in Path("out.jsonl.settings.json").read_text()
    capsys.readouterr()
    run(*words, "--prompt", "To be", "--prompt", "x", "--draft", runs)
    whole = capsys.readouterr().out
    run(*words, "--prompt", "To be", "--prompt", "x")
    assert capsys.readouterr().out == whole
    capsys.readouterr()
    assert fails(capsys, *words[:2], "--prompt", "x", "--draft", runs, "--num-beams", 2) == (1, "needs a BaseStrategy")


def test_what_ends_a_text(runs: Path, folder: Path) -> None:
    base = ["--ckpt", runs, "--prompt", "To be", "--temperature", 0, "--max-new-tokens", 8, "--overwrite"]
    run(*base, "--ignore-end", "--output", "out.jsonl")
    (whole,) = lines()
    assert (whole["finish"], whole["num_tokens"]) == ("length", 8)
    text = whole["generated"]
    third = text[2]
    run(*base, "--stop", third, "--output", "out.jsonl")
    (line,) = lines()
    assert (line["generated"], line["finish"]) == (text[: text.index(third)], "stop")
    run(*base, "--end-token", ord(third), "--output", "out.jsonl")
    (line,) = lines()
    assert (line["generated"], line["finish"]) == (text[: text.index(third)], "end")
    run(*base, "--bad-word", third, "--output", "out.jsonl")
    assert third not in lines()[0]["generated"]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_a_file_is_answered_in_its_order_whatever_the_batches(runs: Path, folder: Path, batch_size: int) -> None:
    model = AutoModel.from_pretrained(runs / "model")
    words = ["--temperature", 1.5, "--top-p", 0.95, "--seed", 3, "--max-new-tokens", 8, "--batch-size", batch_size]
    run("--ckpt", runs, "--input", "prompts.jsonl", "--output", "out.jsonl", *words)
    found = lines()
    assert [(line["index"], line["id"], line["prompt"]) for line in found] == [
        (i, f"p{i}", prompt) for i, prompt in enumerate(PROMPTS)
    ]
    strategy = BaseStrategy(temperature=1.5, top_k=0, top_p=0.95)
    assert [line["generated"] for line in found] == [alone(model, p, strategy, i) for i, p in enumerate(PROMPTS)]
    assert not list(folder.glob(".out*"))


def test_a_killed_run_goes_on_and_writes_what_it_would_have_written(
    runs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--ckpt", runs, "--input", "prompts.jsonl", "--max-new-tokens", 6, "--batch-size", 2]
    calls, real = [], command.generate

    def dying(model, prompts, **kw):
        assert not Path("out.jsonl").exists() or Path("out.jsonl").read_bytes().endswith(b"\n")
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, prompts, **kw)

    monkeypatch.setattr(command, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(*words, "--output", "out.jsonl")
    done = lines()
    assert [line["index"] for line in done] == [1, 4, 6, 0]  # in the order of their lengths, the longest first
    torn = '{"prompt": "x", "id": "p2", "index": 2, "gen'
    with Path("out.jsonl").open("a") as file:
        file.write(torn)
    calls.extend([0, 0])  # nobody dies again
    run(*words, "--output", "out.jsonl")
    assert sum(calls[5:]) == len(PROMPTS) - len(done)
    found = lines()
    assert [line["index"] for line in found] == list(range(len(PROMPTS)))
    assert all(line in found for line in done)
    assert "3 written, 4 were there" in capsys.readouterr().err
    seed = json.loads(Path("out.jsonl.settings.json").read_text())["seed"]
    run(*words, "--output", "whole.jsonl", "--seed", seed)
    assert Path("whole.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    before = len(calls)
    run(*words, "--output", "out.jsonl")
    assert len(calls) == before


def test_an_output_of_something_else_is_left_alone(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", runs, "--input", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", 2]
    run(*words)
    before = Path("out.jsonl").read_bytes()
    assert fails(capsys, *words, "--temperature", 0.5) == (2, "temperature (was 1.0, is 0.5)")
    text = Path("prompts.jsonl").read_text()
    Path("prompts.jsonl").write_text(text.replace("To be", "To me"))
    assert fails(capsys, *words) == (1, "out.jsonl:1 belongs to another input")
    assert Path("out.jsonl").read_bytes() == before
    run(*words, "--temperature", 0.5, "--overwrite")
    assert lines()[0]["prompt"] == "To me"
    Path("notes.jsonl").write_text("mine\n")
    assert fails(capsys, *words[:-3], "notes.jsonl", *words[-2:]) == (1, "notes.jsonl exists, and is no output")
    assert Path("notes.jsonl").read_text() == "mine\n"


def fails(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    """Run what is refused; returns the code, and the message up to its first sentence's known part."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith("sat-lightning generate: error: "), err
    return stop.value.code, next((part for part in MESSAGES if part in err), err)


REFUSED = {
    "neither": ([], 2, "give either --prompt TEXT"),
    "both": (["--prompt", "a", "--input", "prompts.jsonl"], 2, "give either --prompt TEXT"),
    "no output": (["--input", "prompts.jsonl"], 2, "needs --output FILE.jsonl"),
    "no file": (["--input", "no.jsonl", "--output", "o"], 1, "no.jsonl cannot be read"),
    "no json": (["--input", "broken.jsonl", "--output", "o"], 1, "broken.jsonl:2 is no JSON"),
    "no field": (
        ["--input", "prompts.jsonl", "--field", "text", "--output", "o"],
        1,
        "prompts.jsonl:1 holds no text",
    ),
    "no text": (
        ["--input", "number.jsonl", "--output", "o"],
        1,
        "number.jsonl:2 holds no text as 'prompt' and no input_ids, 'prompt' is of type int",
    ),
    "no word": (["--input", "ids.jsonl", "--output", "o"], 1, "prompt 2 holds the id 300; the model has 257 words"),
    "no end": (["--prompt", "x", "--end-token", "257"], 2, "--end-token '257' is outside the vocabulary of 257"),
    "too long": (["--prompt", "x" * 40, "--max-new-tokens", "20"], 1, "prompt 1 has 40 tokens; the model has 48"),
    "no room": (["--prompt", "x", "--max-new-tokens", "48"], 2, "--max-new-tokens is 48, and the model has 48"),
    "beams": (["--prompt", "x", "--n-best", "2"], 2, "--n-best is 2; it is at least 1"),
    "top_p": (["--prompt", "x", "--top-p", "1.5"], 1, "top_p"),
    "token": (["--prompt", "x", "--end-token", "ab"], 2, "--end-token 'ab' is 2 tokens"),
    "device": (["--prompt", "x", "--device", "nowhere"], 2, "--device nowhere:"),
    "word": (["--prompt", "x", "--temprature", "1"], 2, "unrecognized arguments: --temprature 1"),
    "ends": (["--prompt", "x", "--ignore-end", "--end-token", "5"], 2, "contradict each other"),
    "compile": (["--prompt", "x", "--draft", "x", "--compile"], 2, "--compile compiles the step of one token"),
    "drafts": (["--prompt", "x", "--num-drafts", "2"], 2, "--num-drafts says how much a draft proposes"),
    "batch": (["--prompt", "x", "--batch-size", "0"], 2, "--batch-size is 0"),
}
MESSAGES = [message for _, _, message in REFUSED.values()] + [
    "temperature (was 1.0, is 0.5)", "out.jsonl:1 belongs to another input", "notes.jsonl exists, and is no output",
    "There is no tokenizer", "needs a BaseStrategy", "no such folder", "written by another process",
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong(case: str, runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "broken.jsonl").write_text('"a"\n{"prompt": \n')
    (folder / "number.jsonl").write_text('"a"\n{"prompt": 5}\n')
    (folder / "ids.jsonl").write_text('"a long prompt"\n{"input_ids": [300]}\n')
    words, code, message = REFUSED[case]
    assert fails(capsys, "--ckpt", runs, *words) == (code, message)
    assert not list(folder.glob(".o*"))


def test_a_file_may_begin_with_a_mark_of_its_encoding(runs: Path, folder: Path) -> None:
    (folder / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xf0\x9f\x98\x80"}\r\n')
    run("--ckpt", runs, "--input", "marked.jsonl", "--output", "out.jsonl", "--max-new-tokens", 2)
    assert [(line["prompt"], line["index"]) for line in lines()] == [("a", 0), ("😀", 2)]


def test_prompts_too_long_lose_their_beginning_if_asked(runs: Path, folder: Path) -> None:
    model = AutoModel.from_pretrained(runs / "model")
    prompt = "To be, or not to be, that is the question indeed"
    words = ["--truncate", "--max-new-tokens", 8, "--temperature", 0, "--output", "out.jsonl"]
    run("--ckpt", runs, "--prompt", prompt, *words)
    assert lines()[0]["generated"] == alone(model, prompt[-40:], greedy())


def test_without_a_tokenizer_or_a_run_it_says_so(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "deep" / "er" / "and").mkdir(parents=True)
    model = shutil.copytree(runs / "model", folder / "deep" / "er" / "and" / "model")
    assert fails(capsys, "--ckpt", model, "--prompt", "x") == (1, "There is no tokenizer")
    with pytest.raises(SystemExit, match="1"):
        main(["generate", "--ckpt", "runs/nothing", "--prompt", "x"])
    assert "there is no such file or folder" in capsys.readouterr().err
    (checkpoint,) = (runs / "checkpoints").glob("*.ckpt")
    lone = shutil.copy(checkpoint, model.parent / "lone.ckpt")
    assert fails(capsys, "--ckpt", lone, "--prompt", "x") == (1, "There is no tokenizer")


def test_a_second_writer_is_kept_out(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    from sat_lightning.training.commands.records import only_writer

    with only_writer("out.jsonl"):
        words = ["--ckpt", runs, "--prompt", "x", "--output", "out.jsonl"]
        assert fails(capsys, *words) == (1, "written by another process")


def test_a_hugging_face_folder_brings_its_tokenizer_and_its_ends(folder: Path, capsys: pytest.CaptureFixture) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    words = ["<|endoftext|>", "a", "b", "c", "d", "[UNK]", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    with torch.no_grad():
        theirs.lm_head.weight.mul_(20)
        theirs.model.embed_tokens.weight.mul_(20)
    theirs.save_pretrained("hf")
    tokenizer.save("hf/tokenizer.json")
    expected = theirs.generate(torch.tensor([[1, 2]]), max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0, 2:
    ].tolist()
    Path("hf/generation_config.json").write_text(json.dumps({"eos_token_id": [expected[2], 0]}))
    base = ["--ckpt", "hf", "--prompt", "a b", "--temperature", 0, "--max-new-tokens", 6, "--overwrite"]
    run(*base, "--output", "out.jsonl")
    (line,) = lines()
    ends = {expected[2], 0}
    place = next(i for i, token in enumerate(expected) if token in ends)
    assert (line["finish"], line["num_tokens"]) == ("end", place + 1)
    run(*base, "--ignore-end", "--output", "out.jsonl")
    assert lines()[0]["generated"] == " " + tokenizer.decode(expected)  # behind the prompt's last word
    # What the tokenizer's file puts before a text stands before a prompt, and what it puts behind one does not.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="d $A <|im_end|>", special_tokens=[("d", 4), ("<|im_end|>", 6)]
    )
    tokenizer.save("hf/tokenizer.json")

    def behind(*prompt: int) -> str:
        found = theirs.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        return " " + tokenizer.decode(found[0, len(prompt) :].tolist())

    run(*base, "--ignore-end", "--output", "out.jsonl")
    assert lines()[0]["generated"] == behind(4, 1, 2)
    run(*base, "--ignore-end", "--output", "out.jsonl", "--begin-token", "c", "--begin-token", "3")
    assert lines()[0]["generated"] == behind(3, 3, 1, 2)


def test_what_is_written_obeys_a_regular_expression_or_a_schema(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("llguidance")
    base = ["--ckpt", runs, "--prompt", "To be", "--max-new-tokens", 24, "--seed", 1, "--output", "out.jsonl"]
    run(*base, "--regex", "(yes|no) [0-9]{4}")
    (line,) = lines()
    assert re.fullmatch("(yes|no) [0-9]{4}", line["generated"]) and line["finish"] == "end"
    Path("schema.json").write_text('{"enum": ["one", "two"]}')
    run(*base, "--overwrite", "--json-schema", "schema.json")
    assert json.loads(lines()[0]["generated"]) in ("one", "two")
    assert fails(capsys, *base, "--json-schema", "none.json")[0] == 2


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_help_names_every_option(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and all(word in out for word in ("--ckpt", "--top-p", "--stop", "--seed", "--device"))


def test_who_is_kept_out_leaves_the_lock_to_its_holder(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    from sat_lightning.training.commands.records import only_writer

    words = ["--ckpt", runs, "--prompt", "x", "--output", "out.jsonl", "--max-new-tokens", 2]
    with only_writer("out.jsonl"):
        for _ in range(3):
            assert fails(capsys, *words) == (1, "written by another process")
    run(*words)
    assert len(lines()) == 1 and not list(folder.glob(".out*"))


def test_what_is_overwritten_stays_until_the_new_run_can_begin(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--ckpt", runs, "--input", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", 2]
    run(*words)
    before = Path("out.jsonl").read_bytes(), Path("out.jsonl.settings.json").read_bytes()
    for more, message in ((["--top-p", 1.5], "top_p"), (["--end-token", "ab"], "--end-token 'ab' is 2 tokens")):
        assert fails(capsys, *words, "--overwrite", *more)[1] == message
        assert (Path("out.jsonl").read_bytes(), Path("out.jsonl.settings.json").read_bytes()) == before
    run(*words, "--overwrite", "--temperature", 0)
    assert len(lines()) == len(PROMPTS) and Path("out.jsonl").read_bytes() != before[0]


def test_a_file_that_is_not_ours_is_not_mended(runs: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--ckpt", runs, "--input", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", 2]
    run(*words)
    Path("out.jsonl").write_text('{"index": "one"}\nand the last line of a note')
    assert fails(capsys, *words)[1].startswith("sat-lightning generate: error: out.jsonl:1 is no line of this verb")
    assert Path("out.jsonl").read_text().endswith("\nand the last line of a note")


def test_a_prompt_too_long_is_refused_before_the_first_is_answered(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_BATCHES_PER_BLOCK", 1)
    Path("prompts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in ["a", "b", "c", "x" * 40]))
    words = ["--ckpt", runs, "--input", "prompts.jsonl", "--output", "out.jsonl", "--max-new-tokens", 20]
    found = fails(capsys, *words, "--batch-size", 1)
    assert found[1].startswith("sat-lightning generate: error: prompt 4 has 40 tokens")
    assert not Path("out.jsonl").exists()
