"""Folders that hold a fine-tune without its base."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lightning import AutoModel, mixins
from sat_lightning.checkpoint import load_adapter, load_peft, save_adapter
from sat_lightning.errors import CheckpointError, HookConflictError
from tests.families import FAMILIES, ids
from tests.methods import METHODS, build, stir


def logits(model):
    with torch.no_grad():
        return model.eval()(ids())[0]


@pytest.fixture
def saved(tmp_path):
    model, _ = build("gpt2", "adapter")
    save_adapter(model, tmp_path)
    return model, tmp_path


def test_a_folder_holds_the_adapter_and_nothing_else(saved):
    model, folder = saved
    assert {file.name for file in folder.iterdir()} == {"adapter.json", "adapter.safetensors"}
    held = load_file(folder / "adapter.safetensors")
    assert held.keys() == {name for name in model.state_dict() if name.startswith("mixins.method.")}
    values = json.loads((folder / "adapter.json").read_text())
    entry = values["mixins"][0]
    assert entry["class_path"] == "sat_lightning.mixins.adapter.AdapterMixin"
    assert entry["init_args"] == {"config": {"is": "the model's config"}, "adapter_hidden": 4}
    assert len(values["base_sha256"]) == 64


def test_it_is_built_anew_or_filled_where_it_stands(saved):
    model, folder = saved
    fresh = FAMILIES["gpt2"].build()
    assert load_adapter(fresh, folder) == ["method"]
    assert torch.equal(logits(fresh), logits(model))
    standing, names = build("gpt2", "adapter")
    stir(standing, names, seed=5)
    assert not torch.equal(logits(standing), logits(model))
    load_adapter(standing, folder)
    assert torch.equal(logits(standing), logits(model))


def test_settings_and_switches_come_back(tmp_path):
    model = FAMILIES["llama"].build()
    model.add_mixin("a", mixins.AdapterMixin(model.config, 3, is_parallel=True, places=["mlp"]))
    model.add_mixin("b", mixins.PrefixTuningMixin(model.config, 2, projection_size=4))
    stir(model, ["a", "b"])
    model.get_mixin("a").scale = 0.25
    model.get_mixin("b").disable()
    save_adapter(model, tmp_path)
    twin = FAMILIES["llama"].build()
    assert load_adapter(twin, tmp_path) == ["a", "b"]
    assert torch.equal(logits(twin), logits(model))
    for one in (twin, model):
        one.get_mixin("b").enable()
    assert torch.equal(logits(twin), logits(model))


def test_folders_of_one_recipe_are_beside_each_other_by_other_names(tmp_path):
    base, alone = FAMILIES["gpt2"].build().eval(), []
    for seed in range(2):
        model = FAMILIES["gpt2"].build()
        model.add_mixin("lora", mixins.LoraMixin(model.config, rank=2))
        model.add_mixin("lora_two", mixins.AdapterMixin(model.config, 3))
        stir(model, ["lora", "lora_two"], seed=seed)
        save_adapter(model, tmp_path / str(seed))
        model.get_mixin("lora_two").disable()
        alone.append(logits(model))
    with pytest.raises(
        CheckpointError, match=r"has no mixin 'lra', it has \['lora', 'lora_two'\].*Did you mean 'lora'"
    ):
        load_adapter(base, tmp_path / "0", names={"lra": "first"})
    with pytest.raises(CheckpointError, match="names would call two mixins 'lora_two'"):
        load_adapter(base, tmp_path / "0", names={"lora": "lora_two"})
    assert list(base.mixins) == ["gpt2-final"]
    for seed, name in enumerate(("first", "second")):
        assert load_adapter(base, tmp_path / str(seed), names={"lora": name}) == [name, "lora_two"]
    base.get_mixin("lora_two").disable()
    with torch.no_grad():
        found = base(ids(), adapter_ids=[base.get_mixin(name).adapter_id for name in ("first", "second")])[0]
    assert torch.equal(found, torch.stack([alone[0][0], alone[1][1]]))
    part = FAMILIES["t5"].build()
    part.add_mixin("decoder.lora", mixins.LoraMixin(part.decoder.config))
    stir(part, ["decoder.lora"])
    save_adapter(part, tmp_path / "part")
    other = FAMILIES["t5"].build()
    assert load_adapter(other, tmp_path / "part", names={"decoder.lora": "decoder.mine"}) == ["decoder.mine"]
    found = [FAMILIES["t5"].run(model.eval()) for model in (part, other)]
    assert torch.equal(*found)


def test_one_of_several_is_saved_by_name_and_the_others_are_no_part_of_the_base(tmp_path):
    model, _ = build("gpt2", "prefix")
    METHODS["adapter"].add(model, "second")
    stir(model, ["second"])
    save_adapter(model, tmp_path, "second")
    base = FAMILIES["gpt2"].build()
    assert load_adapter(base, tmp_path) == ["second"]
    model.del_mixin("method")
    assert torch.equal(logits(base), logits(model))


def test_what_is_trained_of_the_base_is_in_the_file_and_not_in_the_hash(tmp_path):
    model, _ = build("bert", "bitfit")
    METHODS["adapter"].add(model, "beside")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1.0)
    save_adapter(model, tmp_path, "method")
    held = load_file(tmp_path / "adapter.safetensors")
    assert held.keys() == {n for n, _ in model.named_parameters() if n.endswith("bias") and "beside" not in n}
    base = FAMILIES["bert"].build()
    load_adapter(base, tmp_path)
    model.del_mixin("beside")
    assert torch.equal(FAMILIES["bert"].run(base), FAMILIES["bert"].run(model))


def test_another_base_is_refused_and_leaves_the_model_as_it_was(saved):
    model, folder = saved
    other = FAMILIES["gpt2"].build()
    with torch.no_grad():
        other.transformer.final_layernorm.bias[0] += 1e-6
    before, origins = logits(other), other.hook_origins
    with pytest.raises(CheckpointError, match=r"was trained on another base: a GPT2Model .* SHA-256 .*checks_base"):
        load_adapter(other, folder)
    assert other.hook_origins == origins
    assert torch.equal(logits(other), before)
    load_adapter(other, folder, checks_base=False)
    assert other.hook_origins["mlp_forward"] == "method -> default"


def test_a_base_in_another_precision_takes_the_file_in_its_own(saved):
    model, folder = saved
    half = FAMILIES["gpt2"].build().to(torch.bfloat16)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(half, folder)
    save_adapter(copy.deepcopy(model).to(torch.bfloat16), folder)
    load_adapter(half, folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(half), logits(model.to(torch.bfloat16)))


def test_what_does_not_fit_is_named(saved):
    model, folder = saved
    held = load_file(folder / "adapter.safetensors")
    first, *rest = sorted(held)
    save_file({name: held[name] for name in rest} | {"mixins.method.odd": held[first]}, folder / "adapter.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"missing {first}, unexpected mixins.method.odd"):
        load_adapter(model, folder)
    wrong = FAMILIES["gpt2"].build()
    wrong.add_mixin("method", mixins.AdapterMixin(wrong.config, 5))
    save_file(held, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="'method' was saved with adapter_hidden=4, the model's has 5"):
        load_adapter(wrong, folder)
    with pytest.raises(CheckpointError, match=r"is \[4, 32\], the model has \[4, 16\]"):
        load_adapter(FAMILIES["gpt2"].build(hidden_size=16), folder)
    other = FAMILIES["gpt2"].build()
    other.add_mixin("method", mixins.FFADDMixin(other.config, 4))
    with pytest.raises(CheckpointError, match=r"'method' is a .*AdapterMixin, the model has a .*FFADDMixin"):
        load_adapter(other, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_taken_seam_and_missing_things_say_the_cure(tmp_path):
    model = FAMILIES["gpt2"].build()
    with pytest.raises(CheckpointError, match="no method of fine-tuning and no head"):
        save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="adapter.json: there is no such file"):
        load_adapter(model, tmp_path)
    METHODS["mlp-head"].add(model)
    with pytest.raises(CheckpointError, match="No mixin is named 'methd'.*Did you mean 'method'"):
        save_adapter(model, tmp_path, "methd")
    save_adapter(model, tmp_path)
    fresh = FAMILIES["gpt2"].build()
    with pytest.raises(HookConflictError, match=r"Call del_mixin\('gpt2-final'\) first"):
        load_adapter(fresh, tmp_path)
    fresh.del_mixin("gpt2-final")
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    values = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(values | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="format_version 9, this program reads 1"):
        load_adapter(fresh, tmp_path)


def test_settings_by_which_the_same_weights_do_something_else_are_refused(tmp_path):
    model = FAMILIES["gpt2"].build()
    model.add_mixin("lora", mixins.LoraMixin(model.config, alpha=32.0, dropout=0.1))
    stir(model, ["lora"])
    save_adapter(model, tmp_path)
    same = FAMILIES["gpt2"].build()
    same.add_mixin("lora", mixins.LoraMixin(same.config, rank=8, alpha=32, dropout=0.3))
    load_adapter(same, tmp_path)
    assert torch.equal(logits(same), logits(model))
    other = FAMILIES["gpt2"].build()
    other.add_mixin("lora", mixins.LoraMixin(other.config))
    before = logits(other)
    with pytest.raises(CheckpointError, match=r"'lora' was saved with alpha=32\.0, the model's has 16\.0\. Remove it"):
        load_adapter(other, tmp_path)
    assert torch.equal(logits(other), before)
    model.del_mixin("lora")
    model.add_mixin("dora", mixins.DoraMixin(model.config, alpha=4.0))
    save_adapter(model, tmp_path)
    other.del_mixin("lora")
    other.add_mixin("dora", mixins.DoraMixin(other.config))
    with pytest.raises(CheckpointError, match=r"'dora' was saved with alpha=4\.0, the model's has 16\.0"):
        load_adapter(other, tmp_path)
    model.get_mixin("dora").scale = 0.5
    save_adapter(model, tmp_path)
    other.del_mixin("dora")
    other.add_mixin("dora", mixins.DoraMixin(other.config, alpha=4.0))
    with pytest.raises(CheckpointError, match=r"'dora' was saved with scale=0\.5, the model's has 1\.0"):
        load_adapter(other, tmp_path)


def test_a_folder_of_the_other_kind_names_the_call_that_reads_it(saved, tmp_path_factory):
    model, folder = saved
    theirs = tmp_path_factory.mktemp("theirs")
    (theirs / "adapter_config.json").write_text("{}")
    (theirs / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is an adapter\. .*then call load_adapter\(model, folder\).* merge`"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"is an adapter\. .*then call load_peft\(model, folder\)"):
        AutoModel.from_pretrained(theirs)
    with pytest.raises(CheckpointError, match=r"It is an adapter of PEFT's: call load_peft\."):
        load_adapter(model, theirs)
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json\. It is one of ours: call load_adapter\."):
        load_peft(model, folder)
