"""Every method of fine-tuning on five families: it starts as it should, trains what it declares, saves and reloads."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from sat_lightning.checkpoint import load_adapter, save_adapter
from sat_lightning.checkpoint.native import all_mixins
from sat_lightning.errors import SatError
from sat_lightning.training.freezing import freeze_base, freeze_parameters
from tests.families import FAMILIES
from tests.methods import MATRIX_FAMILIES, METHODS, build, stir

PAIRS = [(method, family) for method in METHODS for family in MATRIX_FAMILIES]
FITTING = [(method, family) for method, family in PAIRS if family not in METHODS[method].refused]
#: All that is compiled. Each method once is quick, on one family after the other, with and without checkpoints.
QUICK = [(method, MATRIX_FAMILIES[index % 5], index % 2 == 1) for index, method in enumerate(METHODS)]
CELLS = [
    pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow)
    for cell in ((*pair, is_checkpointed) for pair in FITTING for is_checkpointed in (False, True))
]


def run(model, method, family, **more):
    return FAMILIES[family].run(model, **METHODS[method].call, **more)


def mixin_names(model):
    return {name for name, _ in all_mixins(model)}


def declare(model, names):
    """Freeze as training does, and beside a head alone by a pattern; returns the names of what trains."""
    freeze_base(model, names)
    if all(parameter.requires_grad for parameter in model.parameters()):
        freeze_parameters(model, trainable=[rf"mixins\.{name.split('.')[-1]}\." for name in names])
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model, method, family, num_steps=3):
    """Take a few steps; returns the last gradients."""
    model.train()
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2)
    for step in range(num_steps):
        optimizer.zero_grad()
        run(model, method, family, seed=step).square().mean().backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair not in FITTING])
def test_what_cannot_be_is_refused_with_its_reason(method, family):
    model = FAMILIES[family].build()
    before = set(model.state_dict())
    with pytest.raises(SatError, match=METHODS[method].refused[family]):
        METHODS[method].add(model)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_a_new_method_changes_nothing_where_it_starts_at_zero(method, family):
    model = FAMILIES[family].build().eval()
    with torch.no_grad():
        before = FAMILIES[family].run(model)
        METHODS[method].add(model)
        after = run(model, method, family)
    assert after.isfinite().all()
    if METHODS[method].starts_near_base:
        assert_close(after, before, atol=1e-5, rtol=1e-5)
    else:
        assert METHODS[method].starts_as_base == (before.shape == after.shape and torch.equal(before, after))


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_trains_what_it_declares_and_reloads_on_the_base(method, family, tmp_path):
    model = FAMILIES[family].build()
    base = copy.deepcopy(model)
    names = METHODS[method].add(model)
    declared = declare(model, names)
    assert declared, "nothing trains"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = train(model, method, family)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == declared == gradients.keys()

    save_adapter(model, tmp_path, names)
    for replaced in mixin_names(base) - mixin_names(model):
        base.del_mixin(replaced)
    assert load_adapter(base, tmp_path) == names
    with torch.no_grad():
        assert torch.equal(run(base.eval(), method, family), run(model.eval(), method, family))


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_checkpointing_activations_changes_no_gradient(method, family):
    found = []
    for is_checkpointed in (False, True):
        model, names = build(family, method, checkpoint_activations=is_checkpointed)
        declare(model, names)
        found.append(train(model, method, family, num_steps=1))
    assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "family"), [pair for pair in FITTING if pair[1] in ("bert", "llama")])
def test_runs_in_half_precision_and_under_autocast(method, family):
    model, _ = build(family, method)
    with torch.no_grad():
        expected = run(model.eval(), method, family)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = run(model, method, family)
        half = run(model.to(torch.bfloat16), method, family)
    assert half.dtype == torch.bfloat16
    for got in (mixed.float(), half.float()):
        assert (got - expected).norm() < 0.1 * expected.norm()


def check_compiled(method, family, is_checkpointed, **options):
    """One graph, made in the first step, whose gradients are those of eager code; returns the model and its mixins."""
    torch._dynamo.reset()
    model, names = build(family, method)
    declare(model, names)
    expected = train(model, method, family, num_steps=2)
    model, names = build(family, method, checkpoint_activations=is_checkpointed)
    declare(model, names)
    model.compile(fullgraph=True, **options)
    counters.clear()
    assert_close(train(model, method, family, num_steps=2), expected, atol=1e-4, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1
    return model, names


@pytest.mark.parametrize(("method", "family", "is_checkpointed"), CELLS)
def test_compiles_into_one_graph(method, family, is_checkpointed):
    """Captured whole, forwards and backwards; the code is that of eager."""
    check_compiled(method, family, is_checkpointed, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("no_unfinished_kernels")
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(("method", "family"), FITTING)
def test_compiled_code_trains_saves_and_reloads(method, family, is_checkpointed, tmp_path):
    """The real code generator, forwards and backwards."""
    model, names = check_compiled(method, family, is_checkpointed)
    save_adapter(model, tmp_path, names)
    twin, _ = build(family, method)
    stir(twin, names, seed=2)
    load_adapter(twin, tmp_path)
    with torch.no_grad():
        assert_close(run(twin.eval(), method, family), run(model.eval(), method, family), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].is_head and name != "layernorm"])
def test_scale_and_switch(method):
    """Scale 0 and disable are the base; scale 1 is the method again."""
    model, names = build("bert", method)
    model.eval()
    mixin = model.get_mixin(names[0])
    bare = FAMILIES["bert"].build().eval()
    with torch.no_grad():
        expected, full = FAMILIES["bert"].run(bare), FAMILIES["bert"].run(model)
        if method in ("bitfit", "layernorm"):
            with pytest.raises(SatError, match="in place"):
                mixin.disable()
            with pytest.raises(SatError, match="has no scale"):
                mixin.scale = 0.5
            return
        if method == "prompt":
            with pytest.raises(SatError, match="has no scale"):
                mixin.scale = 0.0
        else:
            mixin.scale = 0.5
            half = FAMILIES["bert"].run(model)
            mixin.scale = 0.0
            if method != "dora":  # the lengths of whose rows are no part of the product that is scaled
                assert torch.equal(FAMILIES["bert"].run(model), expected)
            assert not torch.equal(half, full) and not torch.equal(half, expected)
            mixin.scale = 1.0
        mixin.disable()
        assert torch.equal(FAMILIES["bert"].run(model), expected)
        mixin.enable()
        assert torch.equal(FAMILIES["bert"].run(model), full)
