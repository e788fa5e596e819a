"""Perplexity as a metric: the perplexity of all targets at once, however they were dealt out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics import MetricCollection

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import PerplexityMetric

STATES = ("loss_sum", "num_tokens", "num_bytes")


def batches(*sizes: int, ignored: int = -100):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        logits = torch.randn(size, 6, 11, generator=generator) * 3
        targets = torch.randint(11, (size, 6), generator=generator)
        targets[0, : size % 6] = ignored
        yield logits, targets


def expected(found, ignored: int = -100) -> float:
    logits, targets = (torch.cat([pair[i].flatten(0, 1) for pair in found]) for i in (0, 1))
    return F.cross_entropy(logits.double(), targets, ignore_index=ignored).item()


@pytest.mark.parametrize("ignored", [-100, 0])
def test_batches_of_uneven_size_count_by_their_targets(ignored: int) -> None:
    found = list(batches(3, 1, 5, ignored=ignored))
    metrics = {unit: PerplexityMetric(unit, ignore_index=ignored) for unit in ("perplexity", "nats", "bits")}
    collection = MetricCollection(metrics)
    for logits, targets in found:
        collection.update(logits, targets)
    nats = expected(found, ignored)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == pytest.approx({"perplexity": math.exp(nats), "nats": nats, "bits": nats / math.log(2)}, rel=1e-7)


def test_sums_that_are_known_are_as_good_as_logits_and_bytes_give_bits_per_byte() -> None:
    found = list(batches(2, 4))
    metric, of_bytes = PerplexityMetric(), PerplexityMetric("bits_per_byte")
    for logits, targets in found:
        kept = targets[targets != -100]
        total = F.cross_entropy(logits[targets != -100], kept, reduction="sum")
        metric.update(loss_sum=total, num_tokens=len(kept))
        of_bytes.update(logits, targets, num_bytes=torch.tensor(3 * len(kept)))
    assert metric.compute().item() == pytest.approx(math.exp(expected(found)), rel=1e-6)
    assert of_bytes.compute().item() == pytest.approx(expected(found) / math.log(2) / 3, rel=1e-6)


def test_ranks_with_uneven_batches_or_none_agree_on_the_whole() -> None:
    found = list(batches(3, 1, 5))
    shares = [found[:2], found[2:], []]
    ranks = [PerplexityMetric() for _ in shares]
    for rank, share in zip(ranks, shares, strict=True):
        for batch in share:
            rank.update(*batch)
    states = [{name: getattr(rank, name).clone() for name in STATES} for rank in ranks]
    asked = []

    def gather(tensor: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        name = STATES[len(asked) % len(STATES)]
        asked.append(name)
        return [state[name] for state in states]

    whole = PerplexityMetric(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    whole.update(*found[0])
    assert whole.compute().item() == pytest.approx(math.exp(expected(found)), rel=1e-7)
    assert len(asked) == len(STATES)
    merged = PerplexityMetric()
    for rank in ranks[:2]:
        merged.merge_state(rank)
    assert merged.compute().item() == pytest.approx(math.exp(expected(found)), rel=1e-7)


def test_forward_gives_the_batch_and_keeps_the_sum_and_reset_forgets() -> None:
    found = list(batches(3, 2))
    metric = PerplexityMetric("nats")
    for batch in found:
        assert metric(*batch).item() == pytest.approx(expected([batch]), rel=1e-6)
    assert metric.compute().item() == pytest.approx(expected(found), rel=1e-7)
    metric.reset()
    metric.update(found[0][0].bfloat16(), found[0][1])
    assert metric.compute().item() == pytest.approx(expected([(found[0][0].bfloat16(), found[0][1])]), rel=1e-5)


def test_update_waits_for_no_device() -> None:
    metric = PerplexityMetric("bits_per_byte").to("meta")
    logits, targets = next(batches(2))
    metric.update(logits.to("meta"), targets.to("meta"), num_bytes=7)  # a meta tensor cannot be read
    assert metric.loss_sum.is_meta and metric.num_tokens.is_meta


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "either logits and target_ids, or loss_sum and num_tokens"),
        ({"logits": torch.zeros(1, 3)}, "either logits and target_ids"),
        ({"loss_sum": 1.0}, "either logits and target_ids"),
        ({"logits": torch.zeros(2, 3), "target_ids": torch.zeros(3, dtype=torch.long)}, "one target for each row"),
    ],
)
def test_update_refuses(words: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PerplexityMetric().update(**words)


def test_units_refuse() -> None:
    with pytest.raises(ConfigError, match="unit is 'bpb'"):
        PerplexityMetric("bpb")
    with pytest.raises(InputError, match="give num_bytes"):
        PerplexityMetric("bits_per_byte").update(loss_sum=1.0, num_tokens=1)
