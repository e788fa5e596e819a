"""The benchmarks run, on tiny models; what they measure is not judged here."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(text: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_step(dtype, tmp_path):
    output = tmp_path / "table.md"
    text = run("train_step.py", "--rounds", "2", "--dtype", dtype, "--peers", "ours", "plain", "--output", str(output))
    table = rows(text)
    assert list(table) == ["sat_lightning", "plain PyTorch (nanoGPT style)"]
    assert output.read_text().strip() == text.strip()
    for step, tokens, ratio, fraction, memory in table.values():
        assert re.fullmatch(r"\d+\.\d \[\d+\.\d\.\.\d+\.\d\]", step)
        assert float(tokens) > 0 and float(ratio.split()[0]) > 0 and float(fraction) >= 0 and float(memory) >= 0
    assert table["plain PyTorch (nanoGPT style)"][2] == "1.000 [1.000..1.000]"


def test_train_step_of_every_peer():
    """The script itself refuses contestants whose first losses differ."""
    table = rows(run("train_step.py", "--rounds", "1", "--no-memory"))
    assert list(table)[2:] == ["transformers, tuned", "transformers, default"]
    assert {row[-1] for row in table.values()} == {"-"}


def test_hook_overhead():
    table = rows(run("hook_overhead.py", "--rounds", "3"))
    assert list(table) == ["no hooks", "hook table, no mixin", "5 wrapping mixins"]
    assert table["no hooks"][2] == "0.000 %"


def test_data_loading():
    """The script itself refuses contestants that read different samples."""
    table = rows(run("data_loading.py", "--rounds", "2"))
    kinds = [name.partition(": ")[0] for name in table]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [2, 2, 3, 4, 1]
    for name, (rate, ratio, prepared) in table.items():
        assert re.fullmatch(r"\d+ \[\d+\.\.\d+\]", rate) and float(prepared) >= 0
        assert (ratio == "1") == name.endswith((": ours", ": ours, by URL"))


def test_data_index():
    table = rows(run("data_index.py", "--rounds", "1"))
    assert list(table) == [
        "ours, three sources",
        "ours, one source",
        "torch WeightedRandomSampler",
        "datasets.interleave_datasets",
        "SAT's way",
    ]
    for name in ("ours, three sources", "ours, one source"):
        size, rate, start, resume, memory = table[name]
        assert size == "1e6" and float(rate.split()[0]) > 0 and float(memory) < 50
        assert float(start.split()[0]) < 50 and float(resume.split()[0]) < 50
    assert table["torch WeightedRandomSampler"][3] == "draws all again"


def test_decode():
    """The script itself refuses contestants that write different texts."""
    text = run("decode.py", "--rounds", "1", "--batch-sizes", "2", "--peers", "ours", "hf")
    table = rows(text)
    assert list(table) == ["sat_lightning", "transformers, dynamic cache", "reading every weight once"]
    for speed, ratio, share in table.values():
        assert float(speed.split()[0]) > 0 and float(ratio.split()[0]) > 0 and float(share) >= 0


@pytest.mark.slow  # a process for each contestant and round
def test_loading():
    """The script itself refuses contestants that read different weights."""
    table = rows(run("loading.py", "--rounds", "1"))
    assert len(table) == 7 and list(table)[0] == "sat_lightning, native"
    assert all(float(row[4].split()[0]) > 0.5 for row in table.values())


OVERHEAD = [
    "bare loop",
    "Lightning, minimal",
    "Lightning, one self.log a step",
    "ours, minimal",
    "ours: logging",
    "ours: logging + RunMonitor",
    "ours: logging + SkipNonFinite",
    "ours: guard + monitor + logging",
    "ours: the same + EMA",
    "ours: the same + progress bar",
]


@pytest.mark.parametrize(
    "words", [["--own-time"], pytest.param(["--zero"], marks=pytest.mark.slow)], ids=["alone", "zero"]
)
@pytest.mark.timeout(600)
def test_overhead(words, tmp_path):
    output = tmp_path / "table.md"
    table = rows(run("overhead.py", *words, "--output", str(output)))
    assert list(table) == OVERHEAD and output.read_text().count("### ") == 1
    assert all(float(step.split()[0]) > 0 for step, *_ in table.values())
    assert table["bare loop"][2] == table["Lightning, minimal"][1] == "0.000 [0.000..0.000]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_memory_falls_as_theory_says():
    text = run("zero_memory.py")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "zero_" in line]
    assert len(lines) == 8
    for _, _, *cells in lines:
        for cell in cells:
            measured, theory = (float(number) for number in cell.strip(")").split(" ("))
            assert measured == pytest.approx(theory, rel=0.02)


def test_lora_step():
    """The script itself refuses contestants whose first losses differ."""
    table = rows(run("lora_step.py", "--rounds", "1"))
    assert [name.partition(",")[0] for name in table] == ["sat_lightning", "sat_lightning", *["transformers"] * 2]
    trained = [int(row[0]) for row in table.values()]
    assert trained[0] == trained[2] == trained[3] < trained[1]


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    """The folder of scripts is importable, here and in contestants."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def contend(baton, name, num_steps, log, fails_at=-1):
    """A contestant that writes down when it computes."""
    baton.start([10] * num_steps)
    for step in range(num_steps):
        if step == fails_at:
            raise RuntimeError(f"{name} is out of breath")
        with open(log, "a") as file:
            file.write(name)
        baton.step(torch.tensor(float(step)))
    with open(log, "a") as file:
        file.write(name.upper())
    return {"name": name}


