"""Layers with a window forget what is out of sight: the same numbers in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sat_lightning.errors import InputError
from sat_lightning.generation import BaseStrategy, BeamSearchStrategy, generate, generate_speculatively
from sat_lightning.generation import runner as runner_module
from sat_lightning.generation.runner import windows_of
from sat_lightning.mixins import KeyValueCache, LocalAttentionMixin, PrefixTuningMixin, StaticCacheMixin, static_cache
from tests.families import FAMILIES, ids
from tests.test_generate import Watched, uncached
from tests.test_speculative import near, texts

LENGTHS = (17, 3, 10, 3)


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "_SLACK", 3)


def build(name: str, **changes: object):
    return FAMILIES[name].build(**({"max_sequence_length": 96} | changes)).eval()


def rows_of(*lengths: int) -> list[list[int]]:
    return [ids(1, length, seed=length + i)[0].tolist() for i, length in enumerate(lengths)]


def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "windows_of", lambda model: {})


def seen(model, rows, **options: object) -> torch.Tensor:
    strategy = Watched()
    generate(model, rows, strategy=strategy, **{"max_new_tokens": 24, **options})
    return torch.stack(strategy.seen)


@pytest.mark.parametrize("name", ["mistral", "gptneo"])
def test_what_is_written_is_what_the_uncached_model_writes(name: str) -> None:
    model, rows, strategy = build(name), rows_of(*LENGTHS), Watched()
    results = generate(model, rows, max_new_tokens=30, strategy=strategy)
    got = torch.stack(strategy.seen, dim=1)
    for index, row in enumerate(rows):
        tokens, logits = uncached(model, row, 30)
        assert_close(got[index], logits, atol=1e-5, rtol=1e-4)
        assert results[index].tokens == tokens


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 9), (1,)], ids=["ragged", "even", "alone"])
@pytest.mark.parametrize("name", ["mistral", "gptneo", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk": 1}, {"prefill_chunk": 2}, {"prefill_chunk": 8}, {"cache_dtype": "int8"},
     {"visibility": "full"}],
    ids=str,
)  # fmt: skip
def test_all_that_is_kept_and_only_what_is_seen_give_the_same(
    name: str, lengths: tuple[int, ...], options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = build(name, **({"sliding_window": 5} if name == "mixtral" else {})), rows_of(*lengths)
    near_ones = seen(model, rows, **options)
    keep_all(monkeypatch)
    assert_close(near_ones, seen(model, rows, **options), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("kind", ["prefix", "window", "both"])
def test_with_hooks_inside_and_around_the_cache(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, with a weight of their own, and windows may be added before the cache or after it."""
    model, rows = build("gpt2" if kind == "window" else "mistral"), rows_of(*LENGTHS)
    if place == "around":
        model.add_mixin("cache", StaticCacheMixin())
    if kind != "prefix":
        model.add_mixin("more", LocalAttentionMixin([3, None]))
    if kind != "window":
        torch.manual_seed(0)
        model.add_mixin("prefix", PrefixTuningMixin(model.config, 2))
        model.get_mixin("prefix").scale = 0.5
    expected = windows_of(model)
    assert expected == {"prefix": {0: 4, 1: 4}, "window": {0: 3}, "both": {0: 3, 1: 4}}[kind]
    for lengths in (rows, rows[:1]):
        near_ones = seen(model, lengths)
        with monkeypatch.context() as patch:
            keep_all(patch)
            assert_close(near_ones, seen(model, lengths), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gptneo"])
def test_beams_and_drafts_go_back_and_forth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = near(build(name), 0.3), rows_of(*LENGTHS)
    beams = {"strategy": BeamSearchStrategy(3, no_repeat_ngram_size=2), "max_new_tokens": 24}
    draft, strategy = near(model, 0.05), BaseStrategy(temperature=0.7, top_k=20)
    drafts = {"max_new_tokens": 30, "seed": 2, "strategy": strategy}

    def both() -> tuple[object, ...]:
        found = generate(model, rows, **beams)
        scores = [round(float(each.score), 3) for each in found]
        return texts(found), scores, texts(generate_speculatively(model, draft, rows, num_drafts=3, **drafts))

    near_ones = both()
    greedy = texts(generate_speculatively(model, draft, rows, num_drafts=2, max_new_tokens=30))
    keep_all(monkeypatch)
    assert both() == near_ones
    assert greedy == texts(generate(model, rows, max_new_tokens=30))


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_memory_is_bounded_by_the_window(dtype: torch.dtype | None) -> None:
    model = build("gptneo", window_size=6, num_layers=4)
    model.add_mixin("cache", StaticCacheMixin())
    cache = KeyValueCache(90, dtype=dtype, windows=windows_of(model))
    text = ids(2, 90)
    with torch.no_grad():
        expected = model(text)[0]
        for start, stop in [(0, 40), (40, 42), (42, 60), *((i, i + 1) for i in range(60, 90))]:
            places = torch.arange(start, stop)[None]
            logits = model(text[:, start:stop], places, "causal", cache=cache)[0]
            cache.advance(stop - start)
            assert_close(logits, expected[:, start:stop], **({} if dtype is None else {"atol": 0.2, "rtol": 0.1}))
    sizes = {i: {buffer.shape[2] for buffer in buffers} for i, buffers in cache.layers.items()}
    assert sizes == {0: {90}, 1: {5 + 3}, 2: {90}, 3: {5 + 3}}
    assert cache.length == 90 and 90 - 8 <= cache.dropped <= 90 - 5


def test_a_mask_of_the_whole_text_is_cut_to_what_is_held() -> None:
    model = build("mistral")
    model.add_mixin("cache", StaticCacheMixin())
    text, hidden = ids(1, 30), torch.ones(1, 1, 30, 30).tril()
    hidden[..., 27] = 0
    cache = KeyValueCache(30, windows=windows_of(model))
    with torch.no_grad():
        expected = model(text, attention_mask=hidden)[0]
        for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
            part = {"attention_mask": hidden[..., start:stop, :stop], "position_ids": torch.arange(start, stop)[None]}
            logits = model(text[:, start:stop], cache=cache, **part)[0]
            cache.advance(stop - start)
            assert_close(logits, expected[:, start:stop], atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"attention_mask has shape \[1, 1, 1, 7\]"):
        model(text[:, :1], torch.tensor([[30]]), torch.ones(1, 1, 1, 7), cache=_with_room(cache))


def _with_room(cache: KeyValueCache) -> KeyValueCache:
    cache.capacity += 1
    return cache


def test_a_cache_goes_back_as_far_as_it_was_told() -> None:
    model = build("mistral")
    model.add_mixin("cache", StaticCacheMixin())
    text = ids(1, 40)
    for num_spare in (0, 4):
        cache = KeyValueCache(80, windows=windows_of(model), num_spare=num_spare)
        with torch.no_grad():
            model(text, cache=cache)
            cache.advance(40)
            cache.crop(40 - num_spare)
            places = torch.arange(40 - num_spare, 41)[None]
            again = torch.cat([text[:, 40 - num_spare :], text[:, :1]], dim=1)
            logits = model(again, places, "causal", cache=cache)[0]
            whole = torch.cat([text, text[:, :1]], dim=1)
            assert_close(logits, model(whole)[0][:, -num_spare - 1 :], atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match=rf"from {40 - num_spare} tokens to {39 - num_spare}: it holds those from"):
            cache.crop(39 - num_spare)


def test_full_layers_and_short_texts_are_held_as_ever() -> None:
    assert windows_of(build("gpt2")) == {}
    assert windows_of(build("gptneo", num_layers=4, window_size=9)) == {1: 9, 3: 9}
    cache = KeyValueCache(10, windows={0: 9})  # room for all is less
    key = torch.randn(1, 2, 10, 4)
    assert cache.write(0, key, key)[0].shape[2] == 10 and cache.layers[0][0].shape[2] == 10


def test_compiled_steps_are_few_graphs_for_all_tokens() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    model, found = build("mistral"), []
    for length, num_tokens in ((9, 30), (9, 60), (2, 30)):
        rows, settings = rows_of(length, length), {"max_new_tokens": num_tokens, "pack_weights": False}
        eager = texts(generate(model, rows, **settings))
        counters.clear()
        assert texts(generate(model, rows, compile="eager", **settings)) == eager
        found.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert found[:2] == [1, 0] and found[2] <= 2  # while nothing is out of sight, and while nothing is forgotten
