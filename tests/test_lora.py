"""LoRA, DoRA and (IA)^3: nothing changes at the start, merging is exact, adapters stack, and a wrong use is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sat_lightning import AutoModel, BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.errors import CheckpointError, ConfigError, HookConflictError, HookError
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoRAMixin, LoraMixin
from tests.families import FAMILIES, SIZES

METHODS = {
    "lora": lambda c: LoraMixin(c, target="layers"),
    "lora as one": lambda c: LoraMixin(c, target=["query_key_value$", "dense$"], rank=3, alpha=2, use_rslora=True),
    "lora patterns": lambda c: LoraMixin(c, rank_pattern={"key": 2}, alpha_pattern={"value": 3.0, "dense": 5}),
    "dora": lambda c: DoraMixin(c, target="layers"),
    "ia3": IA3Mixin,
}
GATED = ["gpt2", "llama", "mixtral", "t5-gated", "vit", "cuda2d", "chatglm2", "glm130b", "cait"]


def randomise(mixin, std=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in mixin.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return mixin


def run(family, model, **more):
    torch.manual_seed(0)  # MoE without a router draws
    return FAMILIES[family].run(model, **more)


def added(model, method, name="tuned"):
    """Add a method to every part of a model; returns the mixins."""
    parts = getattr(model, "parts", {"": model})
    mixins = [make(METHODS[method], part) for part in parts.values()]
    for part, mixin in zip(parts.values(), mixins, strict=True):
        part.add_mixin(name, mixin)
    return mixins


def make(method, part):
    return method(part.config)


def gpt2(**changes):
    return FAMILIES["gpt2"].build(**changes).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", GATED)
def test_starts_as_the_base_merges_and_restores_every_byte(family, method):
    if (family, method) == ("glm130b", "dora"):
        return  # refused: see below
    model = FAMILIES[family].build().eval()
    base = run(family, model)
    mixins = added(model, method)
    assert torch.equal(run(family, model), base)
    [randomise(mixin) for mixin in mixins]
    tuned = run(family, model)
    assert (tuned - base).abs().max() > 1e-2
    if family == "glm130b":
        with pytest.raises(HookError, match="adapts what 'headwise-projection' makes of the output of linears"):
            mixins[0].merge()
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    [mixin.merge() for mixin in mixins]
    assert_close(run(family, model), tuned, atol=1e-5, rtol=1e-5)
    [mixin.unmerge() for mixin in mixins]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(run(family, model), tuned)


def test_fused_projections_have_parts_and_names_follow_the_base():
    model = gpt2()
    names = set(model.state_dict())
    model.add_mixin("lora", LoraMixin(model.config, rank=2, target=r"query_key_value\.(query|value)"))
    new = {name: list(model.state_dict()[name].shape) for name in set(model.state_dict()) - names}
    start = "mixins.lora.layers.1.attention.query_key_value.matrix_"
    assert {k: v for k, v in new.items() if k.startswith(start)} == {
        f"{start}A.0": [2, 32], f"{start}A.2": [2, 32], f"{start}B.0": [32, 2], f"{start}B.2": [32, 2],
    }  # fmt: skip
    assert len(new) == 8 and model.hook_origins["linear_forward"] == "lora -> default"
    assert model.hook_origins["word_embedding_forward"] == "default"


def test_parts_as_one_product_equal_parts_one_by_one():
    model, config = gpt2(), TransformerConfig(**SIZES)
    model.add_mixin("lora", randomise_after(model, "lora", LoraMixin(config, rank=3, alpha=6)))
    attention, x = model.transformer.layers[0].attention, torch.randn(2, 5, 32)
    weights = model.get_mixin("lora").layers.get_submodule("0.attention.query_key_value")
    expected = attention.query_key_value(x) + torch.cat(
        [2.0 * (x @ weights.pair(str(j))[0].T @ weights.pair(str(j))[1].T) for j in range(3)], dim=-1
    )
    got = model.hooks.linear_forward(x, linear=attention.query_key_value, name="query_key_value", layer_id=0)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


def randomise_after(model, name, mixin):
    """Add, randomise, take out again: a mixin with weights, ready to be added."""
    model.add_mixin(name, mixin)
    randomise(mixin)
    model.del_mixin(name)
    return mixin


def test_linears_of_mixins_and_experts_are_reached():
    model = FAMILIES["t5-gated"].build().decoder.eval()
    model.add_mixin("lora", LoraMixin(model.config, target=[r"^mixins\.gated-mlp", "cross_attention"]))
    names = [name for name, _ in model.get_mixin("lora").named_parameters()]
    assert "mixins.gated-mlp.gated_h_to_4h_list.1.matrix_A.0" in names
    assert "layers.0.cross_attention.key_value.matrix_B.1" in names
    experts = FAMILIES["mixtral"].build().eval()
    experts.add_mixin("lora", LoraMixin(experts.config, target=[r"dense_h_to_4h_1$", "gates"]))
    assert len(list(experts.get_mixin("lora").parameters())) == 2 * 2 * 2


def test_word_embeddings():
    model, ids = gpt2(), torch.tensor([[5, 6, 7]])
    base = model(ids)[0]
    mixin = LoraMixin(model.config, target=["word_embeddings", "mlp"])
    model.add_mixin("lora", mixin)
    assert torch.equal(model(ids)[0], base)
    tuned = (randomise(mixin), model(ids)[0])[1]
    mixin.merge()
    assert_close(model(ids)[0], tuned, atol=1e-5, rtol=1e-5)
    tied = BaseModel(TransformerConfig(**SIZES))
    tied.add_mixin("lora", LoraMixin(tied.config, target="word_embeddings"))
    with pytest.raises(HookError, match="would change the head"):
        tied.get_mixin("lora").merge()


def test_several_adapters_add_up_and_each_sample_has_its_own():
    model, inputs = gpt2(), FAMILIES["gpt2"].inputs(0)
    one = LoraMixin(model.config, target="attention")
    two = IA3Mixin(model.config)
    three = LoraMixin(model.config, target="mlp|word_embeddings", rank=2)
    for name, mixin in {"one": one, "two": two, "three": three}.items():
        model.add_mixin(name, mixin)
        randomise(mixin)
    assert [m.adapter_id for m in (one, two, three)] == [0, 1, 2]
    alone = {}
    for chosen in (one, two, three, None):
        for mixin in (one, two, three):
            mixin.enabled = mixin is chosen
        alone[chosen] = model(**inputs)[0]
    for mixin in (one, two, three):
        mixin.enable()
    ids = {"input_ids": inputs["input_ids"][:1].expand(4, -1)}
    mixed = model(**ids, adapter_ids=torch.tensor([2, -1, 0, 1]))[0]
    for row, mixin in enumerate([three, None, one, two]):
        assert_close(mixed[row], alone[mixin][0], atol=1e-5, rtol=1e-5)
    assert (model(**inputs)[0] - alone[one]).abs().max() > 1e-3
    model.del_mixin("one")
    assert three.adapter_id == 2
    one.enable()


def test_samples_cannot_be_told_apart_in_an_expert():
    model = FAMILIES["mixtral"].build().eval()
    model.add_mixin("lora", LoraMixin(model.config, target="mlp"))
    with pytest.raises(ConfigError, match="without an axis of samples"):
        run("mixtral", model, adapter_ids=torch.tensor([0, 0]))


def test_scale_weighs_what_is_added():
    for method in METHODS:
        model = gpt2()
        (mixin,) = added(model, method)
        base = run("gpt2", model)
        randomise(mixin)
        mixin.scale = 0.0
        if method != "dora":  # whose lengths are trained apart
            assert_close(run("gpt2", model), base)
        mixin.scale = 0.5
        half = run("gpt2", model)
        mixin.merge()
        assert_close(run("gpt2", model), half, atol=1e-5, rtol=1e-5)


def test_merging_in_an_order_that_is_wrong_is_refused():
    model = gpt2()
    inner, outer = IA3Mixin(model.config), LoraMixin(model.config, target="layers")
    model.add_mixin("ia3", inner)
    model.add_mixin("lora", outer)
    randomise(inner), randomise(outer)
    both = run("gpt2", model)
    with pytest.raises(HookError, match=r"acts on what 'ia3' makes of the same linears\. Merge 'ia3' first"):
        outer.merge()
    inner.merge()
    outer.merge()
    assert_close(run("gpt2", model), both, atol=1e-5, rtol=1e-5)
    with pytest.raises(HookError, match="has changed since the merge: by another merge"):
        inner.unmerge()
    for refused in (outer.merge, outer.enable, outer.disable):
        with pytest.raises(HookError, match=r"is merged"):
            refused()
    with pytest.raises(CheckpointError, match="saved beside the merged weights it would count twice"):
        model.state_dict()
    outer.unmerge()
    inner.unmerge()
    assert_close(run("gpt2", model), both)
    with pytest.raises(HookError, match="is not merged"):
        inner.unmerge()
    outer.disable()
    with pytest.raises(HookError, match="is disabled"):
        outer.merge()
    with pytest.raises(HookError, match="is not added to a model"):
        LoraMixin(model.config).merge()


def test_dora_stands_on_the_weights_alone():
    model = gpt2()
    model.add_mixin("lora", LoraMixin(model.config))
    with pytest.raises(HookConflictError, match="rescales the weight of layers.0.attention.query_key_value"):
        model.add_mixin("dora", DoraMixin(model.config))
    model.get_mixin("lora").merge()
    model.add_mixin("dora", DoraMixin(model.config))
    headwise = FAMILIES["glm130b"].build()
    with pytest.raises(HookConflictError, match="'headwise-projection' wraps linear_forward"):
        headwise.add_mixin("dora", DoraMixin(headwise.config))
    first = gpt2()
    first.add_mixin("dora", randomise_after(first, "dora", DoraMixin(first.config)))
    first.add_mixin("lora", randomise_after(first, "lora", LoraMixin(first.config)))
    both = run("gpt2", first)
    with pytest.raises(HookError, match="Merge 'dora' first"):
        first.get_mixin("lora").merge()
    first.get_mixin("dora").merge(), first.get_mixin("lora").merge()
    assert_close(run("gpt2", first), both, atol=1e-5, rtol=1e-5)


def test_pissa_begins_at_the_singular_vectors_and_leaves_the_base():
    model = gpt2()
    base, before = run("gpt2", model), copy.deepcopy(model.transformer.state_dict())
    mixin = LoraMixin(model.config, rank=4, init="pissa", target="layers")
    model.add_mixin("pissa", mixin, reinit=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.transformer.state_dict().items())
    assert_close(run("gpt2", model), base, atol=1e-5, rtol=1e-5)
    weights = mixin.get_submodule("layers.0.mlp.dense_4h_to_h")
    down, up = weights.pair("0")
    weight = model.transformer.layers[0].mlp.dense_4h_to_h.weight
    values = torch.linalg.svdvals(weight)
    residual = weight - weights.factors[0] * up @ down
    assert_close(torch.linalg.svdvals(residual)[0], values[4], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        [parameter.mul_(1.1) for parameter in mixin.parameters()]
    tuned = run("gpt2", model)
    mixin.merge()
    assert (tuned - base).abs().max() > 1e-3
    assert_close(run("gpt2", model), tuned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_whole_and_with_activation_checkpointing(method):
    model = gpt2(checkpoint_activations=True)
    (mixin,) = added(model, method)
    randomise(mixin)
    model.requires_grad_(False)
    mixin.requires_grad_(True)
    ids = FAMILIES["gpt2"].inputs(0)

    def gradients(function):
        model.zero_grad()
        function(**ids)[0].square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in mixin.named_parameters()}

    model.eval()
    expected, output = gradients(model), model(**ids)[0]
    model.train()
    assert_close(gradients(model), expected)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(gradients(compiled), expected, atol=1e-5, rtol=1e-4)
    chosen = torch.tensor([0, -1])
    assert_close(compiled(**ids)[0], output, atol=1e-5, rtol=1e-5)
    assert_close(compiled(**ids, adapter_ids=chosen)[0], model(**ids, adapter_ids=chosen)[0], atol=1e-5, rtol=1e-5)
    assert all((gradient != 0).any() for gradient in expected.values())


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_autocast(method):
    model, ids = gpt2(), FAMILIES["gpt2"].inputs(0)
    exact = model(**ids)[0]
    model.to(torch.bfloat16)
    base = model(**ids)[0]
    (mixin,) = added(model, method)
    assert all(parameter.dtype == torch.float32 for parameter in mixin.parameters())
    assert torch.equal(model(**ids)[0], base)
    randomise(mixin, 0.05)
    wide = copy.deepcopy(model).float()(**ids)[0]
    assert_close(model(**ids)[0].float(), wide, atol=0.2, rtol=0.1)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(**ids)[0].float(), wide, atol=0.2, rtol=0.1)
    before = {name: tensor.clone() for name, tensor in model.to(torch.bfloat16).state_dict().items()}
    mixin.merge()
    assert_close(model(**ids)[0].float(), wide, atol=0.2, rtol=0.1)
    mixin.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (wide - exact).abs().max() > 1e-2


def test_dropout_acts_in_training_only():
    model = gpt2(attention_dropout=0.0, hidden_dropout=0.0)
    model.add_mixin("lora", LoraMixin(model.config, dropout=0.5))
    randomise(model.get_mixin("lora"))
    assert torch.equal(run("gpt2", model), run("gpt2", model))
    model.train()
    first = FAMILIES["gpt2"].run(model)
    assert not torch.equal(first, FAMILIES["gpt2"].run(model))
    model.get_mixin("lora").dropout = 0.0
    assert_close(FAMILIES["gpt2"].run(model), run("gpt2", model.eval()))


@pytest.mark.parametrize("method", METHODS)
def test_saved_reloaded_and_copied_it_answers_the_same(method, tmp_path):
    model = gpt2()
    (mixin,) = added(model, method)
    randomise(mixin)
    model.save_pretrained(tmp_path)
    expected = run("gpt2", model)
    assert torch.equal(run("gpt2", AutoModel.from_pretrained(tmp_path)), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(run("gpt2", twin), expected)
    twin.get_mixin("tuned").merge()
    assert torch.equal(run("gpt2", model), expected)
    other = FAMILIES["gpt2"].build(num_layers=1)
    model.del_mixin("tuned")
    with pytest.raises(ConfigError, match="was built for a model of other linears"):
        other.add_mixin("tuned", mixin)
    assert "tuned" not in other.mixins


class Direct(BaseMixin):
    """Runs a linear of its own, which nobody can adapt."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    @non_conflict
    def mlp_forward(self, hidden_states, old_impl=None, **kw):
        return old_impl(self.gate(hidden_states), **kw)


