"""Cached logits are the uncached ones, for both caches, whatever the family and the mixins."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sat_lightning import BaseMixin, non_conflict
from sat_lightning.errors import InputError
from sat_lightning.mixins import (
    CachedAutoregressiveMixin,
    KeyValueCache,
    LocalAttentionMixin,
    LoraMixin,
    PrefixTuningMixin,
    RelativeBiasMixin,
    StaticCacheMixin,
)
from sat_lightning.nn.blank_filling import blank_filling
from tests.families import FAMILIES, Family, ids

ORDERS = {
    f"base-{order}": Family("BaseModel", {"layernorm_order": order, "num_multi_query_heads": heads})
    for order, heads in {"pre": 0, "post": 2, "sandwich": 1}.items()
}
CAUSAL = [
    "gpt2", "gptneo", "llama-old", "llama", "llama3", "mistral", "qwen2", "qwen3", "mixtral", "chatglm2", "chatglm3",
    "chatglm4", "glm130b", "glm130b-2d", "glm", "glm4v",
]  # fmt: skip
PAIRS = ["encoder-decoder", "t5", "t5-gated"]
CHUNKS = [4, 1, 1, 3]  # a prompt, single tokens, several at once


class Prefix(BaseMixin):
    """Keys and values behind the sequence, seen by every query."""

    def __init__(self, config, length=3):
        super().__init__()
        shape = (config.num_layers, 2, config.num_key_value_heads, length, config.head_size)
        self.prefix, self.length = nn.Parameter(torch.randn(shape)), length

    @non_conflict
    def attention_fn(self, query, key, value, mask, dropout_fn, old_impl=None, cross_attention=False, **kw):
        if not cross_attention:
            more = self.prefix[kw["layer_id"]][:, None].expand(-1, len(key), -1, -1, -1).to(key.dtype)
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), more, strict=True))
            if mask.numel() > 1:
                mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], self.length)], dim=-1)
            kw["appended_keys"] = kw.get("appended_keys", 0) + self.length
        return old_impl(query, key, value, mask, dropout_fn, cross_attention=cross_attention, **kw)


def whole(model, *args, **kw):
    with torch.no_grad():
        return model(*args, **kw)[0]


def stepwise(model, input_ids, chunks=CHUNKS, positions=None, mask="causal", **kw):
    """Logits of a text that is fed piece by piece, its mems stacked by hand as SAT's sampler does."""
    logits, mems, start = [], None, 0
    for chunk in chunks:
        stop = start + chunk
        scores, *layers = feed(model, input_ids, start, stop, positions, mask, mems=mems, **kw)
        logits.append(scores)
        new = torch.stack([layer["mem_kv"] for layer in layers])
        mems = new if mems is None else torch.cat([mems, new], dim=2)
        if isinstance(kw.get("encoder_outputs"), torch.Tensor):
            kw["encoder_outputs"] = [layer["mem_cross"] for layer in layers]
        start = stop
    return torch.cat(logits, dim=1), mems


def in_place(model, input_ids, chunks=CHUNKS, positions=None, mask="causal", padding=None, dtype=None, **kw):
    """The same with a cache of a fixed size, in the place of mems."""
    logits, start = [], 0
    cache = KeyValueCache(input_ids.shape[1] + 2, padding=padding, dtype=dtype)
    for chunk in chunks:
        logits.append(feed(model, input_ids, start, start + chunk, positions, mask, cache=cache, **kw)[0])
        cache.advance(chunk)
        if "encoder_outputs" in kw:
            kw["encoder_outputs"] = cache.cross
        start += chunk
    return torch.cat(logits, dim=1), cache


def feed(model, input_ids, start, stop, positions, mask, **kw):
    if positions is not None:
        kw["position_ids"] = positions[..., start:stop]
    part = mask[..., start:stop, :stop] if isinstance(mask, torch.Tensor) else mask
    with torch.no_grad():
        return model(input_ids[:, start:stop], attention_mask=part, **kw)


STEPWISE = {"mems": stepwise, "in place": in_place}


def cached(model, kind="mems", place="last"):
    """Add the cache, as the first of all mixins or as the last."""
    model.add_mixin("cache", CachedAutoregressiveMixin() if kind == "mems" else StaticCacheMixin())
    if place == "first":
        for name in [name for name in model.mixins if name != "cache"]:
            mixin = model.get_mixin(name)
            model.del_mixin(name)
            model.add_mixin(name, mixin)
    return model


