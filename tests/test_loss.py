"""The chunked head loss equals `cross_entropy(linear(...))`, in value and gradients, wherever it may be called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sat_lightning.errors import InputError
from sat_lightning.nn.loss import linear_cross_entropy

CLASSES, FEATURES = 50, 16


def reference(hidden, weight, targets, *, bias=None, ignore_index=-100, reduction="mean"):
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses


def inputs(*shape: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"hidden": (*shape, FEATURES), "weight": (CLASSES, FEATURES)} | ({"bias": (CLASSES,)} if bias else {})
    tensors = {name: torch.randn(size, generator=generator).to(dtype).requires_grad_() for name, size in sizes.items()}
    targets = torch.randint(0, CLASSES, shape, generator=generator)
    targets.view(-1)[1:3] = -100
    return {**tensors, "targets": targets}


def loss_and_gradients(function, tensors, scale=1.0, **options):
    leaves = [x for name, x in tensors.items() if name != "targets" and x.requires_grad]
    arguments = [tensors[name] for name in ("hidden", "weight", "targets")]
    loss = function(*arguments, bias=tensors.get("bias"), **options)
    return loss.detach(), *torch.autograd.grad((loss * scale).sum(), leaves)


def assert_same(actual, expected, tolerance=1e-5):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "chunk_size"), [((3, 7), 4), ((3, 7), 7), ((3, 7), 21), ((5,), 64), ((2, 3, 5), None)]
)
def test_equals_cross_entropy_of_linear(shape, chunk_size, bias, reduction):
    tensors = inputs(*shape, bias=bias)
    scale = torch.linspace(-1, 2, tensors["targets"].numel()).view(shape) if reduction == "none" else 3.0
    ours = loss_and_gradients(linear_cross_entropy, tensors, scale, chunk_size=chunk_size, reduction=reduction)
    assert_same(ours, loss_and_gradients(reference, tensors, scale, reduction=reduction))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed):
    rows, chunk_size = (int(x) for x in torch.randint(1, 40, (2,), generator=torch.Generator().manual_seed(seed)))
    tensors = inputs(rows + 3, seed=seed)
    ours = loss_and_gradients(linear_cross_entropy, tensors, chunk_size=chunk_size)
    assert_same(ours, loss_and_gradients(reference, tensors))


def test_gradcheck_in_double_precision():
    tensors = inputs(2, 5, dtype=torch.float64)
    for reduction in ("mean", "none"):

        def run(hidden, weight, bias, reduction=reduction):
            targets = tensors["targets"]
            return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_size=3, reduction=reduction)

        assert torch.autograd.gradcheck(run, (tensors["hidden"], tensors["weight"], tensors["bias"]))


def test_many_classes_are_split_into_blocks(monkeypatch):
    monkeypatch.setattr("sat_lightning.nn.loss._CPU_BLOCK", 3 * CLASSES)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        tensors = inputs(11, dtype=dtype)
        ours = loss_and_gradients(linear_cross_entropy, tensors, chunk_size=8)
        assert_same(ours, loss_and_gradients(reference, tensors), tolerance)


def test_bfloat16_has_float32_statistics():
    """Gradients within 3 % of fp32 (bf16 has 8 bits); the loss, which torch rounds to bf16, within 2 %."""
    tensors = inputs(64, dtype=torch.bfloat16, bias=False)
    exact = {name: x if name == "targets" else x.detach().float().requires_grad_() for name, x in tensors.items()}
    ours, expected = (
        loss_and_gradients(function, x) for function, x in ((linear_cross_entropy, tensors), (reference, exact))
    )
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for actual, true in zip(ours, expected, strict=True):
        assert (actual.float() - true).norm() / true.norm() < 0.03
    # From the same bf16 logits, the loss itself is exact to fp32.
    logits = F.linear(tensors["hidden"], tensors["weight"]).float()
    torch.testing.assert_close(ours[0], F.cross_entropy(logits, tensors["targets"]), atol=1e-5, rtol=1e-5)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 3e4]], requires_grad=True)
    tensors = {"hidden": hidden, "weight": weight, "targets": torch.tensor([1, 2])}
    ours = loss_and_gradients(linear_cross_entropy, tensors)
    assert ours[0] == 1e4
    assert_same(ours, loss_and_gradients(reference, tensors))


def test_autocast_computes_in_half_and_returns_gradients_in_the_dtype_of_the_parameters():
    tensors = inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, tensors, chunk_size=4)
        expected = loss_and_gradients(reference, tensors)
    assert all(x.dtype == torch.float32 for x in ours)
    assert_same(ours, expected, 0.03)
    assert not torch.equal(ours[0], loss_and_gradients(linear_cross_entropy, tensors)[0])


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias")])
def test_what_is_frozen_costs_nothing(frozen, monkeypatch):
    tensors = inputs(9)
    for name in frozen:
        tensors[name].requires_grad_(False)
    assert_same(loss_and_gradients(linear_cross_entropy, tensors), loss_and_gradients(reference, tensors))
    products = count_products(monkeypatch)
    linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["targets"], bias=tensors["bias"])
    assert len(products) == 4 - len(frozen)


def count_products(monkeypatch) -> list[str]:
    called = []
    for name in ("mm", "addmm", "addmv"):
        original = getattr(torch, name)

        def run(*args, _name=name, _run=original, **kw):
            called.append(_name)
            return _run(*args, **kw)

        monkeypatch.setattr(torch, name, run)
    return called


def test_without_gradients_only_the_logits_are_computed(monkeypatch):
    tensors = inputs(9, bias=False)
    products = count_products(monkeypatch)
    with torch.no_grad():
        loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["targets"])
    assert products == ["mm"]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(tensors["hidden"], tensors["weight"], tensors["targets"]).detach())


@pytest.mark.parametrize("loss_function", [linear_cross_entropy, reference])
def test_weight_tied_to_the_embedding_collects_both_gradients(loss_function):
    table = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(6)
    loss_function(F.embedding(ids, table).tanh(), table, ids + 1).backward()
    expected = torch.func.grad(lambda w: reference(F.embedding(ids, w).tanh(), w, ids + 1))(table.detach())
    assert_same([table.grad], [expected])


def test_batch_without_targets_gives_zero_and_leaves_the_weights_alone():
    tensors = inputs(4)
    tensors["targets"] = torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        for x in loss_and_gradients(linear_cross_entropy, tensors, reduction=reduction):
            assert torch.equal(x, torch.zeros_like(x))
    empty = inputs(0)
    for x in loss_and_gradients(linear_cross_entropy, empty):
        assert torch.equal(x, torch.zeros_like(x))


def test_ignore_index_of_the_caller():
    tensors = inputs(6)
    tensors["targets"] = torch.tensor([0, 1, 7, 7, 2, 3])
    ours = loss_and_gradients(linear_cross_entropy, tensors, ignore_index=7)
    assert_same(ours, loss_and_gradients(reference, tensors, ignore_index=7))
    assert torch.equal(ours[1][2:4], torch.zeros(2, FEATURES))


def test_inputs_of_any_strides():
    tensors = inputs(4, 6)
    strided = {
        "hidden": tensors["hidden"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "weight": tensors["weight"].detach().t().contiguous().t().requires_grad_(),
        "bias": tensors["bias"].detach().repeat_interleave(2)[::2].requires_grad_(),
        "targets": tensors["targets"].t().contiguous().t(),
    }
    assert not any(x.is_contiguous() for x in strided.values())
    ours = loss_and_gradients(linear_cross_entropy, strided, chunk_size=5)
    assert_same(ours, loss_and_gradients(reference, tensors))


def test_graph_may_be_used_twice():
    tensors = inputs(5)
    loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["targets"])
    (loss + 2 * loss).backward(retain_graph=True)
    (0.5 * loss).backward()
    expected = loss_and_gradients(reference, {k: v for k, v in tensors.items() if k != "bias"}, 3.5)
    assert_same([tensors["hidden"].grad, tensors["weight"].grad], expected[1:])


def test_inputs_are_left_as_they_were():
    tensors = inputs(5)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    loss_and_gradients(linear_cross_entropy, tensors, reduction="none")
    loss_and_gradients(linear_cross_entropy, tensors)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())


class Head(nn.Module):
    def __init__(self, loss_function, reentrant: bool | None = None):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.loss_function, self.reentrant = loss_function, reentrant

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        hidden = self.body(hidden).tanh()
        if self.reentrant is None:
            return self.loss(hidden, targets)
        return checkpoint(self.loss, hidden, targets, use_reentrant=self.reentrant)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.loss_function(hidden, self.head.weight, targets, bias=self.head.bias)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    plain = Head(reference)
    ours = Head(linear_cross_entropy, reentrant)
    ours.load_state_dict(plain.state_dict())
    tensors = inputs(6)
    for model in (plain, ours):
        model(tensors["hidden"].detach(), tensors["targets"]).backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.usefixtures("no_unfinished_kernels")
def test_compiles_into_one_graph_without_recompiling():
    eager = Head(linear_cross_entropy)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            tensors = inputs(3, 4, seed=seed)
            for run, owner in ((eager, eager), (compiled, model)):
                owner.zero_grad()
                run(tensors["hidden"].detach(), tensors["targets"]).mul(2).backward()
            assert_same([p.grad for p in model.parameters()], [p.grad for p in eager.parameters()])


def test_operator_is_well_formed():
    tensors = inputs(5)
    arguments = (tensors["hidden"], tensors["weight"], tensors["bias"], torch.arange(5), torch.ones(5), 2)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    operator = torch.ops.sat_lightning.chunked_linear_cross_entropy.default
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(operator, (*detached, *needs), test_utils=("test_schema", "test_faketensor"))


def test_logits_of_all_tokens_are_never_held():
    """The largest tensor allocated is the weight's gradient or one chunk, not `[n, v]`."""
    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.randint(0, 512, (4096,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets, chunk_size=64).backward()
    allocated = [event.nbytes() for event in _allocations(profile)]
    assert allocated and max(allocated) <= 4096 * 8 * 4 < 4096 * 512 * 4


def _allocations(profile):
    events = profile.profiler.kineto_results.events()
    return [event for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 5)}, r"hidden_states has 5 features, weight \[50, 16\] reads 16"),
        ({"targets": torch.zeros(2, 2).long()}, r"target_ids has shape \[2, 2\], hidden_states \[2, 3, 16\]"),
        ({"bias": torch.zeros(49)}, r"bias has shape \[49\], weight has 50 rows"),
        ({"chunk_size": 0}, "chunk_size is 0; it counts tokens"),
        ({"reduction": "average"}, "reduction is 'average'. Choose 'mean', 'sum' or 'none'"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {**inputs(2, 3), **change}
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


def test_target_outside_the_vocabulary_is_refused():
    tensors = inputs(3)
    with pytest.raises((IndexError, RuntimeError), match="index 50 is out of bounds"):
        linear_cross_entropy(tensors["hidden"], tensors["weight"], torch.tensor([0, CLASSES, 1]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_sums_over_many_tokens_neither_overflow_nor_round_away(dtype, tolerance):
    hidden = torch.randn(20_000, 16).to(dtype)
    hidden[:, 0] = 10.0  # in fp16 the sum over all tokens of one class would be infinite
    weight = (torch.randn(30, 16) * 0.1).to(dtype).requires_grad_()
    bias = torch.zeros(30, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 2, (20_000,))
    linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_size=64).backward()
    exact_weight, exact_bias = (x.detach().float().requires_grad_() for x in (weight, bias))
    F.cross_entropy(F.linear(hidden.float(), exact_weight, exact_bias), targets).backward()
    for got, exact in ((weight.grad, exact_weight.grad), (bias.grad, exact_bias.grad)):
        assert got.dtype == dtype
        assert (got.float() - exact).abs().max() < tolerance * exact.abs().max()
