"""Adapters on a base of 4 bits; what bitsandbytes is needed for runs where it is installed."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel, TransformerConfig
from sat_lightning.checkpoint import load_adapter, load_checkpoint, save_adapter, save_huggingface, save_sat
from sat_lightning.checkpoint.merge import merge_adapters
from sat_lightning.cli import main
from sat_lightning.errors import CheckpointError, ConfigError, HookError
from sat_lightning.mixins import BitFitMixin, DoraMixin, IA3Mixin, LoraMixin, QuantizedBaseMixin
from sat_lightning.mixins.places import find_places
from sat_lightning.mixins.quantized import dense_weight, dequantize_base, is_quantized, quantize_base
from sat_lightning.models import GPT2Model
from sat_lightning.training.commands.merge import load_finetuned
from tests.families import FAMILIES
from tests.test_lora import gpt2, randomise, run


def ALL(config):  # noqa: N802
    """LoRA on every linear, from the main singular vectors."""
    return LoraMixin(config, target="layers", init="pissa")


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = gpt2()
    with pytest.raises(ConfigError, match="quantize_base needs bitsandbytes.*pip install bitsandbytes"):
        quantize_base(model)
    assert not any(is_quantized(layer.mlp.dense_h_to_4h) for layer in model.transformer.layers)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "make", [LoraMixin, DoraMixin, IA3Mixin, lambda c: LoraMixin(c, target="layers", init="pissa")]
)
def test_adapters_on_four_bits_merge_and_come_back(make, kind):
    pytest.importorskip("bitsandbytes")
    model = gpt2()
    exact = run("gpt2", model)
    names = set(model.state_dict())
    assert len(quantize_base(model, kind=kind)) == 2 * 4
    base = run("gpt2", model)
    assert 1e-4 < (base - exact).abs().max() and (base - exact).abs().mean() < exact.abs().mean()
    mixin = make(model.config)
    model.add_mixin("tuned", mixin, reinit=True)
    assert_close(run("gpt2", model), base, atol=1e-5, rtol=1e-5)
    model.requires_grad_(False), mixin.requires_grad_(True)
    run("gpt2", model).square().mean().backward()
    assert all(parameter.grad is not None for parameter in mixin.parameters())
    randomise(mixin)
    tuned, packed = run("gpt2", model), copy.deepcopy(model.transformer.state_dict())
    mixin.merge()
    assert_close(run("gpt2", model), tuned, atol=1e-5, rtol=1e-5)
    assert not is_quantized(next(iter(mixin._adapters)))
    mixin.unmerge()
    back = model.transformer.state_dict()
    assert back.keys() == packed.keys() and all(torch.equal(back[name], packed[name]) for name in back)
    assert torch.equal(run("gpt2", model), tuned)
    mixin.merge()
    model.del_mixin("tuned")
    if make is ALL:  # all linears were adapted: a plain model again
        assert set(model.state_dict()) == names
    weight = dense_weight(model.transformer.layers[0].attention.query_key_value)
    assert weight.shape == (96, 32) and weight.dtype == torch.float32


def test_a_base_under_adapters_is_not_quantised():
    pytest.importorskip("bitsandbytes")
    model = gpt2()
    model.add_mixin("lora", LoraMixin(model.config))
    with pytest.raises(HookError, match="'lora' adapts layers.0.attention.query_key_value already"):
        quantize_base(model)
    with pytest.raises(ConfigError, match="matches no linear"):
        quantize_base(model, target="nothing_like_this")


def test_a_folder_is_refused_and_dense_again_it_is_written(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = gpt2()
    names = quantize_base(model)
    model.add_mixin("lora", LoraMixin(model.config, rank=2))
    randomise(model.get_mixin("lora"))
    expected = run("gpt2", model)
    for save in (lambda: model.save_pretrained(tmp_path / "new"), lambda: save_sat(model, tmp_path / "new"),
                 lambda: save_huggingface(model, tmp_path / "new")):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"in 4 bits, which .*save_adapter, or .*dequantize_base\(model\)"):
            save()
    assert not (tmp_path / "new").exists()
    assert len(dequantize_base(model)) == len(names) and dequantize_base(model) == []
    assert_close(run("gpt2", model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert_close(run("gpt2", AutoModel.from_pretrained(tmp_path).eval()), expected, atol=1e-5, rtol=1e-5)
    model.get_mixin("lora").merge()
    assert_close(run("gpt2", model), expected, atol=1e-5, rtol=1e-5)


def quantized(model):
    return [name for name, module in model.named_modules() if hasattr(module, "weight") and is_quantized(module)]


def test_all_linears_but_routers_are_chosen():
    pytest.importorskip("bitsandbytes")
    for family, kept in (("llama", ()), ("t5-gated", ()), ("mixtral", ("gates",))):
        model = FAMILIES[family].build()
        for part in getattr(model, "parts", {"": model}).values():
            linears = {place.name for place in find_places(part) if isinstance(place.module, torch.nn.Linear)}
            names = set(quantize_base(part))
            assert names and linears - names == {name for name in linears if name.split(".")[-2] in kept}


def test_a_state_dict_and_a_move_keep_the_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, other = gpt2(), gpt2(init_method_std=0.3)
    for one in (model, other):
        quantize_base(one)
    expected, names = run("gpt2", model), quantized(model)
    assert not torch.equal(run("gpt2", other), expected)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(run("gpt2", other), expected)
    moved = copy.deepcopy(model).to(torch.float64).to("cpu", torch.float32)
    assert quantized(moved) == names
    assert torch.equal(run("gpt2", moved), expected)
    assert torch.equal(run("gpt2", copy.deepcopy(moved)), expected)
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds linears in 4 bits .*Load them first, and quantise then"):
        load_checkpoint(model, tmp_path)


def test_biases_train_beside_four_bits_and_keep_their_precision():
    pytest.importorskip("bitsandbytes")
    model = gpt2()
    exact = copy.deepcopy(model)
    quantize_base(model)
    with torch.no_grad():  # a dense model of the same weights
        for name, module in exact.named_modules():
            if name in quantized(model):
                module.weight.copy_(dense_weight(model.get_submodule(name)))
    for one in (model, exact):
        one.add_mixin("bias", BitFitMixin(one.config))
        run("gpt2", one).square().mean().backward()
    name = "transformer.layers.0.mlp.dense_h_to_4h"
    assert_close(model.get_submodule(name).bias.grad, exact.get_submodule(name).bias.grad, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = run("gpt2", model)
        assert_close(half.float(), run("gpt2", exact).float(), atol=0.1, rtol=0.1)
    assert model.get_submodule(name).bias.dtype == torch.float32


def test_the_mixin_is_in_the_file_of_an_adapter_and_merging_makes_it_dense(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = gpt2()
    plain = set(model.state_dict())
    model.add_mixin("base", QuantizedBaseMixin(model.config, kind="fp4"))
    model.add_mixin("lora", LoraMixin(model.config, rank=2))
    randomise(model.get_mixin("lora"))
    expected = run("gpt2", model)
    save_adapter(model, tmp_path)
    twin = gpt2()
    assert load_adapter(twin, tmp_path) == ["base", "lora"]
    assert torch.equal(run("gpt2", twin), expected)
    other = gpt2()
    with torch.no_grad():
        other.transformer.layers[0].mlp.dense_h_to_4h.weight.mul_(2)  # the same 4 bits, and another constant
    modules, before = list(other.modules()), run("gpt2", other)
    with pytest.raises(CheckpointError, match="another base"):
        load_adapter(other, tmp_path)
    assert list(other.modules()) == modules and not quantized(other)
    assert torch.equal(run("gpt2", other), before)
    assert merge_adapters(twin) == ["lora"]
    assert set(twin.state_dict()) == plain and not quantized(twin)
    assert_close(run("gpt2", twin), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(HookError, match=r"cannot be disabled: .*dequantize_base"):
        model.get_mixin("base").disable()
    dequantize_base(model)
    assert list(model.mixins)[-1] == "lora" and "base" not in model.mixins
    with pytest.raises(ConfigError, match="kind is 'int4', there are 'nf4' and 'fp4'"):
        QuantizedBaseMixin(model.config, kind="int4")


YAML = """
model:
  class_path: LanguageModelingTask
  init_args:
    model:
      class_path: sat_lightning.AutoModel.from_pretrained
      init_args: {name: base}
    mixins:
      base: {class_path: QuantizedBaseMixin}
      lora: {class_path: sat_lightning.mixins.LoraMixin, init_args: {rank: 2, target: layers}}
    optim: {learning_rate: 0.02}
