"""Adapters on a base of 4 bits; what bitsandbytes is needed for runs where it is installed."""

import copy
import sys

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint import save_huggingface, save_sat
from sat_lightning.errors import CheckpointError, ConfigError, HookError
from sat_lightning.mixins import DoraMixin, IA3Mixin, LoraMixin
from sat_lightning.mixins.quantized import dense_weight, dequantize_base, is_quantized, quantize_base
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
