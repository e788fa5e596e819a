"""Who answers at each seam, and what a forward owes its hooks."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict, replacable, replaceable
from sat_lightning.errors import ConfigError, HookConflictError, HookError, InputError
from sat_lightning.hooks import SEAMS, passes_mask, resolve_hooks
from sat_lightning.models import GPT2Model
from tests import sat_style

TINY = TransformerConfig(num_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=16)
IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


# ---- the table: every order of default, model, plain, replaceable and non_conflict gives a chain or an error


class Plain(BaseMixin):
    def final_forward(self, logits, **kw):
        return logits + 1


class Replaceable(BaseMixin):
    @replaceable
    def final_forward(self, logits, **kw):
        return logits + 2


class Wrap(BaseMixin):
    @non_conflict
    def final_forward(self, logits, old_impl=None, **kw):
        return old_impl(logits, **kw) * 2


class PlainModel(BaseModel):
    def final_forward(self, logits, **kw):
        return logits + 4


class ReplaceableModel(BaseModel):
    @replacable
    def final_forward(self, logits, **kw):
        return logits + 8


class WrapModel(BaseModel):
    @non_conflict
    def final_forward(self, logits, old_impl=None, **kw):
        return old_impl(logits, **kw) * 3


KINDS = {"plain": Plain, "replaceable": Replaceable, "wrap": Wrap}
MODELS = {"default": BaseModel, "plain": PlainModel, "replaceable": ReplaceableModel, "wrap": WrapModel}


def expected_chain(model_kind: str, order: tuple[str, ...]) -> str | None:
    """The law in words: a plain hook takes the seam from nobody or from a lone replaceable one; a wrap joins."""
    chain = ["default"]
    kinds = {"default": "default"}
    claims = ([] if model_kind == "default" else [("model", model_kind)]) + [
        (f"{k}{i}", k) for i, k in enumerate(order)
    ]
    for name, kind in claims:
        kinds[name] = kind
        if kind == "wrap":
            chain.insert(0, name)
        elif chain == ["default"] or (len(chain) == 1 and kinds[chain[0]] == "replaceable"):
            chain = [name]
        else:
            return None
    return " -> ".join(chain)


def apply_by_hand(chain: str, model_kind: str, x: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    effects = {"plain": lambda x: x + 1, "replaceable": lambda x: x + 2}
    model_effects = {"plain": lambda x: x + 4, "replaceable": lambda x: x + 8}
    names = chain.split(" -> ")
    innermost = names[-1]
    if innermost == "default":
        out = default
    elif innermost == "model":
        out = model_effects[model_kind](x)
    else:
        out = effects[innermost.rstrip("0123456789")](x)
    for name in reversed(names[:-1]):
        out = out * (3 if name == "model" else 2)
    return out


@pytest.mark.parametrize("model_kind", MODELS)
@pytest.mark.parametrize("order", [o for n in range(4) for o in itertools.product(KINDS, repeat=n)])
def test_every_order_gives_the_chain_or_the_error(model_kind, order):
    model = MODELS[model_kind](TINY)
    expected = expected_chain(model_kind, order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if expected is None:
            with pytest.raises(HookConflictError, match="final_forward: '.*' cannot take the seam, '.*' holds it"):
                for i, kind in enumerate(order):
                    model.add_mixin(f"{kind}{i}", KINDS[kind]())
            return
        for i, kind in enumerate(order):
            model.add_mixin(f"{kind}{i}", KINDS[kind]())
    assert model.hook_origins["final_forward"] == expected
    x = torch.randn(2, 3, TINY.hidden_size)
    default = torch.nn.functional.linear(x, model.transformer.word_embeddings.weight)
    got = model.hooks.final_forward(x, hooks=model.hooks)
    assert_close(got, apply_by_hand(expected, model_kind, x, default))


def test_there_are_eleven_seams_and_every_one_can_be_wrapped():
    assert len(SEAMS) == 11
    calls = []

    def wrapping(seam):
        def hook(self, *args, old_impl=None, **kw):
            calls.append(seam)
            return old_impl(*args, **kw)

        return non_conflict(hook)

    everywhere = type("Everywhere", (BaseMixin,), {seam: wrapping(seam) for seam in SEAMS})
    config = TINY.replace(is_decoder=True, num_experts=3, is_rotary_emb=True)
    model = BaseModel(config).eval()
    kw = {"encoder_outputs": torch.randn(2, 5, 32), "output_hidden_states": True}
    torch.manual_seed(1)
    before = model(IDS, **kw)[0]
    model.add_mixin("everywhere", everywhere())
    torch.manual_seed(1)  # the example router draws
    assert_close(model(IDS, **kw)[0], before, atol=1e-6, rtol=1e-5)
    assert set(calls) == set(SEAMS)
    per_layer = {seam: calls.count(seam) / TINY.num_layers for seam in SEAMS}
    assert per_layer["attention_fn"] == 2  # self and cross
    assert per_layer["linear_forward"] == 2 + 3 + 2 * 3  # attention, cross attention, three experts
    assert calls.count("word_embedding_forward") == calls.count("final_forward") == 1


def test_replacing_a_replaceable_hook_warns():
    model = BaseModel(TINY)
    model.add_mixin("soft", Replaceable())
    with pytest.warns(UserWarning, match="final_forward: 'hard' replaces 'soft', which is @replaceable"):
        model.add_mixin("hard", Plain())
    assert model.hook_origins["final_forward"] == "hard"


# ---- errors


@pytest.mark.parametrize(
    ("build", "first", "second", "text"),
    [
        (
            BaseModel,
            Plain,
            Plain,
            "final_forward: 'second' cannot take the seam, 'first' holds it. Call del_mixin('first') first, or mark it "
            "@replaceable, or let 'second' wrap it with @non_conflict.",
        ),
        (
            BaseModel,
            Wrap,
            Plain,
            "final_forward: 'second' cannot take the seam, 'first -> default' holds it. Add 'second' before "
            "'first', or let 'second' wrap it with @non_conflict.",
        ),
        (
            PlainModel,
            None,
            Plain,
            "final_forward: 'second' cannot take the seam, 'model' holds it. Mark the model's method @replaceable, or "
            "let 'second' wrap it with @non_conflict.",
        ),
    ],
)
def test_a_conflict_names_seam_owners_and_cure(build, first, second, text):
    model = build(TINY)
    if first is not None:
        model.add_mixin("first", first())
    with pytest.raises(HookConflictError) as error:
        model.add_mixin("second", second())
    assert str(error.value) == text


def test_a_wrapping_hook_without_old_impl_is_refused():
    class Deaf(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states, **kw):
            return hidden_states

    with pytest.raises(HookError, match="mlp_forward: 'deaf' is @non_conflict but has no parameter 'old_impl'"):
        BaseModel(TINY).add_mixin("deaf", Deaf())


@pytest.mark.parametrize(
    ("written", "meant"),
    [("mlp_foward", "mlp_forward"), ("attention_func", "attention_fn"), ("final_forwards", "final_forward")],
)
def test_a_misspelt_hook_is_an_error_that_names_the_seam(written, meant):
    misspelt = type("Misspelt", (BaseMixin,), {written: lambda self, *args, **kw: None})
    with pytest.raises(HookError, match=f"'it' defines '{written}', which no seam is called. Did you mean '{meant}'?"):
        BaseModel(TINY).add_mixin("it", misspelt())
    model_class = type("MisspeltModel", (BaseModel,), {written: lambda self, *args, **kw: None})
    with pytest.raises(HookError, match=meant):
        model_class(TINY)


def test_a_refused_mixin_leaves_no_trace():
    class Broken(BaseMixin):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def reinit(self, parent_model=None):
            raise RuntimeError("no")

        @non_conflict
        def mlp_forward(self, hidden_states, old_impl=None, **kw):
            return old_impl(hidden_states, **kw)

    model = GPT2Model(TINY)
    table, keys, before = model.hooks, list(model.state_dict()), model(IDS)[0]
    refused = [
        ("head", Plain(), False, HookConflictError),
        ("broken", Broken(), True, RuntimeError),
        ("gpt2-final", Wrap(), False, HookError),
        ("linear", nn.Linear(2, 2), False, HookError),
    ]
    for name, mixin, reinit, kind in refused:
        with pytest.raises(kind):
            model.add_mixin(name, mixin, reinit=reinit)
        assert list(model.state_dict()) == keys
        assert list(model.mixins) == ["gpt2-final"]
        assert model.hook_origins == table.describe()
        assert getattr(mixin, "transformer", None) is None
    assert torch.equal(model(IDS)[0], before)


def test_del_mixin_gives_the_seam_back():
    model = GPT2Model(TINY)
    before = model(IDS)[0]
    model.add_mixin("wrap", Wrap())
    assert_close(model(IDS)[0], before * 2)
    model.del_mixin("wrap")
    assert torch.equal(model(IDS)[0], before)
    assert model.hook_origins["final_forward"] == "gpt2-final"
    model.del_mixin("gpt2-final")
    assert model.hook_origins["final_forward"] == "default"
    with pytest.raises(HookError, match="No mixin is named 'rap'.*there are"):
        model.del_mixin("rap")


def test_removing_what_others_wrap_keeps_their_order():
    model = BaseModel(TINY)
    for name in ("a", "b", "c"):
        model.add_mixin(name, Wrap())
    model.del_mixin("b")
    assert model.hook_origins["final_forward"] == "c -> a -> default"


def test_get_mixin_names_the_nearest():
    with pytest.raises(HookError, match="Did you mean 'gpt2-final'?"):
        GPT2Model(TINY).get_mixin("gpt2-finale")


def test_reserved_keywords_are_refused_at_the_call_and_between_layers():
    with pytest.raises(HookError, match=r"\['layer_id'\]: the backbone passes these keywords itself"):
        BaseModel(TINY)(IDS, layer_id=3)

    class Thief(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states, old_impl=None, **kw):
            kw["output_cross_layer"]["layer_id"] = 7
            return old_impl(hidden_states, **kw)

    model = BaseModel(TINY)
    model.add_mixin("thief", Thief())
    with pytest.raises(HookError, match=r"output_cross_layer holds \['layer_id'\]"):
        model(IDS)


# ---- provenance


def test_explain_hooks_lists_seam_chain_file_and_line():
    model = GPT2Model(TINY)
    model.add_mixin("wrap", Wrap())
    rows = [line for line in model.explain_hooks().splitlines() if line.startswith("final_forward")]
    line = Wrap.final_forward.__code__.co_firstlineno
    assert rows[0].split() == ["final_forward", "wrap", "->", "gpt2-final", f"{__file__}:{line}"]
    following = model.explain_hooks().splitlines()[model.explain_hooks().splitlines().index(rows[0]) + 1]
    assert "lm_head.py:" in following
    assert all(any(line.startswith(seam) for line in model.explain_hooks().splitlines()) for seam in SEAMS)


def test_an_exception_in_a_forward_says_whose_hooks_ran():
    class Bad(BaseMixin):
        @non_conflict
        def attention_fn(self, q, k, v, mask, dropout_fn, old_impl=None, **kw):
            return old_impl(q, k[:, :, :, :3], v, mask, dropout_fn, **kw)

    model = GPT2Model(TINY)
    model.add_mixin("bad", Bad())
    with pytest.raises(RuntimeError) as error:
        model(IDS)
    notes = "\n".join(getattr(error.value, "__notes__", [])) or str(error.value)
    assert "GPT2Model hooks:" in notes
    assert "attention_fn = bad -> default" in notes
    assert "final_forward = gpt2-final" in notes


# ---- the two roads out of a layer


class Roads(BaseMixin):
    """Counts what arrives: every layer must see only what the one before it wrote."""

    def word_embedding_forward(self, input_ids, output_cross_layer, **kw):
        output_cross_layer["seen"] = torch.zeros(())
        return self.transformer.word_embeddings(input_ids)

    @non_conflict
    def layer_forward(self, hidden_states, mask, old_impl=None, **kw):
        kw["output_this_layer"]["layer"] = (kw["layer_id"], kw["seen"])
        kw["output_cross_layer"]["seen"] = kw["seen"] + 1
        return old_impl(hidden_states, mask, **kw)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_outputs_of_layers_and_between_layers(checkpoint):
    model = BaseModel(TINY.replace(checkpoint_activations=checkpoint)).train()
    model.add_mixin("roads", Roads())
    logits, *per_layer = model(IDS)
    assert len(per_layer) == TINY.num_layers
    assert [outputs["layer"][0] for outputs in per_layer] == [0, 1, 2]
    assert [int(outputs["layer"][1]) for outputs in per_layer] == [0, 1, 2]
    hidden = model(IDS, output_hidden_states=True)
    assert all(outputs["hidden_states"].shape == (2, 10, 32) for outputs in hidden[1:])


def test_every_keyword_of_the_call_reaches_every_hook():
    seen = {}

    class Listener(BaseMixin):
        pass

    def listening(seam):
        def hook(self, *args, old_impl=None, **kw):
            seen[seam] = kw.get("word")
            return old_impl(*args, **kw)

        return non_conflict(hook)

    for seam in SEAMS:
        setattr(Listener, seam, listening(seam))
    model = BaseModel(TINY.replace(is_decoder=True, num_experts=2))
    model.add_mixin("listener", Listener())
    model(IDS, word="hello", encoder_outputs=torch.randn(2, 4, 32))
    assert seen == dict.fromkeys(SEAMS, "hello")


# ---- SAT-style mixins stack, with and without checkpointing


def stacked(config: TransformerConfig) -> BaseModel:
    """A model with the habits of SAT's users stacked on one another."""
    heads, head_size = config.num_key_value_heads, config.head_size
    model = BaseModel(config)
    model.add_mixin("prefix", sat_style.PrefixMixin(config.num_layers, head_size, heads, 4))
    model.add_mixin("cache", sat_style.CacheMixin())
    model.add_mixin("adapter", sat_style.AdaptersMixin(config.num_layers, config.hidden_size, 8))
    model.add_mixin("head", sat_style.HeadMixin(config.hidden_size, 16, 5))
    if config.num_experts > 1:
        model.add_mixin("router", sat_style.RouterMixin(config.num_layers, config.hidden_size, config.num_experts))
    else:
        model.add_mixin("ffadd", sat_style.FFAddMixin(config.hidden_size, config.num_layers, 6))
    return model


