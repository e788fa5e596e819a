"""SAT's checkpoints in and out: runs, steps, partitions, training files, and the formats before its changes."""

import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from sat_lightning import AutoModel, BaseModel, TransformerConfig
from sat_lightning.checkpoint import load_checkpoint, save_sat
from sat_lightning.checkpoint.files import read_torch_file
from sat_lightning.checkpoint.partition import MergedTensors, split_tensors
from sat_lightning.errors import CheckpointError
from sat_lightning.models import GPT2Model
from tests.golden_cases import GOLDEN, Case

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=1040, max_sequence_length=16)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = GPT2Model(TINY).eval()
    save_sat(model, tmp_path / "run", step=300)
    return model, tmp_path / "run"


def test_a_run_a_step_and_a_file_are_read(saved):
    model, run = saved
    assert (run / "latest").read_text() == "300"
    assert sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()) == [
        "300/mp_rank_00_model_states.pt", "latest", "model_config.json",
    ]  # fmt: skip
    for path in (run, run / "300", run / "300" / "mp_rank_00_model_states.pt", str(run)):
        again = AutoModel.from_pretrained(path)
        assert type(again) is GPT2Model and not again.training
        assert_same(again.state_dict(), model.state_dict())


def test_step_latest_and_release_choose_the_step(saved):
    model, run = saved
    first = state_of(model)
    with torch.no_grad():
        model.transformer.word_embeddings.weight += 1
    save_sat(model, run, step=400)
    assert_same(AutoModel.from_pretrained(run).state_dict(), model.state_dict())
    assert_same(AutoModel.from_pretrained(run, step=300).state_dict(), first)
    with torch.no_grad():
        model.transformer.word_embeddings.weight += 1
    save_sat(model, run, step="release")
    assert (run / "latest").read_text() == "release"
    assert_same(AutoModel.from_pretrained(run).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"step '500', and .* has the steps \['300', '400', 'release'\]"):
        AutoModel.from_pretrained(run, step=500)
    (run / "latest").write_text("500")
    with pytest.raises(CheckpointError, match="latest says '500', and .* has the steps"):
        AutoModel.from_pretrained(run)
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match="has no file 'latest'; its steps are .* Pass step"):
        AutoModel.from_pretrained(run)
    with pytest.raises(CheckpointError, match="step is 'last', SAT reads a positive number, or 'release'"):
        save_sat(model, run, step="last")


def test_paths_in_the_configuration_are_relative_to_the_folder(saved):
    _, run = saved
    config = (run / "model_config.json").read_text()
    (run / "model_config.json").write_text(config.replace("{", '{"tokenizer_path": "words/t.json",', 1))
    model = AutoModel.from_pretrained(run)
    assert model.config.extra["tokenizer_path"] == os.path.join(run, "words/t.json")


@pytest.mark.parametrize("name", ["ckpt_train_style", "mp2_gpt2"])
def test_a_training_checkpoint_and_partitions_of_sat_equal_the_record(name):
    case = Case(name)
    case.check()
    assert case.model.config.model_parallel_size == 1


def test_our_cut_is_the_one_sat_makes():
    case = Case("mp2_gpt2")
    whole, config = case.model.state_dict(), case.model.config
    for rank in range(2):
        theirs = read_torch_file(GOLDEN / f"mp2_gpt2/checkpoint/1/mp_rank_{rank:02d}_model_states.pt")["module"]
        ours = split_tensors(whole, config, "GPT2Model", rank, 2)
        assert list(ours) == list(theirs)
        assert_same(ours, theirs)


