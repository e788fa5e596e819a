"""`adapter_ids` of a call: each row of a batch has its own method, of every kind that can be told apart."""

import copy

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint import load_adapter, save_adapter
from sat_lightning.errors import InputError
from sat_lightning.generation import generate
from sat_lightning.mixins import (
    AdapterMixin,
    BitFitMixin,
    FFADDMixin,
    KeyValueCache,
    LayerNormTuningMixin,
    LoraMixin,
    PrefixTuningMixin,
    PromptTuningMixin,
    StaticCacheMixin,
)
from tests.families import FAMILIES

MAKE = {
    "lora": lambda config: LoraMixin(config, rank=2),
    "prefix": lambda config: PrefixTuningMixin(config, 3),
    "adapter": lambda config: AdapterMixin(config, 4),
    "ffadd": lambda config: FFADDMixin(config, 4),
}
NAMES = [*MAKE, None]
CHOSEN = [0, 1, 2, 3, -1]
IDS = torch.randint(5, 60, (5, 9), generator=torch.Generator().manual_seed(3))


def build(family, dtype=torch.float32, **options):
    model = FAMILIES[family].build(**options)
    for seed, (name, make) in enumerate(MAKE.items()):
        model.add_mixin(name, make(model.config))
        torch.manual_seed(seed)
        with torch.no_grad():
            [parameter.normal_(std=0.3) for parameter in model.get_mixin(name).parameters()]
    return model.to(dtype).eval()


def use(model, names):
    for name in MAKE:
        model.get_mixin(name).enabled = name in names


def alone(model, row, **call):
    """Return what a row gives where its own method is the only one, and the call says nothing of methods."""
    use(model, [NAMES[row]])
    found = model(IDS[row : row + 1], **call)[0]
    use(model, MAKE)
    return found[0]


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_each_row_is_as_alone_forward_and_backward(family):
    model = build(family)
    rows = [alone(model, row) for row in range(5)]
    mixed = model(IDS, adapter_ids=CHOSEN)[0]
    assert_close(mixed, torch.stack(rows), atol=1e-5, rtol=1e-5)
    use(model, [])
    base = model(IDS)[0]
    use(model, MAKE)
    assert all((mixed[row] - base[row]).abs().max() > 1e-2 for row in range(4))

    model.double()  # sums of gradients differ by the order of their terms

    def gradients(output):
        model.zero_grad()
        output.square().sum().backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.mixins.named_parameters()
        }

    together = gradients(model(IDS, adapter_ids=torch.tensor(CHOSEN))[0])
    for row, name in enumerate(MAKE):
        own = gradients(alone(model, row))
        for key in own:
            if key.startswith(f"{name}."):
                assert_close(together[key], own[key], atol=1e-9, rtol=1e-7)
                assert own[key].any()
    none = gradients(model(IDS, adapter_ids=[-1] * 5)[0])
    assert not any(value.any() for key, value in none.items() if key.startswith(tuple(f"{name}." for name in MAKE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_masks_and_kernels(family, backend, dtype):
    """Padding, causality, weights of the caller's, and a prefix of another weight."""
    model = build(family, dtype, attention_backend=backend)
    model.get_mixin("prefix").scale = 0.5
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 9, 2])[:, None])[:, None, None]
    if family == "gpt2":
        mask = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    weights = torch.randn(5, 1, 1, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    mixed = model(IDS, attention_mask=mask, log_attention_weights=weights, adapter_ids=torch.tensor(CHOSEN))[0]
    for row in range(5):
        part = slice(row, row + 1)
        expected = alone(model, row, attention_mask=mask[part], log_attention_weights=weights[part])
        seen = mask[row, 0, -1]
        assert_close(mixed[row][seen], expected[seen], atol=tolerance, rtol=tolerance)


def test_where_padding_is_left_out():
    model = build("bert")
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 9, 2])[:, None]
    call = {"attention_mask": mask[:, None, None], "adapter_ids": torch.tensor(CHOSEN)}
    found = model(IDS, **call, token_indices=mask.flatten().nonzero()[:, 0])[0]
    assert_close(found[mask], model(IDS, **call)[0][mask], atol=1e-5, rtol=1e-5)
    assert_close(
        found[1][mask[1]], alone(model, 1, attention_mask=mask[1:2, None, None])[mask[1]], atol=1e-5, rtol=1e-5
    )