STACKS = {
    "plain": TINY,
    "rotary-gqa": TINY.replace(is_rotary_emb=True, num_multi_query_heads=2),
    "experts": TINY.replace(num_experts=3),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("mask", [None, -1])
def test_sat_style_mixins_stack_with_and_without_checkpointing(name, mask):
    results = []
    for changes in ({}, {"checkpoint_activations": True}, {"checkpoint_activations": True, "checkpoint_num_layers": 2,
                                                           "checkpoint_skip_layers": 1}):  # fmt: skip
        torch.manual_seed(0)
        model = stacked(STACKS[name].replace(**changes)).train()
        logits, *per_layer = model(IDS, attention_mask=mask)
        logits.square().sum().backward()
        gradients = {k: p.grad for k, p in model.named_parameters()}
        results.append((logits, [o["mem_kv"] for o in per_layer], gradients))
    assert model.hook_origins["attention_fn"] == "cache -> prefix -> default"
    (logits, memories, gradients), *others = results
    # The replaced head leaves the word table without a gradient from the logits, never the mixins.
    assert all(gradients[k] is not None for k in gradients if k.startswith("mixins."))
    for other_logits, other_memories, other_gradients in others:
        assert torch.equal(logits, other_logits)
        assert all(torch.equal(a, b) for a, b in zip(memories, other_memories, strict=True))
        for key, gradient in gradients.items():
            if gradient is not None:
                assert_close(other_gradients[key], gradient, atol=1e-6, rtol=1e-5)


def test_a_relative_bias_travels_from_layer_to_layer():
    class Counting(sat_style.RelativeBiasMixin):
        made = 0

        @non_conflict
        def attention_fn(self, *args, position_bias=None, old_impl=None, **kw):
            Counting.made += position_bias is None
            return super().attention_fn(*args, position_bias=position_bias, old_impl=old_impl, **kw)

    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = BaseModel(TINY.replace(checkpoint_activations=checkpoint)).train()
        model.add_mixin("bias", Counting(4, 6))
        Counting.made = 0
        logits = model(IDS, attention_mask=-1)[0]
        assert Counting.made == 1, "only the first layer makes the bias"
        logits.square().sum().backward()
        results.append((logits, model.get_mixin("bias").bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1], atol=1e-6, rtol=1e-5)


def test_a_cache_gives_the_next_tokens_what_the_whole_sequence_gives():
    model = BaseModel(TINY).eval()
    model.add_mixin("cache", sat_style.CacheMixin())
    whole, *per_layer = model(IDS, attention_mask=-1)
    mems = [outputs["mem_kv"][:, :6] for outputs in per_layer]
    mask = torch.ones(10, 10).tril()[6:]
    rest = model(IDS[:, 6:], torch.arange(6, 10)[None], mask, mems=mems)[0]
    assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)