FORMS = {
    "gpt2": (GPT2Model, TINY),
    "grouped": (
        BaseModel,
        TINY.replace(
            num_multi_query_heads=4, num_attention_heads=8, is_gated_mlp=True, use_bias=False, use_qkv_bias=True
        ),
    ),
    "decoder": (BaseModel, TINY.replace(is_decoder=True, cross_attn_hidden_size=24, layernorm_order="sandwich")),
    "experts": (BaseModel, TINY.replace(num_experts=3, is_gated_mlp=True, is_rotary_emb=True)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [2, 4])
def test_partitions_of_any_size_come_back_whole(tmp_path, form, count):
    model_class, config = FORMS[form]
    model = model_class(config)
    save_sat(model, tmp_path, model_parallel_size=count)
    files = sorted(tmp_path.glob("1/*.pt"))
    assert len(files) == count
    assert sum(f.stat().st_size for f in files[:1]) < 0.75 * sum(p.numel() * 4 for p in model.parameters())
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.to_dict(model_class="x") == model.config.to_dict(model_class="x")
    assert_same(again.state_dict(), model.state_dict())
    save_sat(again, tmp_path, model_parallel_size=1)  # fewer partitions than lie there
    assert [f.name for f in tmp_path.glob("1/*")] == ["mp_rank_00_model_states.pt"]
    assert_same(AutoModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_size_that_cannot_be_cut_and_a_missing_rank_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="num_attention_heads 4 is not divisible by 3 partitions"):
        save_sat(GPT2Model(TINY), tmp_path, model_parallel_size=3)
    odd = GPT2Model(TINY.replace(vocab_size=1041))
    with pytest.raises(
        CheckpointError, match="word_embeddings.weight' has 1041 entries .* 2 partitions .* pad the voc"
    ):
        save_sat(odd, tmp_path, model_parallel_size=2)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp"))
    save_sat(GPT2Model(TINY), tmp_path, model_parallel_size=4)
    (tmp_path / "1" / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks mp_rank_02_model_states.pt of its partitions"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="ranks 0 and 1 do not hold the same tensors"):
        MergedTensors([{"a": torch.ones(1)}, {"b": torch.ones(1)}], TINY, "GPT2Model", "x")


class Runs:
    def __reduce__(self):
        return (os.system, ("echo run > ran.txt",))


def test_a_malicious_pickle_is_refused_and_does_not_run(saved, tmp_path, monkeypatch):
    _, run = saved
    monkeypatch.chdir(tmp_path)
    torch.save({"module": {}, "args": Runs()}, run / "300" / "mp_rank_00_model_states.pt")
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00_model_states.pt: refused, as it asks for posix.system, .* run code"
    ):
        AutoModel.from_pretrained(run)
    with open(run / "300" / "mp_rank_00_model_states.pt", "wb") as file:
        pickle.dump({"module": Runs()}, file)
    with pytest.raises(CheckpointError, match="is no file of torch.save"):
        AutoModel.from_pretrained(run)
    (run / "300" / "mp_rank_00_model_states.pt").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        AutoModel.from_pretrained(run)
    assert str(caught.value).endswith("is no file of torch.save. Copy or save it again.")
    assert not (tmp_path / "ran.txt").exists()


def test_truncated_and_foreign_files_are_named(saved):
    model, run = saved
    file = run / "300" / "mp_rank_00_model_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is no whole file of torch.save"):
        AutoModel.from_pretrained(run)
    torch.save({"optimizer": {"step": 1}}, file)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        AutoModel.from_pretrained(run)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        AutoModel.from_pretrained(run)
    (run / "300" / "z3_rank_00_model_states.pt").write_bytes(b"")
    file.unlink()
    with pytest.raises(CheckpointError, match="holds ZeRO-3 partitions"):
        AutoModel.from_pretrained(run)
    assert zipfile.is_zipfile(run / "model_config.json") is False
    (run / "model_config.json").unlink()
    torch.save({"module": model.state_dict()}, file)
    with pytest.raises(CheckpointError, match="comes without model_config.json, so its architecture is unknown"):
        AutoModel.from_pretrained(run)
    assert len(load_checkpoint(model, run).loaded) == len(model.state_dict())


def write_legacy(run, rename):
    file = run / "300" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)["module"]
    torch.save({"module": {rename(name): tensor for name, tensor in state.items()}}, file)


def test_numbered_mixins_and_a_table_outside_are_migrated_with_a_report(saved):
    model, run = saved
    names = {"transformer.word_embeddings.weight": "word_embeddings.weight"}
    write_legacy(run, lambda n: names.get(n, n).replace("mixins.gpt2-final", "mixins.0"))
    again = AutoModel.from_pretrained(run)
    assert_same(again.state_dict(), model.state_dict())
    assert again.load_report.renamed == (
        "word_embeddings.weight -> transformer.word_embeddings.weight",
        "mixins.0.* -> mixins.gpt2-final.*",
    )
    assert "2 renamed: word_embeddings.weight -> transf" in str(again.load_report)


