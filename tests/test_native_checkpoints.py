"""Our own folders: mixins come back from them alone, and what differs is listed, allowed by name, or refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lightning import AutoModel, BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.checkpoint import load_checkpoint, save_pretrained
from sat_lightning.checkpoint.building import NoRandomFill
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.mixins import LMHeadMixin
from sat_lightning.models import DistillModel, EncoderDecoderModel, GPT2Model, T5Model

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=16)
IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


class Scale(BaseMixin):
    """A user's mixin with settings of every kind that a file can hold."""

    def __init__(self, config, factors=(1.0,), *rest, dtype=torch.float32, table=None):
        super().__init__()
        self.settings = (tuple(factors), rest, dtype, table)
        self.scale = torch.nn.Parameter(torch.zeros(config.hidden_size))

    @non_conflict
    def mlp_forward(self, hidden_states, old_impl=None, **kw):
        return old_impl(hidden_states, **kw) * (1 + self.scale)

    def reinit(self, parent_model=None):
        torch.nn.init.constant_(self.scale, 7.0)


class Wraps(BaseMixin):
    """A model inside a mixin."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @non_conflict
    def final_forward(self, logits, old_impl=None, **kw):
        return old_impl(logits, **kw) + self.inner(IDS[:, : logits.shape[1]])[0].mean()


def fill(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_methods_and_functions_are_the_same_thing(tmp_path):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    again = GPT2Model.from_pretrained(tmp_path)
    assert type(again) is GPT2Model and not again.training
    assert_same(again.state_dict(), model.state_dict())
    assert str(again.load_report) == "29 tensors loaded"
    other = BaseModel.from_pretrained(tmp_path, ignore="mixins.gpt2-final.*")
    assert type(other) is BaseModel and other.config.hidden_size == 32
    assert other.load_report.unexpected == ("mixins.gpt2-final.lm_head.weight",)


def test_a_fresh_process_needs_only_the_model_classes(tmp_path):
    fill(GPT2Model(TINY)).save_pretrained(tmp_path)
    code = (
        "import sys; from sat_lightning.models import GPT2Model; assert 'sat_lightning.checkpoint' not in sys.modules;"
        f"m = GPT2Model.from_pretrained({str(tmp_path)!r}); print(type(m).__name__, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert found.stdout.split() == ["GPT2Model", "False"], found.stderr


def test_mixins_are_rebuilt_in_order_with_their_settings(tmp_path):
    model = GPT2Model(TINY)
    model.add_mixin("first", Scale(model.config, [1.5, 2.0], "x", dtype=torch.float64, table={"a": [1, None]}))
    model.del_mixin("gpt2-final")
    model.add_mixin("second", Scale(model.config))
    model.add_mixin("head", LMHeadMixin(model.config))
    fill(model).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "model_config.json").read_text())
    assert values["removed_mixins"] == ["gpt2-final"]
    assert [entry["name"] for entry in values["added_mixins"]] == ["first", "second", "head"]
    again = AutoModel.from_pretrained(tmp_path)
    assert list(again.mixins) == ["first", "second", "head"]
    assert again.get_mixin("first").settings == ((1.5, 2.0), ("x",), torch.float64, {"a": [1, None]})
    assert again.hook_origins == model.hook_origins
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model_config.json").read_bytes() == (tmp_path / "model_config.json").read_bytes()


def test_a_model_inside_a_mixin_and_models_of_models_come_back(tmp_path):
    outer = BaseModel(TINY)
    inner = GPT2Model(TINY.replace(num_layers=1))
    inner.add_mixin("scale", Scale(inner.config))
    outer.add_mixin("wraps", Wraps(inner))
    fill(outer).save_pretrained(tmp_path / "nested")
    again = AutoModel.from_pretrained(tmp_path / "nested")
    assert list(again.get_mixin("wraps").inner.mixins) == ["gpt2-final", "scale"]
    assert torch.equal(again(IDS)[0], outer(IDS)[0])

    student = GPT2Model(TINY.replace(num_layers=1))
    student.add_mixin("scale", Scale(student.config))
    both = fill(DistillModel(GPT2Model(TINY), student))
    both.save_pretrained(tmp_path / "both")
    again = AutoModel.from_pretrained(tmp_path / "both")
    assert type(again) is DistillModel and list(again.student.mixins) == ["gpt2-final", "scale"]
    kwargs = ({"input_ids": IDS}, {"input_ids": IDS})
    for one, other in zip(again(*kwargs), both(*kwargs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_class", [EncoderDecoderModel, T5Model])
def test_composed_models_keep_their_ties(tmp_path, model_class):
    model = model_class(model_class.config_class(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50))
    model.add_mixin("decoder.scale", Scale(model.decoder.config))
    fill(model).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    table = again.encoder.transformer.word_embeddings.weight
    assert again.decoder.transformer.word_embeddings.weight is table
    assert list(again.decoder.mixins) == list(model.decoder.mixins)
    assert_same(again.state_dict(), model.state_dict())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.transformer.word_embeddings.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="word_embeddings.weight' differ, and are one tensor in the model"):
        AutoModel.from_pretrained(tmp_path)


def test_a_mixin_that_no_file_can_hold_or_nobody_imported_says_the_cure(tmp_path):
    model = GPT2Model(TINY)
    model.add_mixin("odd", Scale(model.config, table=lambda: 0))
    save_pretrained(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"mixin 'odd' .*Scale\) was built with a function, which no file can hold"
    ):
        AutoModel.from_pretrained(tmp_path)
    model.del_mixin("odd")
    model.add_mixin("scale", Scale(model.config))
    save_pretrained(model, tmp_path)
    file = tmp_path / "model_config.json"
    for path in ("antigravity.Scale", "os.system", "sat_lightning.errors.SatError"):
        file.write_text(file.read_text().replace(f"{Scale.__module__}.Scale", path))
        with pytest.raises(CheckpointError, match=f"mixin 'scale' is a {path}, which is not loaded. Import"):
            AutoModel.from_pretrained(tmp_path)
        file.write_text(file.read_text().replace(path, f"{Scale.__module__}.Scale"))
    assert "antigravity" not in sys.modules


def test_format_versions(tmp_path):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model_config.json"
    values = json.loads(file.read_text())
    for key in ("format_version", "added_mixins", "removed_mixins"):
        values.pop(key)
    file.write_text(json.dumps(values))  # as version 0 wrote it
    assert_same(AutoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    file.write_text(json.dumps(values | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="has format version 9, this sat_lightning reads up to 1. Upgrade it"):
        AutoModel.from_pretrained(tmp_path)


def test_large_weights_are_written_in_shards_and_stale_files_go(tmp_path):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in model.state_dict().values())
    assert_same(AutoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    (tmp_path / shards[1]).rename(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"names '{shards[1]}', and there is no such file"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "x").unlink()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "model_config.json"]


class Head(GPT2Model):
    """A user's class: another head, and a mixin that no checkpoint has."""

    def __init__(self, config, transformer=None, **kwargs):
        super().__init__(config, transformer=transformer, **kwargs)
        self.del_mixin("gpt2-final")
        self.add_mixin("scale", Scale(self.config))


