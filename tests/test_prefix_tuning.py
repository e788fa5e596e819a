"""Prefix-tuning: the formula by every kind of mask and kernel, and its life on a model."""

import copy

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel, BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.errors import ConfigError, HookConflictError
from sat_lightning.generation import generate
from sat_lightning.hooks import passes_mask
from sat_lightning.mixins import LocalAttentionMixin, PastKeyValuesMixin, PrefixTuningMixin, PTuningV2Mixin
from sat_lightning.mixins.relative_bias import RelativeBiasMixin
from sat_lightning.models import GPT2Model
from tests.families import FAMILIES, ids
from tests.test_generate import Watched, uncached

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=60, max_sequence_length=24)
LENGTH = 3


def build(config=TINY, dtype=torch.float32, prefixes=1, **options):
    torch.manual_seed(0)
    model = BaseModel(config)
    for i in range(prefixes):
        model.add_mixin(f"prefix{i}", PrefixTuningMixin(config, LENGTH, **options))
    with torch.no_grad():
        for part in (model.transformer, model.mixins):
            torch.manual_seed(1)
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


class WrittenOut(BaseMixin):
    """The same, by the definition: every score, every key, a mask of ones."""

    def __init__(self, model):
        super().__init__()
        self.prefixes = [mixin for name, mixin in model.mixins.items() if name.startswith("prefix")]

    def attention_fn(self, query, key, value, mask, dropout_fn, *, layer_id, log_attention_weights=0.0, **kw):
        groups = query.shape[1] // key.shape[1]
        num_keys = key.shape[2]
        mask = mask.expand(*mask.shape[:-2], query.shape[2], num_keys)
        for prefix in self.prefixes:
            keys = [x.expand(len(query), -1, -1, -1) for x in prefix.keys_and_values(layer_id)]
            key, value = torch.cat([key, keys[0]], 2), torch.cat([value, keys[1]], 2)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        mask = torch.nn.functional.pad(mask, (0, key.shape[2] - num_keys), value=1.0)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores * mask - 10000.0 * (1 - mask)
        return scores.softmax(-1) @ value


def written_out(model):
    twin = BaseModel(model.config, transformer=model.transformer)
    twin.add_mixin("written_out", WrittenOut(model))
    return twin.eval()


def masks():
    ragged = torch.ones(2, 1, 1, 9)
    ragged[0, ..., 6:] = 0
    fractional = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    fractional[1, 0, 2] = 0
    causal = torch.ones(9, 9).tril()
    return {
        "full": None, "causal": -1, "padded": ragged.bool(), "ragged_causal": ragged * causal,
        "pairs": causal.bool(), "fractional": fractional,
    }  # fmt: skip


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "flash", "flex"])
@pytest.mark.parametrize("num_key_value_heads", [0, 2])
def test_equals_the_formula(mask, backend, num_key_value_heads):
    model = build(TINY.replace(attention_backend=backend, num_multi_query_heads=num_key_value_heads), prefixes=2)
    ids, mask = torch.randint(0, 60, (2, 9)), masks()[mask]
    with torch.no_grad():
        assert_close(model(ids, attention_mask=mask)[0], written_out(model)(ids, attention_mask=mask)[0])


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("mask", ["full", "causal", "ragged_causal"])
def test_gradients_equal_those_of_the_formula(mask, is_masked, monkeypatch):
    """By either way of a causal mask beside a prefix."""
    monkeypatch.setattr("sat_lightning.nn.attention_fn._is_masked_faster", lambda query: is_masked)
    found = []
    for change in (lambda model: model, written_out):
        model = build()
        change(model).train()(torch.arange(18).view(2, 9), attention_mask=masks()[mask])[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", ["full", "causal", "padded"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_bf16_stays_near_single_precision(mask, length):
    """Also where there are more prefix keys than tokens, and the fast way of causal masks would not pay."""
    ids, mask = torch.randint(0, 60, (2, 9))[:, :length], masks()[mask]
    mask = mask[..., :length] if isinstance(mask, torch.Tensor) else mask
    with torch.no_grad():
        half = build(dtype=torch.bfloat16)(ids, attention_mask=mask)[0].float()
        single = build()(ids, attention_mask=mask)[0]
        assert_close(single, written_out(build())(ids, attention_mask=mask)[0])
    assert (half - single).abs().max() < 0.05 * single.abs().max()


def test_a_causal_mask_stays_known_and_no_tensor_of_pairs_is_made():
    """Also with wrappers that only pass the mask on; one that reads it gets a real one."""
    seen = []

    class Spy(BaseMixin):
        @non_conflict
        def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=None, **kw):
            seen.append((mask.shape, mask is kw["causal_mask"], kw["appended_keys"], k.shape[2]))
            return old_impl(q, k, v, mask, dropout_fn, **kw)

    class BlindSpy(Spy):
        @non_conflict
        @passes_mask
        def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=None, **kw):
            return Spy.attention_fn(self, q, k, v, mask, dropout_fn, old_impl=old_impl, **kw)

    ids, results = torch.randint(0, 60, (2, 9)), []
    for spy in (Spy, BlindSpy):
        model = BaseModel(TINY)
        model.add_mixin("spy", spy())
        model.load_state_dict(build(prefixes=0).state_dict())
        model.add_mixin("prefix", PrefixTuningMixin(TINY, LENGTH))
        model.mixins["prefix"].load_state_dict(build().mixins["prefix0"].state_dict())
        results.append(model.eval()(ids, attention_mask=-1)[0])
    assert seen == [((9, 12), True, 3, 12)] * 2 + [((1, 1), True, 3, 12)] * 2
    assert_close(*results)
    assert_close(results[0], build()(ids, attention_mask=-1)[0])