def test_one_contestant_computes_at_a_time(benchmarks, tmp_path):
    import baton

    log = tmp_path / "log"
    seen = []
    results = baton.race(
        {name: (contend, name, 5, str(log)) for name in "abc"},
        turn=2,
        inspect=lambda results: seen.append([*log.read_text(), *map(len, (r.turns for r in results.values()))]),
    )
    assert seen == [[*"aabbcc", 1, 1, 1]]
    assert log.read_text() == "aabbcc" + "bbccaa" + "cab" + "ABC"  # a round begins with the next; the end is a turn too
    for name, result in results.items():
        assert result.values == {"name": name} and result.losses == [0, 1, 2, 3, 4]
        assert [turn.tokens for turn in result.turns] == [20, 20, 10] and len(result.timed) == 2
        assert result.tokens_per_second() == 30 / sum(turn.seconds for turn in result.turns[1:])
    pairs = zip(results["a"].timed, results["b"].timed, strict=True)
    assert results["a"].ratios(results["b"]) == [b.seconds / a.seconds for a, b in pairs]


def test_a_contestant_that_fails_says_why(benchmarks, tmp_path):
    import baton

    log = str(tmp_path / "log")
    with pytest.raises(SystemExit, match=r"b failed:\n(.|\n)*RuntimeError: b is out of breath"):
        baton.race({"a": (contend, "a", 4, log), "b": (contend, "b", 4, log, 3)}, turn=2)


def test_an_unequal_contest_is_refused(benchmarks):
    import finetune_sst2
    from baton import Result, Turn

    job = finetune_sst2.Job(Path("model"), Path("data"), "lora", seed=3)

    def result(losses=(0.7, 0.6), tokens=10, **values):
        turns = [Turn(1.0, tokens, list(losses), 0.0), Turn(2.0, tokens, [0.0, 0.0], 0.0)]
        return Result(turns, {"trained": 4, "decayed": 2, "data": "abc"} | values)

    def check(contest):
        finetune_sst2.check_losses(job, contest)
        finetune_sst2.check_facts(job, contest)

    check({"ours": result(), "theirs": result((0.70009, 0.6009))})
    for other, message in [
        (result((0.70011, 0.6)), r"lora, seed 3: ours and theirs have losses 0\.7 and 0\.70011 at step 0"),
        (result((0.7, 0.6011)), r"losses 0\.6 and 0\.6011 at step 1"),
        (result((float("nan"), 0.6)), "losses 0.7 and nan at step 0"),
        (result(data="abd"), "differ in 'data': abc and abd"),
        (result(trained=5), "differ in 'trained': 4 and 5"),
        (result(decayed=3), "differ in 'decayed': 2 and 3"),
    ]:
        with pytest.raises(SystemExit, match=message):
            check({"ours": result(), "theirs": other})
    with pytest.raises(SystemExit, match="different tokens"):
        result().ratios(result(tokens=11))


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory) -> tuple[str, str]:
    """A tiny random BERT with a WordPiece vocabulary, and sentences of a few words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    words = ["good", "bad", "film", "plot", "a", "the", "and", "very"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (model / "vocab.txt").write_text("\n".join(tokens))
    sizes = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(tokens), max_position_embeddings=80, **sizes)).save_pretrained(model)
    BertTokenizerFast.from_pretrained(model).save_pretrained(model)
    order = random.Random(0)
    for name, count in (("train.tsv", 170), ("dev.tsv", 40)):
        texts = [" ".join(order.choices(words, k=order.randint(1, 20))) for _ in range(count)]
        lines = [f"{text}\t{int('good' in text.split())}" for text in texts]
        (data / name).write_text("\n".join(["sentence\tlabel", *lines]))
    return str(model), str(data)


UNPAD, OURS, THEIRS = "sat_lightning, unpad", "sat_lightning", "transformers + PEFT"


@pytest.mark.parametrize(
    "methods",
    [["lora", "adapters"], pytest.param(["full", "prefix", "prefix+lora"], marks=pytest.mark.slow)],
    ids=lambda methods: ",".join(methods),
)
@pytest.mark.timeout(600)
def test_finetune_sst2(methods, sentiment, tmp_path):
    """The script itself refuses contestants whose losses differ, or what they train on."""
    output = tmp_path / "table.md"
    text = run("finetune_sst2.py", *sentiment, "--methods", *methods, "--threads", "1", "--output", str(output))
    assert output.read_text().strip() == text.strip()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:2] == "| "]
    table = {(library, method): cells for library, method, *cells in lines[2:]}
    paired = [method for method in methods if method in ("full", "lora", "prefix")]
    assert set(table) == {(UNPAD, method) for method in methods} | {
        (library, method) for method in paired for library in (OURS, THEIRS)
    }
    for (library, method), (trained, accuracy, seconds, speed, peak, ratio, memory) in table.items():
        assert int(trained) > 0 and 0 <= float(accuracy.split()[0]) <= 100 and float(seconds.split()[0]) >= 0
        assert float(speed) > 0 and float(peak) > 0
        if method not in paired:
            assert ratio == memory == "-"
        elif library == THEIRS:
            assert ratio == "1.00 [1.00..1.00]" and memory == "1.00"
        else:
            assert float(ratio.split()[0]) > 0 and float(memory) > 0
