"""Every pair of methods stacks, or is refused with its reason and a cure."""

import pytest
import torch

from sat_lightning.training.freezing import freeze_base
from tests.families import FAMILIES
from tests.method_table import BEGIN, ROOT, make_table, read_cell, stack_all, table_of
from tests.methods import METHODS, stir


@pytest.fixture(scope="module")
def found():
    return stack_all()


def test_pairs_stack_or_say_why_not(found):
    refused = {pair: stack.error for pair, stack in found.items() if stack.error}
    heads = {"mlp-head", "lm-head", "task-heads"}
    for (first, second), error in refused.items():
        assert second == "dora" or {first, second} <= heads, f"{second} after {first}: {error}"
        assert any(word in error for word in ("Call ", "Add ", "merge ")), f"no cure: {error}"
    # What the other library for this refuses.
    for first, second in (("prefix", "lora"), ("lora", "prefix"), ("prompt", "adapter"), ("prefix", "prompt")):
        assert read_cell(found, first, second) == "+"
    assert read_cell(found, "adapter", "adapter-parallel") == "o"
    assert "DoRA before the first" in read_cell(found, "lora", "dora")
    assert read_cell(found, "dora", "lora") == "o"
    assert "del_mixin(the first)" in read_cell(found, "mlp-head", "lm-head")


def test_all_that_stack_stand_on_one_model_at_once():
    family = FAMILIES["bert"]
    model = family.build()
    names = [name for name, method in METHODS.items() if not method.is_head and name != "dora"]
    for name in names:
        METHODS[name].add(model, name)
    stir(model, names)
    freeze_base(model)
    family.run(model.train()).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(family.run(compiled), family.run(model), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_table_of_the_readme_is_of_this_code():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BEGIN in readme, "python -m tests.method_table writes it"
    assert table_of(readme) == make_table()