def test_positions_and_windows_do_not_count_the_prefix():
    """In all orders: a bias by distance, and a window, are about the tokens."""

    def other_mixins():
        torch.manual_seed(1)
        return {
            "bias": RelativeBiasMixin(TINY, 6, is_bidirectional=False),
            "window": LocalAttentionMixin([2, 3]),
        }

    results = []
    for order in (["prefix", "bias", "window"], ["bias", "prefix", "window"], ["bias", "window", "prefix"]):
        model, mixins = BaseModel(TINY), other_mixins() | {"prefix": build().mixins["prefix0"]}
        model.transformer.load_state_dict(build().transformer.state_dict())
        for name in order:
            model.add_mixin(name, mixins[name])
        results.append(model.eval()(torch.arange(18).view(2, 9), attention_mask=-1)[0])
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.mark.parametrize("order", [["cache", "prefix"], ["prefix", "cache"]])
def test_a_cache_does_not_keep_the_prefix(order):
    model, source = BaseModel(TINY), build()
    model.transformer.load_state_dict(source.transformer.state_dict())
    mixins = {"cache": PastKeyValuesMixin(), "prefix": source.mixins["prefix0"]}
    for name in order:
        model.add_mixin(name, mixins[name])
    model.eval()
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        whole = model(ids, attention_mask=-1)[0]
        _, *layers = model(ids[:, :5], attention_mask=-1)
        past = [layer["past_key_values"] for layer in layers]
        assert past[0][0].shape[2] == 5
        rest, *layers = model(ids[:, 5:], torch.arange(5, 9), -1, past_key_values=past)
    assert layers[0]["past_key_values"][0].shape[2] == 9
    assert_close(rest, whole[:, 5:])


def test_a_projection_folds_into_a_plain_prefix():
    model = build(projection_size=7)
    ids = torch.randint(0, 60, (2, 9))
    expected = model(ids)[0]
    plain = model.mixins["prefix0"].folded()
    assert [tuple(p.shape) for p in plain.prefix] == [(2, 4, 3, 8)] * 2
    model.del_mixin("prefix0")
    model.add_mixin("prefix0", plain)
    assert torch.equal(model(ids)[0], expected)
    model.train()(ids)[0].square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.mixins.parameters())


def test_scale_weighs_the_prefix_and_disable_takes_it_out():
    model, ids = build(), torch.randint(0, 60, (2, 9))
    bare = build(prefixes=0)
    prefix = model.get_mixin("prefix0")
    for mask in (None, -1, torch.ones(9, 9).tril()):
        with torch.no_grad():
            full = model(ids, attention_mask=mask)[0]
            prefix.scale = 2.0  # a key that counts twice is a key that is there twice
            doubled = model(ids, attention_mask=mask)[0]
            model.add_mixin("again", copy.deepcopy(prefix))
            model.get_mixin("again").scale = prefix.scale = 1.0
            assert_close(doubled, model(ids, attention_mask=mask)[0])
            model.del_mixin("again")
            prefix.scale = 0.0
            assert torch.equal(model(ids, attention_mask=mask)[0], bare(ids, attention_mask=mask)[0])
            prefix.scale = 1.0
            prefix.disable()
            assert not prefix.enabled
            assert model.hook_origins["attention_fn"] == "default"
            assert torch.equal(model(ids, attention_mask=mask)[0], bare(ids, attention_mask=mask)[0])
            prefix.enable()
            assert torch.equal(model(ids, attention_mask=mask)[0], full)


def test_log_attention_weights_of_the_caller_are_about_the_tokens():
    model, ids = build(), torch.randint(0, 60, (2, 9))
    hidden = torch.zeros(1, 1, 1, 9)
    hidden[..., 4:] = -10000.0
    seen = torch.ones(9, 9)
    seen[:, 4:] = 0
    with torch.no_grad():
        nothing = torch.zeros(1, 1, 1, 1)
        weighed = model(ids, attention_mask=-1, log_attention_weights=nothing)[0]
        assert_close(weighed, model(ids, attention_mask=-1)[0])


