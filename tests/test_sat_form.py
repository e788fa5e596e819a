"""SAT's constructors of fine-tuning mixins build what ours build."""

import pytest
import torch
import torch.nn.functional as F

from sat_lightning import AutoModel
from sat_lightning.errors import ConfigError
from sat_lightning.mixins import (
    AdapterMixin,
    DoraMixin,
    FFADDMixin,
    LoRAMixin,
    LoraMixin,
    MLPHeadMixin,
    PrefixTuningMixin,
    PTuningV2Mixin,
)
from tests.families import FAMILIES

FORMS = {
    "prefix": (lambda c: PTuningV2Mixin(c.num_layers, c.head_size, c.num_key_value_heads, 5),
               lambda c: PrefixTuningMixin(c, prefix_len=5)),
    "lora2": (lambda c: LoraMixin(c.num_layers, 3, lora_alpha=2, layer_range=[1]),
              lambda c: LoraMixin(c, rank=3, alpha=2, target=r"layers\.1\.(cross_)?attention\.")),
    "lora2-self": (lambda c: LoraMixin(layer_num=c.num_layers, r=3, cross_attention=False),
                   lambda c: LoraMixin(c, rank=3, alpha=1, target=r"\.attention\.")),
    "lora": (lambda c: LoRAMixin(c.hidden_size, c.num_layers, r=2, lora_alpha=4, layer_range=[0]),
             lambda c: LoRAMixin(c, r=2, lora_alpha=4, layer_range=[0])),
    "ffadd": (lambda c: FFADDMixin(c.hidden_size, c.num_layers, 6, [1]),
              lambda c: FFADDMixin(c, 6, [1])),
    "adapter": (lambda c: AdapterMixin(c.num_layers, c.hidden_size, 6),
                lambda c: AdapterMixin(c, 6, runs_post=True)),
    "mlp-head": (lambda c: MLPHeadMixin(c.hidden_size, 20, 3, activation_func=F.gelu),
                 lambda c: MLPHeadMixin(c, 20, 3, activation="gelu")),
}  # fmt: skip


def build(family, name, make):
    model = FAMILIES[family].build().eval()
    part = model.decoder if family == "t5" else model
    if name == "mlp-head":
        part.del_mixin(part.hooks.origins["final_forward"][-1])
    torch.manual_seed(0)
    part.add_mixin("tuned", make(part.config), reinit=True)
    with torch.no_grad():
        for parameter in part.get_mixin("tuned").parameters():
            parameter.add_(0.1)
    return model


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_sizes_do_in_the_place_of_the_configuration(name, family, tmp_path):
    sat, own = (build(family, name, make) for make in FORMS[name])
    assert {k: v.shape for k, v in sat.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}
    own.load_state_dict(sat.state_dict())
    sat.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = FAMILIES[family].run(own)
        assert torch.equal(FAMILIES[family].run(sat), expected)
        assert torch.equal(FAMILIES[family].run(again), expected)


def test_a_subclass_keeps_its_own_arguments(tmp_path):
    class Mine(PrefixTuningMixin):
        def __init__(self, length):
            super().__init__(2, 8, 4, length)

    assert Mine(3).init_arguments == ((3,), {}) and len(Mine(3).prefix) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoraMixin(2, 3, qlora=True), "quantize_base"),
        (lambda: LoraMixin("2"), r"SAT's arguments \(layer_num, r, lora_alpha.* and got '2'.*model.config"),
        (lambda: AdapterMixin(2), r"SAT's arguments \(num_layers, hidden_size, adapter_hidden\), and got 2"),
        (lambda: DoraMixin(2), r"DoraMixin takes the model's configuration, which knows the sizes, and got 2"),
        (lambda: LoRAMixin(32), "rank is 0"),
        (lambda: MLPHeadMixin(8, 2, activation_func=torch.sin), "activation_func is .*relu"),
    ],
)
def test_what_fits_neither_form_is_told_the_new_one(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_merges_by_sats_name():
    model = build("bert", "lora2", FORMS["lora2"][0])
    with torch.no_grad():
        expected = FAMILIES["bert"].run(model)
        model.get_mixin("tuned").merge_lora()
        model.del_mixin("tuned")
        torch.testing.assert_close(FAMILIES["bert"].run(model), expected, atol=1e-5, rtol=1e-5)
