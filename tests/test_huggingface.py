"""Hugging Face both ways: equal outputs, every byte back, and nothing read or left unread in silence."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lightning import AutoModel, BaseModel, TransformerConfig
from sat_lightning.checkpoint import save_huggingface
from sat_lightning.checkpoint.keymap import plan_export, plan_import
from sat_lightning.cli import main
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.model.keymap import (
    Chain,
    Copies,
    Each,
    Fused,
    Inverse,
    KeyMap,
    Reordered,
    Rule,
    Same,
    Squeeze,
    Stacked,
    Transpose,
    blocks_from_heads,
    require,
    rotary_halves_from_pairs,
)
from sat_lightning.models import GPT2Model
from tests.hf_parity import check_parity, randomise

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))


def make_gpt2(is_tied=True, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=36, n_head=3, n_inner=48, vocab_size=97, n_positions=24, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=is_tied, attn_implementation="eager", **changes,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    randomise(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def assert_same_bytes(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("is_tied", [False, True])
def test_gpt2_equals_hugging_face_and_comes_back(is_tied):
    check_parity(make_gpt2(is_tied), {"input_ids": IDS}, lambda out: out.logits)


def test_a_folder_is_read_and_written_back_byte_by_byte(folder, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ours = AutoModel.from_pretrained(folder)
    assert type(ours) is GPT2Model and type(GPT2Model.from_pretrained(folder)) is GPT2Model
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "native")
    AutoModel.from_pretrained(tmp_path / "native")
    for model in (ours, AutoModel.from_pretrained(tmp_path / "native")):
        save_huggingface(model, tmp_path / "back")
        assert_same_bytes(load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
        written = json.loads((tmp_path / "back" / "config.json").read_text())
        assert written == json.loads((folder / "config.json").read_text())


def test_shards_and_bin_files_are_read(folder, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    expected = AutoModel.from_pretrained(folder).state_dict()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_bytes(AutoModel.from_pretrained(tmp_path / "shards").state_dict(), expected)
    for name, state in (("bin", theirs.state_dict()), ("old", theirs.state_dict())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
        torch.save(state, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=name == "bin")
        assert_same_bytes(AutoModel.from_pretrained(tmp_path / name).state_dict(), expected)


def test_what_old_files_carry_is_understood_and_written_back(folder, tmp_path):
    """The bare model's names, causal masks as buffers, a tied head written twice."""
    state = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24).to(torch.uint8)
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    ours = AutoModel.from_pretrained(folder)
    save_huggingface(ours, tmp_path / "back")
    assert_same_bytes(old, load_file(tmp_path / "back" / "model.safetensors"))
    old["h.1.attn.bias"][0, 0, 3, 3] = 0
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"attn.bias' is not what the configuration makes of it"):
        AutoModel.from_pretrained(folder)
    old["h.1.attn.bias"][0, 0, 3, 3] = 1
    old["lm_head.weight"] += 1
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'lm_head.weight' and 'transformer.wte.weight' differ, though its"):
        AutoModel.from_pretrained(folder)


def test_a_head_that_was_trained_apart_unties_the_folder(folder, tmp_path):
    ours = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        ours.get_mixin("gpt2-final").lm_head.weight[3] += 1
    save_huggingface(ours, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_model_made_here_becomes_one_of_theirs(tmp_path):
    ours = GPT2Model(TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=2, vocab_size=97)).eval()
    save_huggingface(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gaps_are_refused_with_both_lists_and_allowed_by_name(folder):
    state = load_file(folder / "model.safetensors")
    state["extra.weight"] = torch.ones(2)
    del state["transformer.h.1.mlp.c_fc.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing transformer.layers.1.mlp.dense_h_to_4h.bias, unexpected ex"):
        AutoModel.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, ignore="extra.*", may_miss="*.1.mlp.dense_h_to_4h.bias")
    assert model.load_report.unexpected == ("extra.weight",)
    assert model.load_report.missing == ("transformer.layers.1.mlp.dense_h_to_4h.bias",)
    key_map, config = GPT2Model.key_maps[0], model.config
    with pytest.raises(CheckpointError) as caught:
        plan_import(key_map, state.keys(), config, model.state_dict().keys(), what="x")
    assert "leaves 1 names of the source unread (extra.weight) and 1 of the target unfilled" in str(caught.value)