def test_missing_mixins_are_initialised_on_request_and_only_those(tmp_path):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="missing mixins.scale.scale, unexpected mixins.gpt2-final.lm_head.weight"
    ):
        Head.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing nothing, unexpected mixins.gpt2-final"):
        Head.from_pretrained(tmp_path, reinit="scale")
    for reinit in ("scale", True, ["scale"]):
        tuned = Head.from_pretrained(tmp_path, reinit=reinit, ignore=["mixins.gpt2-final.*"])
        assert tuned.load_report.reinitialised == ("scale",)
        assert tuned.load_report.missing == ("mixins.scale.scale",)
        assert (tuned.get_mixin("scale").scale == 7).all()
    assert torch.equal(tuned.transformer.word_embeddings.weight, model.transformer.word_embeddings.weight)
    tuned.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        tuned.get_mixin("scale").scale.fill_(3)
    tuned.save_pretrained(tmp_path / "tuned")
    kept = Head.from_pretrained(tmp_path / "tuned", reinit=True)
    assert kept.load_report.reinitialised == () and (kept.get_mixin("scale").scale == 3).all()
    torch.manual_seed(5)
    initial = Head(TINY).get_mixin("scale").scale
    kept = Head.from_pretrained(tmp_path, may_miss="mixins.scale.*", ignore="mixins.gpt2-final.*")
    assert torch.equal(kept.get_mixin("scale").scale, initial)


def test_overrides_that_change_shapes_are_listed_by_name(tmp_path):
    fill(GPT2Model(TINY)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is \[50, 32\], the model has \[60, 32\]. .* may_mismatch .* resize_vocab"
    ):
        GPT2Model.from_pretrained(tmp_path, vocab_size=60)
    names = ("transformer.word_embeddings.weight", "mixins.gpt2-final.lm_head.weight")
    model = GPT2Model.from_pretrained(tmp_path, vocab_size=60, may_mismatch=names)
    assert set(model.load_report.mismatched) == set(names)
    assert 0.001 < model.transformer.word_embeddings.weight.std() < 0.05  # drawn, not left as it was allocated
    with pytest.raises(CheckpointError, match="missing transformer.layers.2"):
        GPT2Model.from_pretrained(tmp_path, num_layers=3)
    deeper = GPT2Model.from_pretrained(tmp_path, num_layers=3, may_miss="transformer.layers.2.*")
    assert all(name.startswith("transformer.layers.2.") for name in deeper.load_report.missing)
    with pytest.raises(ConfigError, match="'vocab_sise' is neither an argument .*Did you mean 'vocab_size'?"):
        GPT2Model.from_pretrained(tmp_path, vocab_sise=60)
    built = GPT2Model.from_pretrained(tmp_path, build_only=True, num_layers=1)
    assert built.load_report is None and built.config.num_layers == 1