def test_numbered_mixins_that_fit_nothing_or_too_much_need_the_name(saved):
    model, run = saved
    write_legacy(run, lambda n: n.replace("mixins.gpt2-final.lm_head", "mixins.0.head"))
    with pytest.raises(CheckpointError, match=r'mixins.0 .* fits none of gpt2-final. .* mixin_names={0: "gpt2-final"}'):
        AutoModel.from_pretrained(run)
    write_legacy(run, lambda n: n.replace("mixins.0.head", "mixins.0.lm_head"))
    from sat_lightning.mixins import LMHeadMixin

    two = GPT2Model(TINY)
    two.del_mixin("gpt2-final")
    two.add_mixin("a", LMHeadMixin(TINY))
    with pytest.raises(Exception, match="a"):
        two.add_mixin("b", LMHeadMixin(TINY))
    report = load_checkpoint(two, run, mixin_names={0: "a"})
    assert report.renamed == ("mixins.0.* -> mixins.a.*",)


def test_the_interleaved_layout_is_read_on_request(saved):
    model, run = saved
    file = run / "300" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)["module"]
    for name, tensor in state.items():
        if "query_key_value" in name:  # [q|k|v] -> q0 k0 v0 q1 ...
            state[name] = tensor.unflatten(0, (3, 4, 8)).transpose(0, 1).flatten(0, 2).contiguous()
    torch.save({"module": state}, file)
    again = AutoModel.from_pretrained(run, interleaved_qkv=True)
    assert_same(again.state_dict(), model.state_dict())
    assert again.load_report.renamed == ("query_key_value: head by head -> [q|k|v]",)


def test_a_prefix_reads_one_part(saved):
    model, run = saved
    write_legacy(run, lambda n: f"encoder.{n}")
    assert_same(AutoModel.from_pretrained(run, prefix="encoder.").state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"no name begins with 'decoder\.'; the first is 'encoder\."):
        AutoModel.from_pretrained(run, prefix="decoder.")


PEAK = """
import sys, resource, torch
from pathlib import Path
from sat_lightning import TransformerConfig
from sat_lightning.checkpoint.sat import open_sat, write_sat
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
class Watched(dict):
    def __init__(self, inner): self.inner, self.peak = inner, 0
    def keys(self): return self.inner.keys()
    def __iter__(self): return iter(self.inner)
    def __getitem__(self, name):
        self.peak = max(self.peak, anonymous()); return self.inner[name]
source, target, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = TransformerConfig(num_layers=8, hidden_size=512, num_attention_heads=8, vocab_size=8192)
start = anonymous()
tensors = Watched(open_sat(Path(source), config, "BaseModel"))
values = config.replace(model_parallel_size=count).to_dict(model_class="BaseModel")
write_sat(tensors, config.replace(model_parallel_size=count), values, Path(target), 1)
print(tensors.peak - start)
"""


@pytest.mark.slow
def test_recutting_streams(tmp_path):
    config = TransformerConfig(
        num_layers=8, hidden_size=512, num_attention_heads=8, vocab_size=8192, max_sequence_length=64
    )
    save_sat(BaseModel(config), tmp_path / "two", model_parallel_size=2)
    shard = max(f.stat().st_size for f in tmp_path.rglob("*.pt"))
    for source, target, count in (("two", "four", 4), ("four", "two", 2)):
        words = [sys.executable, "-c", PEAK, str(tmp_path / source), str(tmp_path / target), str(count)]
        found = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, found.stderr
        assert int(found.stdout) < 2 * shard, (int(found.stdout), shard)


def test_mixins_come_back_from_a_sat_folder_of_ours(tmp_path):
    """SAT records none; our folders do, in keys that it passes over."""
    from sat_lightning.mixins import LMHeadMixin

    model = GPT2Model(TINY)
    model.del_mixin("gpt2-final")
    model.add_mixin("head", LMHeadMixin(model.config))
    save_sat(model, tmp_path, model_parallel_size=2)
    again = AutoModel.from_pretrained(tmp_path)
    assert list(again.mixins) == ["head"]
    assert_same(again.state_dict(), model.state_dict())