def test_a_class_written_for_sat_runs():
    model = sat_style.LegacyModel(TINY, hidden_dropout=0.0).eval()
    logits = model(IDS, torch.arange(10).unsqueeze(0), -1)[0]
    assert logits.shape == (2, 10, 2)
    assert model.hook_origins["position_embedding_forward"] == "model"
    assert model.hook_origins["final_forward"] == "head"
    shared = sat_style.LegacyModel(TINY, transformer=model.transformer)
    assert shared.transformer is model.transformer


# ---- two models over one backbone, deepcopy


def test_two_models_over_one_backbone_get_their_solo_gradients():
    torch.manual_seed(0)
    config = TINY.replace(checkpoint_activations=True)
    first = BaseModel(config).train()
    first.add_mixin("adapter", sat_style.AdaptersMixin(3, 32, 4))
    second = BaseModel(config, transformer=first.transformer).train()
    second.add_mixin("prefix", sat_style.PrefixMixin(3, 8, 4, 3))

    def gradients(*models):
        first.zero_grad()
        second.zero_grad()
        losses = [model(IDS)[0].square().mean() for model in models]  # every forward before any backward
        sum(losses).backward()
        return {k: None if p.grad is None else p.grad.clone() for m in (first, second) for k, p in m.named_parameters()}

    solo_first, solo_second, both = gradients(first), gradients(second), gradients(first, second)
    for key, gradient in both.items():
        parts = [g[key] for g in (solo_first, solo_second) if g[key] is not None]
        assert_close(gradient, sum(parts), atol=1e-6, rtol=1e-4)
    assert first.hook_origins["layer_forward"] == "adapter"
    assert second.hook_origins["layer_forward"] == "default"