REFUSED = {
    "matches no linear. Did you mean 'mlp.dense_h_to_4h'?": {"target": "mlp.dense_h_4h"},
    "target: '(' is no regular expression": {"target": "("},
    "mixins.gpt2-final.lm_head, whose call does not pass through linear_forward": {"target": "lm_head"},
    "as one and in parts": {"target": ["query_key_value$", "query_key_value.key"]},
    "rank_pattern: 'mlp' matches no linear that `target` chose": {"rank_pattern": {"mlp": 3}},
    "alpha_pattern: 'mlp' matches no linear that `target` chose": {"alpha_pattern": {"mlp": 3}},
    "rank is 0, it must be a whole number above 0": {"rank": 0},
    "dropout is 1.0, it must be in [0, 1)": {"dropout": 1.0},
    "init is 'svd', known are 'default' and 'pissa'": {"init": "svd"},
    "init='pissa' is for linears": {"init": "pissa", "target": "word_embeddings"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_setting_is_refused_and_leaves_no_trace(message):
    model = gpt2()
    model.add_mixin("direct", Direct(model.config))
    names = set(model.state_dict())
    with pytest.raises(ConfigError) as error:
        model.add_mixin("lora", LoraMixin(model.config, **REFUSED[message]))
    assert message in str(error.value)
    assert set(model.state_dict()) == names and "lora" not in model.mixins


def test_other_wrong_uses():
    model = gpt2()
    with pytest.raises(ConfigError, match=r"Write LoRAMixin\(model.config"):
        LoRAMixin("32", r=3)
    for make_mixin in (DoraMixin, IA3Mixin):
        with pytest.raises(ConfigError, match="is for linears"):
            model.add_mixin("x", make_mixin(model.config, target="word_embeddings"))
    with pytest.raises(ConfigError, match="DoRA begins at the weights themselves"):
        DoraMixin(model.config, init="pissa")
    with pytest.raises(ConfigError, match="the parts of layers.0.attention.query_key_value read one input"):
        model.add_mixin("x", IA3Mixin(model.config, target="query_key_value", feedforward="query_key_value"))


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_what_begins_at_the_base_begins_at_the_one_that_init_from_brings(method, tmp_path):
    from sat_lightning.training.initialise import init_from
    from tests.training_examples import make_model, make_task

    base = make_model(init_method_std=0.3).eval()
    base.save_pretrained(tmp_path)
    make = {"dora": DoraMixin, "pissa": lambda c: LoraMixin(c, init="pissa")}[method]
    task = make_task(make_model, mixins={"tuned": make})
    init_from(task, tmp_path)
    task.configure_model()
    ids = torch.arange(9)[None]
    assert_close(task.model.eval()(ids)[0], base(ids)[0], atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("mixins.tuned.") for name in trained)
    if method == "pissa":
        down, _ = task.model.get_mixin("tuned").get_submodule("layers.0.attention.dense").pair("0", "initial")
        assert down.abs().max() > 0