def test_a_tensor_of_another_shape_and_foreign_mixins_are_named(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"n_inner": 51}))
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h.* is \[48.*, the model has \[51"):
        AutoModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    ours = AutoModel.from_pretrained(folder)
    from tests.golden_mixins import Shift

    ours.add_mixin("shift", Shift(1))
    with pytest.raises(CheckpointError, match=r"leaves 1 names of the source unread \(mixins.shift.c\)"):
        save_huggingface(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(CheckpointError, match="BaseModel has no key map"):
        plain = BaseModel(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2))
        save_huggingface(plain, tmp_path / "x")


def test_unknown_families_options_and_missing_weights_are_named(folder):
    values = json.loads((folder / "config.json").read_text())

    def write(**changes):
        (folder / "config.json").write_text(json.dumps(values | changes))

    write(model_type="gpt3", architectures=["GPT3LMHeadModel"])
    with pytest.raises(
        CheckpointError, match="model_type 'gpt3', GPT3LMHeadModel; the types that .*Did you mean 'gpt2'"
    ):
        AutoModel.from_pretrained(folder)
    write(scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="has scale_attn_by_inverse_layer_idx=True, supported is False"):
        AutoModel.from_pretrained(folder)
    write()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has a config.json and no weights"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match="a 'x' has a=3, supported is 1 or 2"):
        require({"model_type": "x", "a": 3}, a=(1, 2), b=4)


TRANSFORMS = {
    "same": (Same(), [(4, 6)], None),
    "transpose": (Transpose(), [(4, 6)], None),
    "transpose of a bias": (Transpose(), [(4,)], None),
    "fused": (Fused(lambda c: (2, 3, 4)), [(2, 5), (3, 5), (4, 5)], [(9, 5)]),
    "fused columns": (Fused(lambda c: (2, 3), dim=1), [(5, 2), (5, 3)], [(5, 5)]),
    "taken apart": (Inverse(Fused(lambda c: (2, 3))), [(5, 4)], [(2, 4), (3, 4)]),
    "stacked": (Stacked(), [(4, 5)] * 3, [(3, 4, 5)]),
    "unstacked": (Inverse(Stacked(1)), [(4, 3, 5)], [(4, 5)] * 3),
    "squeezed": (Squeeze(0), [(1, 4, 5)], [(4, 5)]),
    "squeezed twice": (Squeeze(0, 2), [(1, 4, 1, 5)], [(4, 5)]),
    "copies": (Copies(2), [(4, 5)], [(4, 5), (4, 5)]),
    "rotary": (Reordered(lambda c: rotary_halves_from_pairs(3, 8)), [(24, 5)], None),
    "partial rotary": (Reordered(lambda c: rotary_halves_from_pairs(3, 8, 4)), [(24,)], None),
    "heads": (Reordered(lambda c: blocks_from_heads(4, 3)), [(36, 2)], None),
    "chain": (
        Chain(Each(Reordered(lambda c: rotary_halves_from_pairs(1, 4)), Same()), Fused(lambda c: (4, 3)), Transpose()),
        [(4, 5), (3, 5)],
        [(5, 7)],
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_transform_can_be_undone(name, dtype):
    transform, shapes, expected = TRANSFORMS[name]
    theirs = [torch.randint(-99, 99, shape).to(dtype) for shape in shapes]
    ours = transform.from_hf(theirs, None)
    if expected is not None:
        assert [tuple(t.shape) for t in ours] == expected
    back = transform.to_hf(ours, None)
    assert len(back) == len(theirs)
    for one, other in zip(back, theirs, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)


def test_rotary_order_is_the_one_of_the_paper():
    """Interleaved pairs (2j, 2j+1) become halves (j, j + dim/2)."""
    assert rotary_halves_from_pairs(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert blocks_from_heads(2, 2).tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_templates_gather_and_expand():
    config = TransformerConfig(num_layers=2, num_experts=3)
    key_map = KeyMap(
        model_type="x", architectures=("X",), config_from_hf=dict, config_to_hf=lambda c: {},
        ranges={"s": lambda c: [("left", "l"), ("right", "r")]},
        rules=(
            Rule("layers.{i}.up{e}.{kind}", "h.{i}.experts.{e}.w.{kind}"),
            Rule("layers.{i}.gate", "h.{i}.gate.{e}", Stacked()),
            Rule("{s}.x", "{s}.y"),
        ),
        legacy_suffixes={".gamma": ".kind"}, derived=("*.inv",),
    )  # fmt: skip
    theirs = {f"h.{i}.experts.{e}.w.weight": torch.full((1,), 10.0 * i + e) for i in range(2) for e in range(3)}
    theirs |= {f"h.{i}.gate.{e}": torch.full((2,), float(e)) for i in range(2) for e in range(3)}
    theirs |= {"l.y": torch.zeros(1), "r.y": torch.ones(1)}
    names = [f"layers.{i}.up{e}.weight" for i in range(2) for e in ("", "_1", "_2")]
    names += ["layers.0.gate", "layers.1.gate", "left.x", "right.x", "rotary.inv"]
    ours = dict(plan_import(key_map, theirs.keys(), config, names).read(theirs, "x"))
    assert ours["layers.1.up_2.weight"] == 12 and ours["right.x"] == 1
    assert ours["layers.1.gate"].shape == (3, 2)
    back = dict(plan_export(key_map, [*ours, "rotary.inv"], config).write(ours, "x"))
    assert_same_bytes(back, theirs)
    del theirs["h.1.gate.2"]  # a part of a group
    with pytest.raises(CheckpointError, match=r"2 names of the source unread \(h.1.gate.0, h.1.gate.1\) and 1 of"):
        plan_import(key_map, theirs.keys(), config, names)
    tied = KeyMap(
        model_type="t", architectures=("T",), config_from_hf=dict, config_to_hf=lambda c: {},
        rules=(Rule(("a", "b"), "shared", Copies(2)),),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="cannot become shared: they are one tensor there, and differ here"):
        list(plan_export(tied, ["a", "b"], config).write({"a": torch.ones(1), "b": torch.zeros(1)}, "x"))


def test_convert_goes_round_all_formats_and_verifies(folder, tmp_path, capsys):
    (folder / "vocab.json").write_text("{}")
    steps = [("hf", "native"), ("native", "sat"), ("sat", "hf2"), ("hf2", "sat2"), ("sat2", "native2")]
    for source, target in steps:
        to = target.rstrip("2")
        words = ["convert", str(tmp_path / source), str(tmp_path / target), "--to", to, "--verify"]
        main([*words, *(["--model-parallel-size", "3"] if target == "sat2" else [])])
        shown = capsys.readouterr().out
        assert shown.startswith(f"wrote {tmp_path / target}\nmaximum difference ")
        assert ("GPT2LMHeadModel" in shown) == ("hf" in source + target)
        assert (tmp_path / target / "vocab.json").is_file()
    assert_same_bytes(load_file(folder / "model.safetensors"), load_file(tmp_path / "hf2" / "model.safetensors"))
    assert len(list(tmp_path.glob("sat2/1/*.pt"))) == 3
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "native2"))
    assert_same_bytes(first, last)
    assert not list(tmp_path.glob(".*"))


def test_verify_fails_when_the_numbers_differ(folder, tmp_path, capsys):
    words = ["convert", str(folder), str(tmp_path / "half"), "--to", "native", "--dtype", "bfloat16", "--verify"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--tolerance", "1e-6"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "sat-lightning convert: error: " in error and "above the tolerance 1e-06" in error
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_convert_refuses_what_it_cannot_do_in_one_line(folder, tmp_path, capsys, monkeypatch):
    def refused(*words):
        with pytest.raises(SystemExit) as caught:
            main(["convert", *map(str, words)])
        return caught.value.code, capsys.readouterr().err

    assert refused(folder, tmp_path / "x")[0] == 2
    code, error = refused(folder, tmp_path / "x", "--to", "onnx")
    assert code == 2 and error.startswith("sat-lightning convert: error: argument --to: invalid choice: 'onnx'")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, error = refused(folder, tmp_path / "full", "--to", "sat")
    assert code == 1 and "exists and is not empty" in error
    code, error = refused(folder.with_name("hf2"), tmp_path / "x", "--to", "sat")
    assert code == 1 and "there is no such file or folder" in error and "Did you mean 'hf'?" in error
    code, error = refused(folder, tmp_path / "x", "--to", "sat", "--model-parallel-size", "2")
    assert code == 1 and "num_attention_heads 3 is not divisible by 2" in error
    monkeypatch.setitem(sys.modules, "transformers", None)
    main(["convert", str(folder), str(tmp_path / "y"), "--to", "native", "--verify"])
    assert "transformers is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "hf", "y"]