def test_a_compiled_call_has_no_break():
    model = build("gpt2", num_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    chosen = torch.tensor(CHOSEN)
    assert_close(compiled(IDS, adapter_ids=chosen)[0], model(IDS, adapter_ids=chosen)[0], atol=1e-5, rtol=1e-5)
    flipped = chosen.flip(0)
    assert_close(compiled(IDS, adapter_ids=flipped)[0], model(IDS, adapter_ids=flipped)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cache_and_a_generator_keep_rows_apart(family):
    model = build(family)
    chosen = torch.tensor(CHOSEN)
    whole = model(IDS, adapter_ids=chosen)[0]
    prompts = [IDS[row, : 3 + row].tolist() for row in range(5)]
    mixed = generate(model, prompts, max_new_tokens=5, adapter_ids=CHOSEN)
    found = []
    for row, name in enumerate(NAMES):
        use(model, [name])
        found += generate(model, [prompts[row]], max_new_tokens=5)
    use(model, MAKE)
    assert [one.tokens for one in mixed] == [one.tokens for one in found]
    model.add_mixin("cache", StaticCacheMixin())
    cache, parts = KeyValueCache(9), []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        places = torch.arange(start, stop)[None]
        parts.append(model(IDS[:, start:stop], places, "causal", cache=cache, adapter_ids=chosen)[0])
        cache.advance(stop - start)
    assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "adapter"])
def test_files_keep_the_numbers(kind, tmp_path):
    model = build("gpt2")
    model.del_mixin("lora")
    numbers = {"prefix": 1, "adapter": 2, "ffadd": 3}
    if kind == "folder":
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
    else:
        save_adapter(model, tmp_path)
        again = FAMILIES["gpt2"].build().eval()
        load_adapter(again, tmp_path)
    assert {name: again.get_mixin(name).adapter_id for name in numbers} == numbers
    assert torch.equal(again(IDS, adapter_ids=[1, 2, 3, -1, 1])[0], model(IDS, adapter_ids=[1, 2, 3, -1, 1])[0])


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda config: PromptTuningMixin(config, 2), r"or call get_mixin\('late'\)\.disable\(\)"),
        (lambda config: PrefixTuningMixin(config, 2, first_position=2), r"or call get_mixin\('late'\)\.disable\(\)"),
        (lambda config: AdapterMixin(config, 4, runs_post=True), r"or call get_mixin\('late'\)\.disable\(\)"),
        (BitFitMixin, r"or call del_mixin\('late'\) if the base as it trained it is the base of all rows"),
        (LayerNormTuningMixin, r"or call del_mixin\('late'\) if"),
    ],
)
def test_a_method_that_reaches_every_row_is_refused(make, cure):
    """It would be there in rows of other methods without a word."""
    model = build("gpt2")
    model.add_mixin("late", make(model.config))
    mixin = model.get_mixin("late")
    assert mixin.adapter_id is None
    for chosen in (CHOSEN, torch.tensor(CHOSEN)):
        with pytest.raises(InputError, match=rf"'late', a {type(mixin).__name__} as it is here, reaches .*out, {cure}"):
            model(IDS, adapter_ids=chosen)
    model(IDS)
    model.del_mixin("late") if mixin.tuned_parameters else mixin.disable()
    model(IDS, adapter_ids=CHOSEN)


def test_an_adapter_that_comes_to_reorder_layers_reaches_every_row():
    model = build("gpt2")
    model.get_mixin("adapter").run_post()
    with pytest.raises(InputError, match="'adapter', a AdapterMixin as it is here, reaches every row"):
        model(IDS, adapter_ids=CHOSEN)


def test_a_list_names_numbers_that_there_are():
    model = build("gpt2")
    with pytest.raises(InputError, match=r"adapter_ids names \[4, 7\]; the model has \[-1, 0, 1, 2, 3\], -1 for none"):
        model(IDS, adapter_ids=[0, 4, 7, -1, 1])
    none = model(IDS, adapter_ids=torch.full((5,), 9))[0]
    assert_close(none, model(IDS, adapter_ids=[-1] * 5)[0])
    for name in ("prefix", "adapter", "ffadd"):
        use(model, [name])
        with pytest.raises(InputError, match=r"adapter_ids has the shape \[2\], and layer 0 .* each of the 5 samples"):
            model(IDS, adapter_ids=[0, 1])


def test_parts_of_a_model_have_numbers_of_their_own():
    model = FAMILIES["t5"].build().eval()
    model.add_mixin("decoder.one", AdapterMixin(model.decoder.config, 4))
    model.add_mixin("decoder.two", PrefixTuningMixin(model.decoder.config, 2))
    for part in ("one", "two"):
        with torch.no_grad():
            [parameter.normal_(std=0.3) for parameter in model.decoder.get_mixin(part).parameters()]
    run = FAMILIES["t5"].run
    mixed = run(model, adapter_ids=[1, -1])
    assert torch.equal(mixed, run(model, adapter_ids=torch.tensor([1, -1])))
    with pytest.raises(InputError, match=r"adapter_ids names \[2\]; the model has \[-1, 0, 1\]"):
        run(model, adapter_ids=[2, -1])
    twin = copy.deepcopy(model)
    twin.decoder.get_mixin("one").disable()
    assert_close(mixed[0], run(twin)[0], atol=1e-5, rtol=1e-5)
    twin.decoder.get_mixin("two").disable()
    assert_close(mixed[1], run(twin)[1], atol=1e-5, rtol=1e-5)
