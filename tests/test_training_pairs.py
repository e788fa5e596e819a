"""Pairs of texts: tokenized, padded, learned, and answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sat_lightning.data import ByteTokenizer, PairCollate, SampleOptions, Tokenize, TokenizePair, open_records
from sat_lightning.errors import ConfigError, DataError
from sat_lightning.models import T5Model
from sat_lightning.models.t5 import T5Config
from sat_lightning.training import DataOptions, SATDataModule, SequenceToSequenceTask
from sat_lightning.training.sequence_to_sequence import rouge_l
from tests.training_examples import make_model, make_trainer

END = 256
OWN = {"end_token_id": END, "decoder_start_id": END}


def make_t5(**changes: Any) -> T5Model:
    sizes = dict(num_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=257, max_sequence_length=24)
    return T5Model(T5Config(**{**sizes, **changes}))


def make_pairs() -> list[dict[str, torch.Tensor]]:
    tokenize = TokenizePair(Tokenize("bytes", ["text"], add_end=False), Tokenize("bytes", ["summary"]))
    return [tokenize({"text": text, "summary": text[:size]}) for text, size in (("abcdef", 2), ("xyz", 3))]


def make_data(folder: Path) -> SATDataModule:
    rows = [{"text": letter * (2 + index % 5), "summary": letter} for index, letter in enumerate("abcdefgh" * 8)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = SampleOptions(["summary"], read=["text"])
    path = str(folder / "pairs.jsonl")
    return SATDataModule(path, 24, 8, validation=path, options=DataOptions(samples=samples, cache_dir=str(folder)))


def test_a_pair_is_padded_apart_and_a_row_of_nothing_has_no_target():
    batch = PairCollate()([*make_pairs(), None])
    assert batch["input_ids"][1].tolist() == [*b"xyz", 0, 0, 0]
    assert batch["target_ids"].tolist() == [[*b"ab", END, -100], [*b"xyz", END], [-100] * 4]
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 1]


def test_pairs_are_not_packed_and_a_field_is_missed_by_name():
    with pytest.raises(DataError, match="samples.read makes pairs, which are not packed and learned as a whole"):
        SampleOptions(read=["text"], pack=True)
    tokenize = TokenizePair(Tokenize("bytes", ["txt"]), Tokenize("bytes", ["summary"]))
    with pytest.raises(DataError, match="no field 'txt'.*Did you mean 'text'"):
        tokenize({"text": "a", "summary": "b"})


def test_the_data_module_gives_the_encoder_what_is_read_and_the_decoder_what_is_written(tmp_path: Path):
    data = make_data(tmp_path)
    data.prepare_data()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert set(batch) == {"input_ids", "attention_mask", "target_ids"}
            for read, mask, written in zip(
                batch["input_ids"], batch["attention_mask"], batch["target_ids"], strict=True
            ):
                text = bytes(read[mask].tolist()).decode()
                assert len(text) >= 2 and text == text[0] * len(text)
                assert written.tolist() == [ord(text[0]), END]


def test_a_side_of_a_pair_may_have_one_token_and_no_more_than_there_is_room_for():
    tokenize = TokenizePair(
        Tokenize("bytes", ["text"], None, 4, "truncate", False), Tokenize("bytes", ["summary"], None, 4)
    )
    pair = tokenize({"text": "x", "summary": ""})
    assert pair["input_ids"].tolist() == [*b"x"] and pair["target_ids"].tolist() == [END]
    assert tokenize({"text": "abcdef", "summary": "abc"})["input_ids"].tolist() == [*b"abcd"]
    with pytest.raises(DataError, match="5 tokens are more than max_length=4"):
        tokenize({"text": "a", "summary": "abcd"})
    with pytest.raises(DataError, match="no text in text. Remove the empty row"):
        tokenize({"text": "", "summary": "a"})


def test_a_batch_without_a_target_has_no_loss_and_no_gradient():
    task = SequenceToSequenceTask(make_t5(), **OWN)
    loss = task.forward_step(PairCollate()([*make_pairs()]) | {"target_ids": torch.full((2, 3), -100)})
    loss.backward()
    assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in task.parameters())


def test_the_loss_is_that_of_each_pair_alone():
    task = SequenceToSequenceTask(make_t5(), **OWN).eval()
    pairs = make_pairs()
    losses = []
    for pair in pairs:
        decoded = torch.cat([torch.tensor([END]), pair["target_ids"][:-1]])
        logits = task.model(pair["input_ids"][None], decoded[None])[1]
        losses.append(F.cross_entropy(logits[0], pair["target_ids"], reduction="sum"))
    batch = PairCollate()([*pairs, None])
    torch.testing.assert_close(task.forward_step(batch), sum(losses) / 7)
    assert task.count_targets(batch) == 7


def test_answers_are_scored():
    assert rouge_l([1, 2, 3], [1, 2, 3]) == 1 and rouge_l([], []) == 1 and rouge_l([1], []) == 0
    assert rouge_l([1, 9, 3, 4], [1, 3]) == pytest.approx(2 * 2 / 6)
    assert rouge_l([3, 1], [1, 3]) == pytest.approx(0.5)


def test_a_model_learns_to_write_and_says_how_well(tmp_path: Path):
    torch.manual_seed(0)
    optim = {"learning_rate": 1e-2, "warmup_steps": 10, "schedule": "constant"}
    task = SequenceToSequenceTask(make_t5, optim=optim, **OWN)
    trainer = make_trainer(150)
    trainer.fit(task, datamodule=make_data(tmp_path))
    values = trainer.validate(task, datamodule=make_data(tmp_path), verbose=False)[0]
    assert values["val_loss"] < 0.5 and values["val_exact_match"] > 0.8 and values["val_rouge_l"] > 0.8
    batch = PairCollate()(make_pairs())
    rows = [[token for token in row if token >= 0] for row in task.predict_step(batch, 0)["token_ids"].tolist()]
    assert rows == task.write(batch) and all(END not in row for row in rows)


def test_a_model_without_an_encoder_is_refused():
    with pytest.raises(ConfigError, match="the model is a GPT2Model. Build a T5Model or another"):
        SequenceToSequenceTask(make_model()).configure_model()


def test_docstrings_of_a_module_are_rows():
    rows = open_records("docstrings://shutil.py")
    assert len(rows) > 5
    for index in range(len(rows)):
        row = rows[index]
        assert set(row) == {"prompt", "answer", "text", "summary"} and all(row.values())
        assert row["prompt"].startswith("What does shutil.") and row["answer"] == row["summary"] + "\n"
        assert len(ByteTokenizer().encode(row["summary"])) < 200
    with pytest.raises(DataError, match="docstrings://nothing.py: no docstrings under"):
        open_records("docstrings://nothing.py")