def test_overrides_cannot_change_a_shared_backbone():
    with pytest.raises(ConfigError, match="layernorm_order='post' cannot change a backbone that stands with 'pre'"):
        BaseModel(TINY, transformer=BaseModel(TINY).transformer, layernorm_order="post")


def test_deepcopy_rebinds_every_hook_to_the_copy():
    model = stacked(TINY).eval()
    twin = copy.deepcopy(model)
    before = model(IDS)[0]
    assert torch.equal(twin(IDS)[0], before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS)[0], before), "the copy's weights reached the original"
    assert twin(IDS)[0].abs().sum() == 0, "the copy's hooks still use the original's weights"
    twin.del_mixin("prefix")
    assert "prefix" in model.mixins
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS)[0], before)


def test_resolution_is_pure():
    model = stacked(TINY)
    table = resolve_hooks(model.transformer, model, dict(model.mixins.items()))
    assert table.describe() == model.hook_origins
    with pytest.raises(AttributeError):
        table.attention_fn = None
    with pytest.raises(TypeError):
        table.origins["attention_fn"] = ()


def test_what_nobody_claims_costs_nothing():
    hooks = BaseModel(TINY).hooks
    silent = {seam for seam in SEAMS if getattr(hooks, seam) is None}
    assert silent == {
        "layer_forward", "attention_forward", "query_key_forward", "cross_attention_forward", "mlp_forward",
        "routing_forward", "linear_forward",
    }  # fmt: skip
    assert not hooks.reads_mask
    model = BaseModel(TINY)
    model.add_mixin("cache", sat_style.CacheMixin())
    assert model.hooks.reads_mask


