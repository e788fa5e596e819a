"""Fine-tuned models become plain ones: several adapters one, adapters weights, from the command line too."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint import save_huggingface, save_peft
from sat_lightning.checkpoint.adapters import save_adapter
from sat_lightning.checkpoint.merge import merge_adapters
from sat_lightning.cli import main
from sat_lightning.errors import CheckpointError, ConfigError, HookError
from sat_lightning.mixins import BitFitMixin, DoraMixin, IA3Mixin, LoraMixin, MLPHeadMixin, PrefixTuningMixin
from sat_lightning.mixins.combine import combine_loras
from sat_lightning.training.commands.merge import load_finetuned
from tests.families import FAMILIES
from tests.test_lora import gpt2, randomise, run
from tests.writer_example import fit_writer

LORA = "{lora: {class_path: sat_lightning.mixins.LoraMixin, init_args: {rank: 2, rank_pattern: {dense: 3}}}}"


def with_loras(model):
    """Three of different places and ranks, all with weights."""
    settings = {
        "a": {"rank": 2, "target": "attention"},
        "b": {"rank": 3, "target": [r"query_key_value\.(query|value)", "mlp"], "alpha": 2.0},
        "c": {"rank": 2, "target": "attention", "use_rslora": True, "alpha": 1.0},
    }
    for name, options in settings.items():
        model.add_mixin(name, LoraMixin(model.config, **options))
        randomise(model.get_mixin(name))
    return model


def test_the_sum_of_loras_is_one_exactly_or_in_fewer_ranks():
    model = with_loras(gpt2())
    together = run("gpt2", model)
    one = combine_loras(model, {"a": 1.0, "b": 1.0, "c": 1.0}, "one")
    assert [model.get_mixin(name).enabled for name in ("a", "b", "c", "one")] == [False, False, False, True]
    assert_close(run("gpt2", model), together, atol=1e-5, rtol=1e-5)
    weights = one.get_submodule("layers.0.attention.query_key_value")
    assert weights.ranks == (7, 4, 7)
    model.del_mixin("one")
    model.get_mixin("a").scale, model.get_mixin("c").scale = 0.5, -2.0
    for name in ("a", "c"):
        model.get_mixin(name).enable()
    weighed = run("gpt2", model)
    model.get_mixin("a").scale = model.get_mixin("c").scale = 1.0
    combine_loras(model, {"a": 0.5, "c": -2.0}, "one")
    assert_close(run("gpt2", model), weighed, atol=1e-5, rtol=1e-5)
    exact = model.get_mixin("one")._adapters[model.transformer.layers[0].attention.dense].delta()
    combine_loras(model, {"one": 1.0}, "small", rank=2)
    best = model.get_mixin("small")._adapters[model.transformer.layers[0].attention.dense].delta()
    values = torch.linalg.svdvals(exact)
    assert_close(torch.linalg.norm(exact - best), values[2:].square().sum().sqrt(), atol=1e-4, rtol=1e-4)
    assert AutoModel is not None and list(model.mixins)[-1] == "small"


def test_a_combination_that_has_no_meaning_is_refused():
    model = with_loras(gpt2())
    model.add_mixin("ia3", IA3Mixin(model.config))
    model.add_mixin("whole", LoraMixin(model.config, target="query_key_value$"))
    with pytest.raises(HookError, match="'ia3' is a IA3Mixin"):
        combine_loras(model, {"a": 1.0, "ia3": 1.0}, "one")
    with pytest.raises(HookError, match=r"query_key_value as one, another in parts"):
        combine_loras(model, {"a": 1.0, "whole": 1.0}, "one")
    with pytest.raises(ConfigError, match="give names, and a rank above 0"):
        combine_loras(model, {"a": 1.0}, "one", rank=0)
    model.del_mixin("ia3"), model.get_mixin("whole").merge()
    with pytest.raises(HookError, match="'whole' is merged"):
        combine_loras(model, {"whole": 1.0}, "one")
    assert "one" not in model.mixins


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5", "vit"])
def test_merged_all_it_is_a_plain_model(family, tmp_path):
    model = FAMILIES[family].build().eval()
    parts = getattr(model, "parts", {"": model})
    plain = set(model.state_dict())
    for part in parts.values():
        part.add_mixin("dora", DoraMixin(part.config, rank=2))
        part.add_mixin("lora", LoraMixin(part.config, target="mlp"))
        part.add_mixin("off", LoraMixin(part.config, target="mlp"))
        part.add_mixin("ia3", IA3Mixin(part.config))
        [randomise(part.get_mixin(name)) for name in ("dora", "lora", "off", "ia3")]
        part.get_mixin("off").disable()
    tuned = FAMILIES[family].run(model)
    names = merge_adapters(model)
    assert set(names) == {f"{name}{'.' if name else ''}{own}" for name in parts for own in ("dora", "lora", "ia3")}
    assert_close(FAMILIES[family].run(model), tuned, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == plain
    model.save_pretrained(tmp_path)
    assert_close(FAMILIES[family].run(AutoModel.from_pretrained(tmp_path)), tuned, atol=1e-5, rtol=1e-5)


def test_what_no_weight_can_hold_is_refused_or_kept():
    model = gpt2()
    model.add_mixin("lora", LoraMixin(model.config))
    model.add_mixin("bias", BitFitMixin(model.config))
    model.add_mixin("prefix", PrefixTuningMixin(model.config, prefix_len=2))
    randomise(model.get_mixin("lora"))
    tuned = run("gpt2", model)
    with pytest.raises(CheckpointError, match=r"'prefix' is a PrefixTuningMixin.*--keep prefix"):
        merge_adapters(model)
    assert model.get_mixin("lora").enabled
    assert merge_adapters(model, keep=["prefix"]) == ["lora", "bias"]
    assert_close(run("gpt2", model), tuned, atol=1e-5, rtol=1e-5)
    assert list(model.mixins) == ["gpt2-final", "prefix"]


def test_heads_stay():
    model = FAMILIES["bert"].build().eval()
    for owner in [name for name in model.hooks.origins["final_forward"] if name in model.mixins]:
        model.del_mixin(owner)
    model.add_mixin("head", MLPHeadMixin(model.config, 6, 3))
    model.add_mixin("lora", LoraMixin(model.config))
    randomise(model.get_mixin("lora"))
    tuned = run("bert", model)
    assert merge_adapters(model) == ["lora"] and "head" in model.mixins
    assert_close(run("bert", model), tuned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "peft", "folder"])
def test_the_verb_merges_adapters(kind, tmp_path, capsys):
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    base.add_mixin("lora", LoraMixin(base.config, target="layers"))
    randomise(base.get_mixin("lora"))
    {"ours": save_adapter, "peft": lambda m, f: save_peft(m, f, "lora"), "folder": lambda m, f: m.save_pretrained(f)}[
        kind
    ](base, tmp_path / "tuned")
    words = ["merge", "--ckpt", str(tmp_path / "tuned"), "--output", str(tmp_path / "plain")]
    if kind != "folder":
        with pytest.raises(SystemExit):
            main(words)
        assert "is an adapter. Give the model that it was trained on: --base PATH." in capsys.readouterr().err
    main([*words, "--base", str(tmp_path / "base")])
    assert f"wrote {tmp_path / 'plain'}" in capsys.readouterr().out
    plain = AutoModel.from_pretrained(tmp_path / "plain")
    assert set(plain.state_dict()) == set(gpt2().state_dict())
    assert_close(run("gpt2", plain), run("gpt2", base), atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit):
        main([*words, "--base", str(tmp_path / "base")])
    assert "exists and is not empty" in capsys.readouterr().err
    main([*words[:-1], str(tmp_path / "hf"), "--base", str(tmp_path / "base"), "--to", "hf", "--dtype", "bfloat16"])
    assert AutoModel.from_pretrained(tmp_path / "hf", dtype="auto").transformer.final_layernorm.weight.dtype == (
        torch.bfloat16
    )
    with pytest.raises(SystemExit):
        main(["merge", "--ckpt", str(tmp_path / "base"), "--output", str(tmp_path / "none")])
    assert "has nothing to merge" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["saved", "init_from", "seed"])
def test_the_verb_merges_a_run(base, tmp_path, monkeypatch, capsys):
    """Its base is in the checkpoint, or is what the run began with: weights, or random ones."""
    monkeypatch.chdir(tmp_path)
    recipe = {"mixins": LORA}
    if base != "saved":
        from sat_lightning import TransformerConfig
        from sat_lightning.models import GPT2Model

        sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 257}
        GPT2Model(TransformerConfig(**sizes, max_sequence_length=48)).save_pretrained("base")
        recipe["callbacks"] = "[{class_path: TrainableOnly}]"
        recipe["more"] = "init_from: base\n" if base == "init_from" else "seed_everything: 7\n"
    folder = str(fit_writer(**recipe))
    tuned = load_finetuned(folder)
    lora = tuned.get_mixin("lora")
    assert any((pair.abs() > 0).any() for name, pair in lora.named_parameters() if "matrix_B" in name)
    main(["merge", "--ckpt", folder, "--output", "plain"])
    assert "merged lora; wrote plain" in capsys.readouterr().out
    plain, ids = AutoModel.from_pretrained("plain"), torch.arange(9)[None]
    assert "lora" not in plain.mixins
    assert_close(plain(ids)[0], tuned.eval()(ids)[0], atol=1e-5, rtol=1e-5)


def test_a_misspelt_name_to_keep_is_refused_before_anything_is_merged():
    model = gpt2()
    model.add_mixin("lora", LoraMixin(model.config))
    with pytest.raises(CheckpointError, match=r"No mixin is named 'lroa', to be kept; .*Did you mean 'lora'"):
        merge_adapters(model, keep=["lroa"])
    assert "lora" in model.mixins and not model.get_mixin("lora").is_merged


def test_the_verb_finds_a_half_precision_base_that_was_trained_in_full(tmp_path):
    gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    base.add_mixin("lora", LoraMixin(base.config))
    randomise(base.get_mixin("lora"))
    save_adapter(base, tmp_path / "tuned")
    words = ["merge", "--ckpt", str(tmp_path / "tuned"), "--base", str(tmp_path / "base")]
    main([*words, "--output", str(tmp_path / "plain")])
    assert_close(run("gpt2", AutoModel.from_pretrained(tmp_path / "plain")), run("gpt2", base), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [LoraMixin, PrefixTuningMixin])
def test_a_folder_for_hugging_face_loses_no_method(make, tmp_path):
    model = gpt2()
    model.add_mixin("tuned", make(model.config))
    with pytest.raises(
        CheckpointError, match=r"^tuned: of fine-tuning, .*merge_adapters\(model\) or `sat-lightning merge"
    ):
        save_huggingface(model, tmp_path)
    assert not list(tmp_path.iterdir())
    if make is LoraMixin:
        model.get_mixin("tuned").merge()
        with pytest.raises(CheckpointError, match=r"is merged: .* del_mixin for a plain model"):
            save_huggingface(model, tmp_path)
    model.del_mixin("tuned")
    save_huggingface(model, tmp_path)
