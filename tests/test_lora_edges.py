"""Adapters of weights where it is easy to be wrong: half precision, tables of words, experts, merged state."""

import copy

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import BaseModel, TransformerConfig
from sat_lightning.errors import ConfigError, HookError
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin, PrefixTuningMixin, PromptTuningMixin, TaskHeadsMixin
from sat_lightning.mixins.combine import combine_loras
from sat_lightning.nn.linear import Linear
from tests.families import FAMILIES, SIZES
from tests.test_lora import gpt2, randomise, run


def test_small_factors_count_in_half_precision():
    """Between 1 and 1.0078 bfloat16 has nothing: what is learnt there must not wait for a step that large."""
    model = gpt2().to(torch.bfloat16)
    linear = model.transformer.layers[0].mlp.dense_h_to_4h
    x = torch.randn(1, 256, 32).to(torch.bfloat16)
    for make, name in (
        (lambda c: IA3Mixin(c, target="layers"), "factors"),
        (lambda c: DoraMixin(c, target="layers"), "magnitude"),
    ):
        model.add_mixin("tuned", make(model.config))
        mixin = model.get_mixin("tuned")

        def out(mixin=mixin):
            return model.hooks.linear_forward(x, linear=linear, name="dense_h_to_4h", layer_id=0).float()

        base = out()
        with torch.no_grad():
            for key, parameter in mixin.named_parameters():
                if name in key:
                    parameter.mul_(1.003)
        ratio = (out() * base).sum() / base.square().sum()
        assert 1.002 < ratio < 1.004, (name, ratio)
        model.del_mixin("tuned")


def test_a_merge_that_breaks_off_leaves_the_base_and_the_method(monkeypatch):
    model = gpt2()
    mixin = LoraMixin(model.config, target="layers")
    model.add_mixin("lora", mixin)
    randomise(mixin)
    tuned, before = run("gpt2", model), copy.deepcopy(model.state_dict())
    last = list(mixin._adapters.values())[-1]
    monkeypatch.setattr(last, "merged", lambda *args: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        mixin.merge()
    monkeypatch.undo()
    assert not mixin.is_merged and mixin.enabled
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(run("gpt2", model), tuned)


def test_a_scale_is_not_changed_while_it_is_in_the_weights():
    model = gpt2()
    mixin = LoraMixin(model.config)
    model.add_mixin("lora", mixin)
    mixin.scale = 0.5
    mixin.merge()
    with pytest.raises(HookError, match=r"LoraMixin is merged at scale 0\.5\. Call unmerge\(\) first"):
        mixin.scale = 1.0
    mixin.unmerge()
    mixin.scale = 1.0
    mixin.merge()
    model.del_mixin("lora")
    with pytest.raises(HookError, match="was removed from the model, whose weights hold it for good"):
        mixin.unmerge()


def test_a_prompt_is_no_word_for_a_table_of_words():
    model, ids = gpt2(), torch.tensor([[5], [6]])
    model.add_mixin("prompt", PromptTuningMixin(model.config, 3))
    model.add_mixin("lora", LoraMixin(model.config, target="word_embeddings"))
    assert model.hook_origins["word_embedding_forward"] == "prompt -> lora -> default"
    randomise(model.get_mixin("lora"))
    got = model(ids)[0]
    model.get_mixin("lora").merge()
    assert_close(got, model(ids)[0], atol=1e-5, rtol=1e-5)


def test_a_patch_of_an_image_is_no_word_for_a_table_of_words():
    model = FAMILIES["vit"].build().eval()
    model.add_mixin("lora", LoraMixin(model.config, target="word_embeddings"))
    randomise(model.get_mixin("lora"))
    got = run("vit", model)
    model.get_mixin("lora").merge()
    assert_close(got, run("vit", model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_table_that_two_parts_read_takes_no_merge(part):
    model = FAMILIES["t5"].build().eval()
    owner = model.parts[part]
    owner.add_mixin("lora", LoraMixin(owner.config, target="word_embeddings"))
    with pytest.raises(HookError, match="word_embeddings, which another part reads too: merged, it would change anoth"):
        owner.get_mixin("lora").merge()


def test_samples_are_not_told_apart_among_the_tokens_of_an_expert():
    """Even where as many tokens came to it as the batch has rows."""
    model = FAMILIES["mixtral"].build().eval()
    model.add_mixin("lora", LoraMixin(model.config, target=r"mlp\.dense_h_to_4h$"))
    linear = model.transformer.layers[0].mlp.dense_h_to_4h
    kw = {"linear": linear, "name": "dense_h_to_4h", "layer_id": 0, "adapter_ids": torch.tensor([0, -1])}
    with pytest.raises(ConfigError, match="without an axis of samples"):
        model.hooks.linear_forward(torch.randn(2, model.config.hidden_size), **kw)


def test_pissa_of_more_ranks_than_a_matrix_has_is_refused():
    model = FAMILIES["mixtral"].build()
    with pytest.raises(ConfigError, match=r"init='pissa': mixins\.mlp\.gates\.0 has \d singular vectors, rank is 9 "):
        model.add_mixin("lora", LoraMixin(model.config, rank=9, init="pissa", target="gates"))
    with pytest.raises(ConfigError, match="init='pissa'.* the factor 0. Give a rank .*, and an alpha above 0"):
        model.add_mixin("lora", LoraMixin(model.config, rank=2, alpha=0, init="pissa"))


def test_a_sum_has_no_more_ranks_than_its_matrix():
    model = FAMILIES["mixtral"].build().eval()
    for name in ("a", "b"):
        model.add_mixin(name, LoraMixin(model.config, rank=5, target=["gates", "dense"]))
        randomise(model.get_mixin(name))
    together = run("mixtral", model)
    one = combine_loras(model, {"a": 1.0, "b": 1.0}, "one", rank=9)
    gate = one.get_submodule("mixins.mlp.gates.0")
    assert gate.ranks[0] == gate.out_features < 9
    exact = sum(model.get_mixin(name).get_submodule("mixins.mlp.gates.0").delta() for name in "ab")
    assert_close(gate.delta(), exact, atol=1e-5, rtol=1e-5)
    assert together.isfinite().all()


def test_a_delta_is_in_full_precision_whatever_the_default():
    model = gpt2()
    mixin = LoraMixin(model.config)
    model.add_mixin("lora", mixin)
    adapter = next(iter(randomise(mixin)._adapters.values()))
    expected = adapter.delta()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_close(adapter.delta(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_merge_in_double_precision_keeps_it():
    model = gpt2().double()
    mixin = LoraMixin(model.config, target="query_key_value.query")
    model.add_mixin("lora", mixin)
    before = model.transformer.layers[0].attention.query_key_value.weight.detach().clone()
    randomise(mixin).merge()
    after = model.transformer.layers[0].attention.query_key_value.weight
    assert torch.equal(after[32:], before[32:]) and not torch.equal(after[:32], before[:32])


def test_odd_settings_are_refused_where_they_are_given():
    config = TransformerConfig(**SIZES)
    model = BaseModel(config)
    model.add_mixin("prefix", PrefixTuningMixin(config, 2))
    with pytest.raises(HookError, match="scale is -1; the weight of a prefix cannot be below 0"):
        model.get_mixin("prefix").scale = -1
    with pytest.raises(ConfigError, match="init_token_ids is empty"):
        PromptTuningMixin(config, 2, init_token_ids=[])
    for name in ("type", "training", "v1.0", ""):
        with pytest.raises(ConfigError, match=f"a module cannot be called '{name}'"):
            TaskHeadsMixin(config, {name: 2})
    assert isinstance(model.transformer.layers[0].attention.dense, Linear)