@pytest.mark.parametrize("how", ["mean", "zeros", "initial"])
def test_the_vocabulary_is_padded_and_cut_by_rule(tmp_path, how):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    padded = GPT2Model.from_pretrained(tmp_path, make_vocab_size_divisible_by=64, resize_vocab=how)
    assert padded.config.vocab_size == 64
    assert torch.equal(padded(IDS)[0][..., :50], model(IDS)[0])
    for name in ("transformer.word_embeddings.weight", "mixins.gpt2-final.lm_head.weight"):
        old, new = model.state_dict()[name], padded.state_dict()[name]
        assert torch.equal(new[:50], old)
        if how == "mean":
            torch.testing.assert_close(new[50:], old.mean(0).expand(14, 32))
        else:
            assert (new[50:] == 0).all() if how == "zeros" else new[50:].std() > 0.005
    padded.save_pretrained(tmp_path / "padded")
    back = GPT2Model.from_pretrained(tmp_path / "padded", vocab_size=50, resize_vocab="zeros")
    assert_same(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("how", ["interpolate", "repeat", "initial"])
def test_the_position_table_is_extended_by_rule(tmp_path, how):
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    longer = GPT2Model.from_pretrained(tmp_path, max_sequence_length=31, resize_positions=how)
    old, new = model.transformer.position_embeddings.weight, longer.transformer.position_embeddings.weight
    assert new.shape == (31, 32)
    if how == "interpolate":
        torch.testing.assert_close(new[::2], old)
        torch.testing.assert_close(new[1], (old[0] + old[1]) / 2)
    else:
        assert torch.equal(new[:16], old)
        assert torch.equal(new[16:], old[:15]) if how == "repeat" else new[16:].std() > 0.005
    with pytest.raises(CheckpointError, match="position_embeddings.weight' is .* ask for resize_vocab or resize_pos"):
        GPT2Model.from_pretrained(tmp_path, max_sequence_length=31)


@pytest.mark.parametrize(("asked", "found"), [(None, torch.float32), ("auto", torch.bfloat16), (torch.float16, None)])
def test_the_dtype_is_the_models_the_files_or_the_one_asked_for(tmp_path, asked, found):
    model = fill(GPT2Model(TINY.replace(is_rotary_emb=True))).bfloat16()
    model.save_pretrained(tmp_path)
    again = GPT2Model.from_pretrained(tmp_path, dtype=asked)
    assert {p.dtype for p in again.parameters()} == {found or asked}
    assert torch.equal(
        again.get_mixin("gpt2-final").lm_head.weight.bfloat16(), model.get_mixin("gpt2-final").lm_head.weight
    )


def test_building_for_a_file_draws_nothing_and_shared_memory_stays_shared(tmp_path):
    model = fill(GPT2Model(TINY))
    table = model.transformer.word_embeddings.weight
    model.get_mixin("gpt2-final").lm_head.weight = torch.nn.Parameter(table.data)  # two parameters, one memory
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with NoRandomFill():
        GPT2Model(TINY)
    AutoModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    other = GPT2Model(TINY)
    weight = other.transformer.word_embeddings.weight
    other.get_mixin("gpt2-final").lm_head.weight = torch.nn.Parameter(weight.data)
    load_checkpoint(other, tmp_path)
    assert other.transformer.word_embeddings.weight is weight and torch.equal(weight, table)
    assert other.get_mixin("gpt2-final").lm_head.weight.data_ptr() == weight.data_ptr()


def test_a_loaded_model_is_its_own(tmp_path):
    """Parameters may map the file; neither training nor saving over it disturbs anybody."""
    model = fill(GPT2Model(TINY))
    model.save_pretrained(tmp_path)
    one, two = AutoModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1)
    assert_same(two.state_dict(), model.state_dict())
    one.save_pretrained(tmp_path)
    assert_same(two.state_dict(), model.state_dict())
    assert_same(AutoModel.from_pretrained(tmp_path).state_dict(), one.state_dict())