def test_a_hook_that_hands_the_mask_on_costs_no_mask():
    class Watch(BaseMixin):
        @non_conflict
        @passes_mask
        def attention_fn(self, query, key, value, mask, dropout_fn, old_impl=None, **kw):
            assert mask.numel() == 1
            return old_impl(query, key, value, mask, dropout_fn, **kw)

    model = BaseModel(TINY)
    expected = model(IDS, attention_mask=-1)[0]
    model.add_mixin("watch", Watch())
    assert not model.hooks.reads_mask
    assert torch.equal(model(IDS, attention_mask=-1)[0], expected)
    model.add_mixin("cache", sat_style.CacheMixin())
    assert model.hooks.reads_mask


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(5, dtype=torch.long),), r"input_ids has shape \[5\]; it must be \[batch, length\]"),
        ((IDS, torch.arange(9)), r"position_ids has shape \[9\]; for sequences of 10 tokens it must be \[10\] or"),
        ((IDS, torch.zeros(3, 10, dtype=torch.long)), "position_ids has 3 rows, input_ids 2"),
        ((IDS, torch.zeros(2, 2, 10, dtype=torch.long)), "Other shapes need a position_embedding_forward hook"),
        ((IDS, None), "position_ids is None, and no hook makes positions"),
        ((IDS, torch.arange(10), torch.ones(2, 10)), r"For padding \[b, t\] pass attention_mask\[:, None, None, :\]"),
        ((IDS, torch.arange(10), torch.ones(2, 4, 10, 10)), r"attention_mask has shape \[2, 4, 10, 10\]; for 2 rows"),
        (
            (IDS, torch.arange(10), torch.ones(10, 11)),
            r"attention_mask has shape \[10, 11\], the scores are \[10, 10\]",
        ),
        ((IDS, torch.arange(10), 1), "attention_mask is 1; pass None"),
        ((IDS, torch.arange(10), "casual"), "attention_mask is 'casual'; pass None"),
        ((torch.zeros(1, 17, dtype=torch.long),), "The sequence has 17 tokens, max_sequence_length is 16"),
    ],
)
def test_wrong_shapes_are_refused_with_numbers_and_cure(arguments, text):
    with pytest.raises(InputError, match=text):
        BaseModel(TINY)(*arguments)