def test_enabling_is_refused_where_the_seam_is_taken_and_changes_nothing():
    from sat_lightning.mixins import TuningMixin

    class Head(TuningMixin):
        def final_forward(self, logits, **kw):
            return logits

    model = BaseModel(TINY)
    model.add_mixin("first", Head())
    first = model.get_mixin("first")
    first.disable()
    model.add_mixin("second", Head())
    with pytest.raises(HookConflictError, match="final_forward: 'second' cannot take the seam, 'first' holds it"):
        first.enable()
    assert not first.enabled
    assert model.hook_origins["final_forward"] == "second"
    model.del_mixin("second")
    first.enable()
    assert model.hook_origins["final_forward"] == "first"


def test_a_copied_model_switches_its_own_mixins():
    model = build()
    twin = copy.deepcopy(model)
    twin.get_mixin("prefix0").disable()
    assert twin.hook_origins["attention_fn"] == "default"
    assert model.hook_origins["attention_fn"] == "prefix0 -> default"
    assert model.get_mixin("prefix0").enabled


def test_a_folder_keeps_settings_and_switches(tmp_path):
    model, ids = build(projection_size=5, prefixes=2), torch.randint(0, 60, (2, 9))
    model.get_mixin("prefix0").scale = 0.5
    model.get_mixin("prefix1").disable()
    model.save_pretrained(tmp_path)
    twin = AutoModel.from_pretrained(tmp_path)
    assert_close(twin(ids)[0], model(ids)[0])
    assert not twin.get_mixin("prefix1").enabled
    twin.get_mixin("prefix1").enable()
    model.get_mixin("prefix1").enable()
    assert_close(twin(ids)[0], model(ids)[0])


def test_wrong_settings_say_what_is_right():
    with pytest.raises(ConfigError, match="prefix_len is 0, it must be at least 1"):
        PrefixTuningMixin(TINY, 0)
    with pytest.raises(ConfigError, match=r"got 2. Write PrefixTuningMixin\(model.config, ...\), .* prefix_len, "):
        PTuningV2Mixin(2, 8)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "t5", "vit", "gptneo"])
def test_changes_every_family_and_compiles_into_one_graph(name):
    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.build().eval()
    parts = {"encoder.prefix": model.encoder, "decoder.prefix": model.decoder} if name == "t5" else {"prefix": model}
    with torch.no_grad():
        before = family.run(model)
        for path, part in parts.items():
            model.add_mixin(path, PrefixTuningMixin(part.config, 4))
            part.get_mixin("prefix").apply(lambda m: [p.normal_() for p in m.parameters(recurse=False)])
        after = family.run(model)
        assert (after - before).abs().max() > 1e-3
        assert_close(family.run(torch.compile(model, fullgraph=True, backend="eager")), after, atol=1e-5, rtol=1e-5)


def test_gpt2_stays_causal():
    model = FAMILIES["gpt2"].build().eval()
    assert isinstance(model, GPT2Model)
    model.add_mixin("prefix", PrefixTuningMixin(model.config, 4))
    ids = torch.randint(0, 60, (2, 9))
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 60
    before, after = model(ids)[0], model(changed)[0]
    assert_close(after[:, :6], before[:, :6])
    assert (after[:, 6:] - before[:, 6:]).abs().max() > 1e-3


def with_prefixes(family, *settings):
    """Add prefixes of (length, first position) to the part that writes; each has its own values, wherever it stands."""
    model = FAMILIES[family].build().eval()
    part = getattr(model, "decoder", model)
    for index, (length, first_position) in enumerate(settings):
        mixin = PrefixTuningMixin(part.config, length, first_position=first_position)
        part.add_mixin(f"prefix-{index}", mixin)
        generator = torch.Generator().manual_seed(length)
        with torch.no_grad():
            for parameter in mixin.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("settings", [[(3, 3)], [(3, 3), (2, 0)]])
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_a_prefix_in_front_is_as_far_away_with_a_cache_as_without(family, settings):
    model, row = with_prefixes(family, *settings), ids(1, 5, seed=1)[0].tolist()
    strategy = Watched()
    generate(model, [row], max_new_tokens=6, strategy=strategy)
    _, logits = uncached(model, row, 6, 0 if family == "t5" else None)
    assert_close(torch.stack(strategy.seen, dim=1)[0], logits, atol=1e-5, rtol=1e-4)


def test_distances_to_a_prefix_do_not_depend_on_the_order_of_prefixes():
    found = [FAMILIES["t5"].run(with_prefixes("t5", *order)) for order in ([(3, 3), (2, 0)], [(2, 0), (3, 3)])]
    assert_close(*found, atol=1e-5, rtol=1e-5)
    nowhere = FAMILIES["t5"].run(with_prefixes("t5", (3, 0), (2, 0)))
    assert (found[0] - nowhere).abs().max() > 1e-4