@pytest.fixture(params=STEPWISE)
def kind(request):
    return request.param


def tune(model, tuning):
    """Add what fine-tuning adds."""
    torch.manual_seed(1)
    if tuning == "prefix":
        model.add_mixin("prefix", PrefixTuningMixin(model.config, prefix_len=3))
        for parameter in model.get_mixin("prefix").parameters():
            nn.init.normal_(parameter)
    if tuning == "stack":
        model.add_mixin("lora", LoraMixin(model.config, rank=2))
        for parameter in model.get_mixin("lora").parameters():
            nn.init.normal_(parameter, std=0.1)
        model.add_mixin("prefix", Prefix(model.config))
        model.add_mixin("second", PrefixTuningMixin(model.config, prefix_len=2))
    return model


@pytest.mark.parametrize("name", [*CAUSAL, *ORDERS])
@pytest.mark.parametrize("tuning", ["none", "stack"])
def test_cached_equals_uncached(name, kind, tuning):
    model, input_ids = tune((FAMILIES | ORDERS)[name].build().eval(), tuning), ids()
    expected = whole(model, input_ids, attention_mask="causal")
    logits, memory = STEPWISE[kind](cached(model, kind), input_ids)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert_close(whole(model, input_ids, attention_mask="causal"), expected)  # it is the model itself
    if kind == "mems":
        config = model.config
        assert memory.shape == (config.num_layers, 2, 9, 2 * config.num_key_value_heads * config.head_size)


