"""Every family under everything a training run does to it: checkpointing, half precision, autocast, compilation."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sat_lightning import AutoModel
from tests.families import FAMILIES, SIZES, ids

NAMES = sorted(FAMILIES)
# Tracing costs a second a layer: two where a layer hands something to the next, or differs from it.
DEEP = {"chatglm", "gptneo", "llama-old", "t5-gated"}


def gradients(name, model, **more):
    """Return the result of a call in training mode and all gradients of its mean square."""
    model.train().zero_grad()
    result = FAMILIES[name].run(model, **more)
    result.square().mean().backward()
    return result.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_nothing_is_random(name):
    model = FAMILIES[name].build()
    result, found = gradients(name, model)
    assert result.isfinite().all()
    assert found.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    silent = [key for key, gradient in found.items() if not gradient.abs().max() > 0]
    # The bias of a key moves all scores of a query alike, and the softmax forgets it; the rest of that bias acts.
    assert not silent, silent
    assert torch.equal(gradients(name, model)[0], result)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_output_and_no_gradient(name):
    expected = gradients(name, FAMILIES[name].build())
    got = gradients(name, FAMILIES[name].build(checkpoint_activations=True))
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near_single(name):
    family = FAMILIES[name]
    model = family.build().eval()
    with torch.no_grad():
        expected = family.run(model)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = family.run(model)
        half = family.run(model.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    scale = expected.abs().max()
    # bf16 keeps 8 bits: a percent or two of the largest value after two layers.
    assert (mixed.float() - expected).abs().max() < 0.05 * scale
    assert (half.float() - expected).abs().max() < 0.05 * scale


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph_with_equal_numbers(name):
    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.build(num_layers=2 if name in DEEP else 1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(family.run(compiled), family.run(model), atol=1e-5, rtol=1e-5)
        torch.compiler.set_stance("fail_on_recompile")
        try:
            got = family.run(compiled, seed=1)
        finally:
            torch.compiler.set_stance("default")
        assert_close(got, family.run(model, seed=1), atol=1e-5, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Notes operations for whose result a host would wait on a GPU."""

    WAITS = "_local_scalar_dense nonzero masked_select equal is_nonzero".split()

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found |= {name} & set(self.WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_what_the_device_computes(name):
    model = FAMILIES[name].build()
    with Reads() as reads:
        gradients(name, model)
    # Eager experts gather their tokens, as many as there are; compiled ones do not.
    assert reads.found == ({"nonzero"} if name == "mixtral" else set())


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_independent(name):
    family = FAMILIES[name]
    model = family.build().eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = family.run(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(family.run(twin), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].is_causal])
def test_decoders_are_causal_by_themselves(name):
    model = FAMILIES[name].build().eval()
    input_ids = ids()
    changed = input_ids.clone()
    changed[:, 6] = 0
    with torch.no_grad():
        before, after = model(input_ids)[0], model(changed)[0]
    assert_close(after[:, :6], before[:, :6], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after[:, 6:], before[:, 6:], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_configuration_becomes_the_familys(name):
    """A file read by the plain class keeps the family's fields in `extra`; the model finds them there."""
    from sat_lightning import TransformerConfig

    family = FAMILIES[name]
    model = family.build()
    file = model.config.to_dict(model_class=family.class_name, everything=True)
    again = type(model)(TransformerConfig.from_dict(file))
    assert type(again.config) is type(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.config.num_layers == SIZES["num_layers"]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_rebuilds_the_model(name, tmp_path):
    family = FAMILIES[name]
    model = family.build().eval()
    model.save_pretrained(tmp_path / "model")
    twin = AutoModel.from_pretrained(tmp_path / "model")
    assert type(twin) is type(model)
    with torch.no_grad():
        assert torch.equal(family.run(twin), family.run(model))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("no_unfinished_kernels")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_gives_equal_numbers_and_gradients(name):
    """The real code generator, forwards and backwards: a minute for each family."""
    torch._dynamo.reset()
    expected = gradients(name, FAMILIES[name].build())
    model = FAMILIES[name].build()
    model.compile(fullgraph=True)
    result, found = gradients(name, model)
    assert_close(result, expected[0], atol=1e-4, rtol=1e-4)
    for key, gradient in expected[1].items():
        assert_close(found[key], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
