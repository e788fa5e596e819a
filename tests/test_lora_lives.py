"""The life of adapters: numbers that files keep, one model for one method, and no loading under a merge."""

import copy

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint import load_adapter, save_adapter
from sat_lightning.errors import CheckpointError, ConfigError, HookError, InputError
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin
from tests.families import FAMILIES
from tests.test_lora import gpt2, randomise, run


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_numbers_of_adapters_outlive_a_file_where_one_was_removed(kind, tmp_path):
    model = gpt2()
    for name in ("gone", "one", "two"):
        model.add_mixin(name, LoraMixin(model.config, rank=2))
        torch.manual_seed(len(name) + ord(name[0]))
        with torch.no_grad():
            [parameter.normal_(std=0.2) for parameter in model.get_mixin(name).parameters()]
    model.del_mixin("gone")
    if kind == "folder":
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path)
        again = gpt2()
        load_adapter(again, tmp_path)
    assert [again.get_mixin(name).adapter_id for name in ("one", "two")] == [1, 2]
    inputs = {"input_ids": torch.arange(18).view(3, 6), "adapter_ids": torch.tensor([1, 2, -1])}
    assert torch.equal(model(**inputs)[0], again(**inputs)[0])
    again.add_mixin("next", LoraMixin(again.config))
    assert again.get_mixin("next").adapter_id == 3
    if kind == "adapter":  # a number that is taken is given to nobody else
        crowd = gpt2()
        for name in ("a", "b"):
            crowd.add_mixin(name, LoraMixin(crowd.config))
        load_adapter(crowd, tmp_path)
        assert [crowd.get_mixin(name).adapter_id for name in ("one", "two")] == [2, 3]


def test_numbers_of_adapters_may_be_a_list_and_are_one_a_sample():
    model = gpt2()
    model.add_mixin("lora", LoraMixin(model.config))
    randomise(model.get_mixin("lora"))
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids, adapter_ids=[0, -1])[0], model(ids, adapter_ids=torch.tensor([0, -1]))[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, adapter_ids=[-1, 0])[0], model(ids, adapter_ids=[-1, 0])[0])
    with pytest.raises(InputError, match=r"adapter_ids has the shape \[3\], and layers.0.attention.* 2 samples"):
        model(ids, adapter_ids=[0, 0, -1])


@pytest.mark.parametrize("make", [LoraMixin, IA3Mixin])
def test_one_method_is_in_one_model_and_a_copy_of_it_in_another(make):
    """In two, it would silently leave the first."""
    model, other = gpt2(), gpt2()
    mixin = make(model.config)
    model.add_mixin("tuned", mixin)
    randomise(mixin)
    tuned = run("gpt2", model)
    with pytest.raises(HookError, match=r"'again' is in a GPT2Model already, as 'tuned'.*copy\.deepcopy"):
        other.add_mixin("again", mixin)
    with pytest.raises(HookError, match="'again' is in a GPT2Model already"):
        model.add_mixin("again", mixin)
    assert torch.equal(run("gpt2", model), tuned) and "again" not in model.mixins
    twin = copy.deepcopy(mixin)
    assert twin._owner is None and not any(isinstance(value, torch.nn.Linear) for value in vars(twin).values())
    assert mixin._owner is model
    other.add_mixin("twin", twin)
    assert torch.equal(run("gpt2", other), tuned)
    model.del_mixin("tuned")
    third = gpt2()
    third.add_mixin("moved", mixin)
    assert torch.equal(run("gpt2", third), tuned)


def test_weights_are_not_loaded_under_a_merged_method():
    """The forward would be that of the base alone, without a word."""
    model = gpt2()
    mixin = LoraMixin(model.config)
    model.add_mixin("lora", mixin)
    randomise(mixin)
    saved = copy.deepcopy(model.state_dict())
    mixin.merge()
    merged = run("gpt2", model)
    with pytest.raises(
        CheckpointError, match=r"'mixins.lora' is merged: what is loaded would be left out.*unmerge\(\)"
    ):
        model.load_state_dict(saved)
    assert torch.equal(run("gpt2", model), merged)
    with pytest.raises(HookError, match="This LoraMixin is merged already.$"):
        mixin.merge()
    mixin.unmerge()
    model.load_state_dict(saved)
    mixin.disable()
    with pytest.raises(HookError, match=r"This LoraMixin is disabled: call enable\(\) first.$"):
        mixin.merge()
    with pytest.raises(HookError, match="This LoraMixin is not added to a model.$"):
        LoraMixin(model.config).merge()


def test_no_target_is_refused():
    model = gpt2()
    with pytest.raises(ConfigError, match=r"target is empty: name at least one linear"):
        model.add_mixin("lora", LoraMixin(model.config, target=[]))


@pytest.mark.parametrize("make", [LoraMixin, DoraMixin, IA3Mixin])
def test_samples_are_told_apart_where_padding_is_left_out(make):
    model = FAMILIES["bert"].build().eval()
    model.add_mixin("one", make(model.config, target="layers"))
    randomise(model.get_mixin("one"))
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 5:], mask[2, 2:] = False, False
    call = {"attention_mask": mask[:, None, None], "adapter_ids": torch.tensor([0, -1, 0])}
    ids = torch.arange(24).view(3, 8)
    whole = model(ids, **call)[0]
    found = model(ids, **call, token_indices=mask.flatten().nonzero()[:, 0])[0]
    assert_close(found[mask], whole[mask], atol=1e-5, rtol=1e-5)
    assert (model(ids, attention_mask=call["attention_mask"])[0] - whole)[1].abs().max() > 1e-3
    with pytest.raises(InputError, match="one number for each of the 3 samples"):
        model(ids, **(call | {"adapter_ids": [0]}), token_indices=mask.flatten().nonzero()[:, 0])
