"""Rows that make every token a target once, and splits that share no token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning.data.packing import PackedTokens
from sat_lightning.data.preparation import prepare_store
from sat_lightning.data.sources import open_source
from sat_lightning.data.split import split_spans
from sat_lightning.data.store import TokenStore
from sat_lightning.data.tokenizer import ByteTokenizer
from sat_lightning.errors import DataError


def store_of(folder: Path, tokens: np.ndarray) -> TokenStore:
    """A store whose tokens are their own positions, so that a batch shows where it was taken."""
    np.save(folder / "tokens.npy", tokens.astype(np.uint32))
    return prepare_store(open_source(str(folder / "tokens.npy")), ByteTokenizer(), folder / "cache")


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return store_of(tmp_path, np.arange(100))


def text_store(folder: Path, documents: list[str]) -> TokenStore:
    folder.mkdir(exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(document)
    return prepare_store(open_source(str(folder)), ByteTokenizer(), folder.with_name("cache"))


def test_targets_are_the_tokens_that_follow(store: TokenStore) -> None:
    rows = PackedTokens(store, 8)
    assert rows[2]["input_ids"].tolist() == list(range(16, 24))
    assert rows[2]["target_ids"].tolist() == list(range(17, 25))
    assert rows[2]["input_ids"].dtype == rows[2]["target_ids"].dtype == torch.int64


@pytest.mark.parametrize("spans", [[(0, 100)], [(3, 50)], [(0, 10), (12, 13), (40, 77), (90, 100)]])
@pytest.mark.parametrize("sequence_length", [1, 7, 8, 33])
def test_every_token_is_a_target_once(store: TokenStore, spans: list[tuple[int, int]], sequence_length: int) -> None:
    stream = [position for start, stop in spans for position in range(start, stop)]
    whole = PackedTokens(store, sequence_length, spans, keep_incomplete=True)
    batch = whole.batch(range(len(whole)))
    targets, inputs = batch["target_ids"].flatten(), batch["input_ids"].flatten()
    assert targets[targets != -100].tolist() == stream[1:]
    assert (targets[len(stream) - 1 :] == -100).all() and len(targets) - len(stream) + 1 < sequence_length
    assert inputs[: len(stream)].tolist() == stream[: len(inputs)] and (inputs[len(stream) :] == 0).all()
    assert whole.num_targets == len(stream) - 1

    full = PackedTokens(store, sequence_length, spans)
    assert len(full) == (len(stream) - 1) // sequence_length
    assert full.num_targets == len(full) * sequence_length
    for name, values in full.batch(range(len(full))).items():
        assert torch.equal(values, batch[name][: len(full)])


def test_padding_row_counts_nowhere(store: TokenStore) -> None:
    rows = PackedTokens(store, 8)
    batch = rows.batch([3, -1])
    assert (batch["target_ids"][1] == -100).all() and (batch["input_ids"][1] == 0).all()
    assert torch.equal(batch["target_ids"][0], rows[3]["target_ids"])
    with pytest.raises(IndexError, match="row 12 of 12 rows"):
        rows.batch([12])


def test_loader_fetches_whole_batches(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = PackedTokens(store, 8), []
    batch = rows.batch
    monkeypatch.setattr(rows, "batch", lambda indices: (calls.append(list(indices)), batch(indices))[1])
    first, *_ = DataLoader(rows, batch_size=4)
    assert calls[0] == [0, 1, 2, 3]
    assert torch.equal(first["target_ids"], batch([0, 1, 2, 3])["target_ids"])


def test_rows_pickle_without_the_tokens(tmp_path: Path) -> None:
    rows = PackedTokens(store_of(tmp_path, np.arange(10**5)), 8)
    loader = DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["input_ids"].tolist() == rows.batch([0, 1])["input_ids"].tolist()


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.0), (0.1, 0.1), (0.0, 0.2), (0.4, 0.05), (0.0, 0.0)])
@pytest.mark.parametrize("num_tokens", [50, 3000, 10**6])
def test_splits_cover_everything_and_share_nothing(
    tmp_path: Path, validation: float, test: float, num_tokens: int
) -> None:
    store = store_of(tmp_path, np.zeros(num_tokens))
    for seed in range(5):
        spans = split_spans(store, validation, test, seed)
        covered = sorted(span for ranges in spans.values() for span in ranges)
        assert covered[0][0] == 0 and covered[-1][1] == num_tokens
        assert all(stop == start for (_, stop), (start, _) in zip(covered, covered[1:], strict=False))
        for name, fraction in (("validation", validation), ("test", test)):
            held_out = sum(stop - start for start, stop in spans[name])
            assert held_out == pytest.approx(fraction * num_tokens, abs=32)
            assert (fraction > 0) == bool(spans[name])


def test_held_out_blocks_are_spread_and_chosen_by_the_seed(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.zeros(10**7))
    blocks = split_spans(store, 0.05, seed=1)["validation"]
    assert len(blocks) == 16
    assert all(number * 625000 <= start < (number + 1) * 625000 for number, (start, _) in enumerate(blocks))
    assert split_spans(store, 0.05, seed=1)["validation"] == blocks != split_spans(store, 0.05, seed=2)["validation"]


def test_edges_move_to_document_starts(tmp_path: Path) -> None:
    store = text_store(tmp_path / "documents", ["x" * 499] * 1000)  # a document every 500 tokens
    for seed in range(5):
        spans = split_spans(store, 0.1, 0.1, seed)
        covered = sorted(span for ranges in spans.values() for span in ranges)
        assert all(start % 500 == 0 for start, _ in covered)
        assert all(stop == start for (_, stop), (start, _) in zip(covered, covered[1:], strict=False))
        assert sum(stop - start for start, stop in spans["validation"]) == pytest.approx(50000, rel=0.2)


def test_impossible_splits_are_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match=r"validation=0\.6 and test=0\.4 must each be at least 0 and together below 1"):
        split_spans(store, 0.6, 0.4)
    with pytest.raises(DataError, match=r"validation=5 and"):
        split_spans(store, 5)
    message = (
        r"1 of the 100 tokens of .* left for validation with validation=0\.01.*another fraction, or a path for val"
    )
    with pytest.raises(DataError, match=message):
        split_spans(store, 0.01)
    with pytest.raises(DataError, match=r"of the 100 tokens of .* left for train with .*separate files"):
        split_spans(store, 0.99)