@pytest.mark.parametrize("name", ["gpt2", "gptneo", "mistral", "mixtral", "chatglm2", "glm130b", "base-post"])
@pytest.mark.parametrize("tuning", ["prefix", "stack"])
def test_a_cache_within_the_other_mixins(name, kind, tuning):
    """It keeps what tokens brought, never a prefix; windows around it count the keys that it will put in front."""
    model, input_ids = tune((FAMILIES | ORDERS)[name].build().eval(), tuning), ids()
    expected = whole(model, input_ids, attention_mask="causal")
    cached(model, kind, "first")
    assert not model.hook_origins["attention_fn"].startswith("cache")
    for mask in ("causal", torch.ones(9, 9).tril()):
        mask = 1 - mask if name == "glm130b" and isinstance(mask, torch.Tensor) else mask
        assert_close(STEPWISE[kind](model, input_ids, mask=mask)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixin", ["window", "bias"])
@pytest.mark.parametrize("chunks", [CHUNKS, [4, 1, 1, 1, 1, 1]])
def test_distances_count_the_past_around_a_cache(mixin, kind, chunks):
    """What measures distances may be added after the cache, though it then sees the new keys only."""
    model = cached(FAMILIES["gpt2"].build().eval(), kind)
    kinds = {
        "window": lambda: LocalAttentionMixin([3, None]),
        "bias": lambda: RelativeBiasMixin(model.config, 8, is_bidirectional=False, max_distance=8),
    }
    model.add_mixin(mixin, kinds[mixin]())
    tune(model, "stack")
    expected = whole(model, ids(), attention_mask="causal")
    assert_close(STEPWISE[kind](model, ids(), chunks)[0], expected, atol=1e-5, rtol=1e-5)


def test_log_attention_weights_count_the_past_around_a_cache():
    model = tune(cached(FAMILIES["gpt2"].build().eval()), "prefix")
    model.get_mixin("prefix").scale = 0.5
    weights, kw = torch.randn(1, 1, 9, 9), {"attention_mask": "causal"}
    expected = whole(model, ids(), log_attention_weights=weights, **kw)
    with torch.no_grad():
        _, *layers = model(ids()[:, :5], log_attention_weights=weights[..., :5, :5], **kw)
        mems = torch.stack([layer["mem_kv"] for layer in layers])
        logits = model(ids()[:, 5:], log_attention_weights=weights[..., 5:, :], mems=mems, **kw)[0]
    assert_close(logits, expected[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptneo", "mistral", "mixtral", "chatglm4", "glm130b", "base-sandwich"])
@pytest.mark.parametrize("tuning", ["none", "prefix"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_ragged_rows(name, kind, tuning, place):
    """Rows padded on the left, each with positions of its own, are as each row alone."""
    model, input_ids = tune((FAMILIES | ORDERS)[name].build().eval(), tuning), ids()
    padding = torch.tensor([0, 3])
    alone = [
        whole(model, row[None, pad:], attention_mask="causal")[0] for row, pad in zip(input_ids, padding, strict=True)
    ]
    places = torch.arange(9)
    positions = (places - padding[:, None]).clamp(min=0)
    mask = torch.ones(9, 9).tril() * (places >= padding[:, None])[:, None, None]
    mask = 1 - mask if name == "glm130b" else mask
    cached(model, kind, place)
    results = [STEPWISE[kind](model, input_ids, positions=positions, mask=mask)[0]]
    if kind == "in place":  # the cache itself knows of padding
        results.append(in_place(model, input_ids, positions=positions, padding=padding)[0])
    for logits in results:
        for row, pad, expected in zip(logits, padding, alone, strict=True):
            assert_close(row[pad:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["glm-blank", "chatglm"])
@pytest.mark.parametrize("tuning", ["none", "prefix"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_two_rows_of_positions(name, kind, tuning, place):
    family = FAMILIES[name]
    model, input_ids = tune(family.build().eval(), tuning), family.inputs(0)["input_ids"]
    expected = whole(model, input_ids)
    options = {"start_id": 2, "mask_ids": (1,), "pad_id": 3 if name == "chatglm" else None}
    positions, mask = blank_filling(input_ids, **options)
    context = 7  # of the longer row; it sees itself, so it is fed at once
    cached(model, kind, place)
    logits = STEPWISE[kind](model, input_ids, [context, 1, 1], positions, mask.float())[0]
    is_token = torch.ones_like(input_ids) if name == "glm-blank" else (input_ids != 3).cumsum(-1) > 0
    assert_close(logits[is_token.bool()], expected[is_token.bool()], atol=1e-5, rtol=1e-5)
    memory = STEPWISE[kind](model, input_ids, [context], positions, mask.float())[1]
    with pytest.raises(InputError, match="The cache holds 7 tokens, so positions and mask cannot be read"):
        model(input_ids[:, context:], **{"mems" if kind == "mems" else "cache": memory})


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("tuning", ["none", "stack"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_decoder_keeps_what_it_reads(name, kind, tuning, place):
    model = FAMILIES[name].build().eval()
    tune(model.decoder, tuning)
    enc_mask = torch.ones(2, 9)
    enc_mask[1, 6:] = 0
    source, target = ids(), ids(length=7, seed=1)
    with torch.no_grad():
        expected = model(source, dec_input_ids=target, enc_attention_mask=enc_mask)[1]
        encoder_outputs = model.encode(source, attention_mask=enc_mask)
    decoder = cached(model.decoder, kind, place)
    reads = {"encoder_outputs": encoder_outputs, "cross_attention_mask": enc_mask[:, None, None]}
    logits = STEPWISE[kind](decoder, target, [3, 1, 2, 1], **reads)[0]
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_one_text_read_and_several_written():
    model = FAMILIES["t5"].build().eval()
    decoder, source, target = cached(model.decoder), ids(1), ids(3, 5, seed=1)
    with torch.no_grad():
        encoder_outputs = model.encode(source)
        _, *layers = decoder(target[:1, :2], attention_mask="causal", encoder_outputs=encoder_outputs)
        crosses = [layer["mem_cross"] for layer in layers]
        expected = model(source.expand(3, -1), dec_input_ids=target)[1]
    key, value = crosses[0]
    assert key.shape == value.shape == (1, 4, 9, 8)
    assert_close(stepwise(decoder, target, [3, 2], encoder_outputs=crosses)[0], expected, atol=1e-5, rtol=1e-5)


def test_texts_read_that_are_neither_one_nor_as_many():
    model = FAMILIES["t5"].build().eval()
    with pytest.raises(InputError, match="encoder_outputs have 3 rows, the tokens 2: give 1 or as many"):
        model.decoder(ids(2), encoder_outputs=torch.zeros(3, 4, 32))


def test_keywords_of_these_names_may_be_somebody_elses():
    """A mixin that remembers something of its own takes it as `mems`, as in SAT."""
    model = FAMILIES["mistral"].build().eval()
    expected = whole(model, ids())
    assert torch.equal(whole(model, ids(), mems=["mine"], cache="mine too"), expected)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "chatglm4"])
def test_bfloat16_within_its_rounding(name):
    """Eight bits of mantissa: logits of size 10 are told apart to some 0.05; a wrong cache moves them by whole ones."""
    model = FAMILIES[name].build().eval().bfloat16()
    expected = whole(model, ids(), attention_mask="causal")
    logits, mems = stepwise(cached(model), ids())
    assert mems.dtype == torch.bfloat16
    assert_close(logits, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)


def test_mems_of_one_row_serve_all():
    model = cached(FAMILIES["llama"].build().eval())
    prompt, rest = ids(1, 4), ids(3, 2, seed=1)
    whole_text = torch.cat([prompt.expand(3, -1), rest], dim=1)
    mems = stepwise(model, prompt, [4])[1]
    with torch.no_grad():
        logits = model(rest, attention_mask="causal", mems=mems)[0]
    assert_close(logits, whole(model, whole_text, attention_mask="causal")[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "chatglm2", "t5"])
def test_training_is_untouched(name):
    """Added, and removed again: loss and gradients to the last bit, and nothing is kept alive."""
    family, results = FAMILIES[name], []
    for state in ("without", "with", "removed"):
        model = family.build(hidden_dropout=0.1, attention_dropout=0.1).train()
        part = model.decoder if name == "t5" else model
        if state != "without":
            part.add_mixin("auto-regressive", CachedAutoregressiveMixin())
        if state == "removed":
            part.del_mixin("auto-regressive")
        torch.manual_seed(3)
        returned = model(**family.inputs(0))
        family.result(returned).logsumexp(-1).mean().backward()
        assert all(layer.keys().isdisjoint({"mem_kv", "mem_cross"}) for layer in returned if isinstance(layer, dict))
        keys = list(model.state_dict())
        results.append((family.result(returned), [p.grad for p in model.parameters()], keys))
    for logits, gradients, keys in results[1:]:
        assert torch.equal(logits, results[0][0]) and keys == results[0][2]
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True) if a is not None)


def test_a_mixin_made_after_eval_gives_back():
    """A new module is in training mode; what counts is the mode of the backbone it was added to."""
    model = FAMILIES["gpt2"].build().eval()
    model.add_mixin("auto-regressive", CachedAutoregressiveMixin())
    assert model.get_mixin("auto-regressive").training
    assert model(ids())[1]["mem_kv"].shape == (2, 9, 64)


def test_layout_of_mem_kv():
    """Key heads, then value heads; keys after their rotation, so that a later call need not know their places."""
    model = FAMILIES["llama"].build().eval()
    seen = {}

    class Spy(BaseMixin):
        @non_conflict
        def attention_fn(self, query, key, value, *args, old_impl, **kw):
            seen[kw["layer_id"]] = (key, value)
            return old_impl(query, key, value, *args, **kw)

    model.add_mixin("spy", Spy())
    layers = cached(model)(ids())[1:]
    for layer_id, layer in enumerate(layers):
        parts = [x.transpose(1, 2).flatten(2) for x in seen[layer_id]]
        assert_close(layer["mem_kv"], torch.cat(parts, dim=-1))
        assert not layer["mem_kv"].requires_grad


def test_positions_count_on():
    model = cached(FAMILIES["gpt2"].build().eval())
    mems = stepwise(model, ids(), [9])[1]
    with pytest.raises(InputError, match="The sequence has 25 tokens, max_sequence_length is 24"):
        model(ids(length=16), mems=mems)


@pytest.mark.parametrize(
    "shape", [(1, 2, 4, 64), (2, 3, 4, 64), (2, 2, 4, 32), (2, 4, 64)], ids=["layers", "rows", "size", "axes"]
)
def test_mems_that_do_not_fit(shape):
    model = cached(FAMILIES["gpt2"].build().eval())
    message = rf"mems has shape {list(shape)}; for 2 rows it must be [2 layers, 2, length, 64], the last being 2 * 4"
    with pytest.raises(InputError) as error:
        model(ids(), torch.arange(9), None, mems=torch.zeros(shape))
    assert message in str(error.value)


def test_compiles_whole():
    model = cached(FAMILIES["mistral"].build(num_layers=1).eval())
    expected, mems = stepwise(model, ids(), [4])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(stepwise(compiled, ids(), [4])[0], expected)
    with torch.no_grad():
        assert_close(compiled(ids(length=1), mems=mems)[0], model(ids(length=1), mems=mems)[0])
