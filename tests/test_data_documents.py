"""Several documents in a row: each is read as if it were alone, none is lost, and a row depends on its window alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sat_lightning import TransformerConfig
from sat_lightning.data.documents import (
    DocumentCollate,
    PackedDocuments,
    document_block_mask,
    document_mask,
    number_documents,
    pack_by_length,
    restart_positions,
    separate_documents,
)
from sat_lightning.data.samples import BadSampleError
from sat_lightning.errors import DataError
from sat_lightning.models import GPT2Model

END = 0


def test_documents_end_positions_restart_and_attention_stays_inside() -> None:
    input_ids = torch.tensor([[5, 6, END, 7, END, 8], [END, END, 5, 5, 5, 5]])
    document_ids = number_documents(input_ids, END)
    assert document_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
    assert restart_positions(document_ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    mask = document_mask(document_ids)
    assert mask.shape == (2, 1, 6, 6) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_packed_rows_get_boundaries() -> None:
    batch = {"input_ids": torch.tensor([[5, END, 6, 7]]), "target_ids": torch.tensor([[END, 6, 7, END]])}
    separated = separate_documents(batch, END)
    assert separated["target_ids"].tolist() == [[END, -100, 7, END]]
    assert separated["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert separated["attention_mask"].shape == (1, 1, 4, 4)
    assert "attention_mask" not in separate_documents(batch, END, "none") and batch["target_ids"][0, 1] == 6


def test_block_mask_is_the_same_mask() -> None:
    from torch.nn.attention.flex_attention import create_mask

    document_ids = torch.arange(512).div(100, rounding_mode="floor")[None].repeat(2, 1)
    document_ids[1] = 0
    block_mask = document_block_mask(document_ids)
    made = create_mask(block_mask.mask_mod, 2, 1, 512, 512, device="cpu")
    assert torch.equal(made, document_mask(document_ids))
    assert block_mask.shape == (2, 1, 512, 512) and block_mask.sparsity() > 30


class Samples:
    """Documents of given lengths, whose tokens are all different."""

    name = "samples"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.firsts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict | None:
        if self.lengths[index] == 0:
            return None
        ids = np.arange(self.firsts[index], self.firsts[index + 1])
        return {"input_ids": ids, "target_ids": ids + 1}


def random_lengths(num: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, num).tolist()


def test_packing_keeps_every_document_whole_and_leaves_little_empty() -> None:
    lengths = random_lengths(3000, 128)
    rows = pack_by_length(lengths, 256)
    assert sorted(number for row in rows for number in row) == list(range(3000))
    assert max(sum(lengths[number] for number in row) for row in rows) <= 256
    assert sum(lengths) / (len(rows) * 256) > 0.98
    assert pack_by_length(lengths, 256) == rows
    # A window depends on itself alone, so packing can begin at any of them.
    first = pack_by_length(lengths[:1024], 256)
    assert rows[: len(first)] == first
    assert [[n + 1024 for n in row] for row in pack_by_length(lengths[1024:], 256)] == rows[len(first) :]
    with pytest.raises(
        DataError, match=r"document 1 has 9 tokens, more than row_length=8\. Split it, or raise row_length"
    ):
        pack_by_length([3, 9], 8)


@pytest.mark.parametrize("split", [False, True])
def test_rows_hold_every_token_once(split: bool) -> None:
    samples = Samples([*random_lengths(200, 150 if split else 64), 0, 64])
    rows = PackedDocuments(samples, 64, split=split)
    seen = []
    for index in range(len(rows)):
        row = rows[index]
        is_token = row["document_ids"] >= 0
        assert torch.equal(row["target_ids"][is_token], row["input_ids"][is_token] + 1)
        assert (row["target_ids"][~is_token] == -100).all()
        seen += row["input_ids"][is_token].tolist()
    assert sorted(seen) == list(range(sum(samples.lengths)))
    assert rows.fill == pytest.approx(sum(samples.lengths) / (64 * len(rows))) and rows.fill > 0.9
    assert rows.num_tokens(0) == 64
    assert (rows[-1]["target_ids"] == -100).all()
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_lengths_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples([3, 4, 5])
    monkeypatch.setattr(Samples, "__getitem__", lambda self, index: pytest.fail("read a sample"))
    assert len(PackedDocuments(samples, 8, lengths=samples.lengths)) == 2


def test_document_longer_than_a_row() -> None:
    with pytest.raises(
        BadSampleError, match=r"samples, row 1: 9 tokens do not fit .* sequence_length=8\. Set split: tr"
    ):
        PackedDocuments(Samples([3, 9]), 8)


def test_a_model_reads_each_document_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    samples = Samples([5, 3, 7, 2, 6])
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    model = GPT2Model(TransformerConfig(**sizes, max_sequence_length=16)).eval()
    (batch,) = DataLoader(PackedDocuments(samples, 16), batch_size=2, collate_fn=DocumentCollate())
    assert set(batch) == {"input_ids", "target_ids", "position_ids", "attention_mask"}
    logits = model(batch["input_ids"], batch["position_ids"], batch["attention_mask"])[0]
    crossing = model(batch["input_ids"])[0]
    for index in range(5):
        ids = torch.from_numpy(samples[index]["input_ids"])
        is_here = torch.isin(batch["input_ids"], ids) & (batch["target_ids"] != -100)
        alone = model(ids[None])[0][0]
        assert torch.allclose(logits[is_here], alone, atol=1e-5)
    assert not torch.allclose(logits, crossing, atol=1e-2)


def test_collate_with_a_block_mask_or_none() -> None:
    rows = [PackedDocuments(Samples([5, 3]), 8)[0]]
    assert DocumentCollate("flex")(rows)["attention_mask"].shape == (1, 1, 8, 8)
    assert set(DocumentCollate("none")(rows)) == {"input_ids", "target_ids", "position_ids"}
    with pytest.raises(DataError, match="mask is 'dense'. Set it to 'tensor', 'flex' or 'none'"):
        DocumentCollate("dense")