def test_an_id_outside_its_table_is_explained():
    with pytest.raises(IndexError) as error:
        BaseModel(TINY)(torch.full((1, 4), 50))
    notes = "\n".join(getattr(error.value, "__notes__", [])) or str(error.value)
    assert "input_ids reach 50, vocab_size is 50." in notes
    with pytest.raises(IndexError) as error:
        BaseModel(TINY)(IDS, torch.arange(10) + 10)
    assert "position_ids reach 19, max_sequence_length is 16." in "\n".join(error.value.__notes__)


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ConfigError, match="'activation_fn' is neither a field of .* Did you mean 'activation_func'?"):
        BaseModel(TINY, activation_fn=torch.relu)
    with pytest.raises(ConfigError, match="config is a dict, it must be a TransformerConfig"):
        BaseModel({"num_layers": 2})


def test_building_a_model_is_pure():
    state = torch.get_rng_state()
    flags = (torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.get_default_dtype())
    with torch.device("meta"):
        GPT2Model(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    GPT2Model(TINY)
    assert not torch.distributed.is_initialized()
    assert flags == (torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(), torch.get_default_dtype())


@pytest.mark.parametrize("mask", [None, -1, "tensor"])
def test_a_forward_reads_no_tensor(mask):
    """Fake tensors have no values: whoever looks at one to decide something fails here, as it would wait on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for model in (GPT2Model(TINY), stacked(STACKS["rotary-gqa"].replace(checkpoint_activations=True))):
            ids = torch.zeros(2, 10, dtype=torch.long)
            attention_mask = torch.ones(2, 1, 1, 10) if mask == "tensor" else mask
            model(ids, attention_mask=attention_mask)[0].sum().backward()