data:
  class_path: SATDataModule
  init_args: {path: text.txt, sequence_length: 16, batch_size: 4, validation: 0.2}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 4
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_top_k: -1}}
seed_everything: 3
"""
CONFIG = "{num_layers: 1, hidden_size: 32, num_attention_heads: 2, vocab_size: 257, max_sequence_length: 48}"
SIZES = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 257, "max_sequence_length": 48}


@pytest.mark.parametrize("road", ["whole checkpoints", "trained only", "init_from"])
def test_a_recipe_trains_resumes_and_merges(road, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    torch.manual_seed(0)
    base = GPT2Model(TransformerConfig(**SIZES))
    base.save_pretrained("base")
    recipe = YAML
    if road == "trained only":
        recipe = YAML.replace("callbacks:", "callbacks:\n    - {class_path: TrainableOnly}")
    if road == "init_from":
        recipe = YAML.replace("sat_lightning.AutoModel.from_pretrained", "GPT2Model")
        recipe = recipe.replace("{name: base}", "{config: " + CONFIG + "}") + "init_from: base\n"
    Path("tiny.yaml").write_text(recipe)
    main(["fit", "--config", "tiny.yaml"])
    run_folder = Path("runs/tiny/version_0")
    (file,) = (run_folder / "checkpoints").glob("*step=2.ckpt")
    weights = torch.load(file, weights_only=True)["state_dict"]
    packed = "model.transformer.layers.0.mlp.dense_h_to_4h.weight"
    assert (packed in weights) == (f"{packed}.absmax" in weights) == (road != "trained only")
    summary = (run_folder / "summary.txt").read_text()
    assert f"{sum(p.numel() for p in base.transformer.layers.parameters()):,}" in summary
    main(["fit", "--config", "tiny.yaml", "--ckpt_path", str(file)])
    unbroken, resumed = (load_finetuned(f"runs/tiny/version_{i}") for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), unbroken.parameters(), strict=True))
    assert set(quantized(resumed)) == {
        f"transformer.layers.0.{name}"
        for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }
    for name in quantized(resumed):  # it is the base that was given, and no other
        weight = base.get_submodule(name).weight
        assert (dense_weight(resumed.get_submodule(name)) - weight).norm() < 0.3 * weight.norm()
    ids = torch.arange(9)[None]
    expected = resumed.eval()(ids)[0]
    main(["merge", "--ckpt", "runs/tiny/version_1", "--output", "plain"])
    assert "merged lora; wrote plain" in capsys.readouterr().out
    plain = AutoModel.from_pretrained("plain")
    assert set(plain.state_dict()) == set(base.state_dict())
    assert_close(plain(ids)[0], expected, atol=1e-5, rtol=1e-5)
    save_adapter(resumed, "adapter")
    main(["merge", "--ckpt", "adapter", "--base", "base", "--output", "again"])
    assert_close(AutoModel.from_pretrained("again")(ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_an_export_of_four_bits_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    GPT2Model(TransformerConfig(**SIZES)).save_pretrained("base")
    Path("tiny.yaml").write_text(YAML.replace("callbacks:", "callbacks:\n    - {class_path: ExportModel}"))
    with pytest.raises((CheckpointError, SystemExit)):
        main(["fit", "--config", "tiny.yaml"])
    assert not list(Path("runs").rglob("*.ckpt"))
