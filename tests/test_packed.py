"""Weights laid out for a CPU's products: the same numbers, no trace left, never those of an earlier training step."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sat_lightning.generation import generate, packed
from tests.families import FAMILIES
from tests.test_generate import Watched, prompts_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.fixture(params=[1, 2])
def num_threads(request):
    """The layout depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_copied_weights_multiply_alike_and_leave_no_trace(dtype, num_rows, num_threads, monkeypatch):
    monkeypatch.setattr(packed, "_MIN_NUMBERS", 0)
    model = FAMILIES["llama"].build(tie_word_embeddings=True).eval().to(dtype)
    rows, kinds = prompts_of("llama")[:num_rows], [type(module) for module in model.modules()]
    generate(model, rows, max_new_tokens=4, pack_weights=True)
    with torch.no_grad():  # weights that changed since an earlier call
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain, copied = Watched(), Watched()
    generate(model, rows, max_new_tokens=4, strategy=plain, pack_weights=False)
    generate(model, rows, max_new_tokens=4, strategy=copied, pack_weights=True)
    assert_close(copied.seen[0], plain.seen[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_every_layout_multiplies_alike(dtype, shape, num_threads, monkeypatch):
    monkeypatch.setattr(packed, "_MIN_NUMBERS", 0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for num_rows in (1, 3):
        weights = packed.PackedWeights(num_rows)
        for num_tokens in (1, 5):  # a prompt passes through the same copies
            x = torch.randn(num_rows, num_tokens, shape[1]).to(dtype)
            for offset in (None, bias):
                expected = F.linear(x, weight, offset)
                assert_close(weights.multiply(x, weight, offset), expected, atol=TOLERANCE[dtype], rtol=0.02)


@pytest.mark.usefixtures("no_unfinished_kernels")
def test_a_row_compiles_to_the_same_product():
    def products(xs, weights, bias):
        return [packed.multiply_vector(x, weight, offset) for x, weight, offset in zip(xs, weights, bias, strict=True)]

    longer = torch.randn(1, 3, 20)
    xs = [torch.randn(1, 1, 20), longer[:, -1:], torch.randn(20).bfloat16(), torch.randn(1, 1, 20).bfloat16()]
    weights = [torch.randn(33, 20).to(x.dtype) for x in xs]
    bias = [None, torch.randn(33), None, torch.randn(33).bfloat16()]
    got = torch.compile(products, fullgraph=True)(xs, weights, bias)
    for result, expected in zip(got, map(F.linear, xs, weights, bias), strict=True):
        assert result.shape == expected.shape
        assert_close(result, expected, atol=TOLERANCE[result.dtype], rtol=0.02)


def test_a_compiled_row_makes_no_copies_and_sees_new_weights(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was copied")

    monkeypatch.setattr(packed.PackedWeights, "_copy", refuse)
    model, rows = FAMILIES["gpt2"].build().eval(), prompts_of("gpt2")[:1]
    kinds = [type(module) for module in model.modules()]
    written = []
    for _ in range(2):
        eager, compiled = Watched(), Watched()
        expected = generate(model, rows, max_new_tokens=6, strategy=eager, pack_weights=False)
        written.append(generate(model, rows, max_new_tokens=6, strategy=compiled, compile=True))
        assert [r.tokens for r in written[-1]] == [r.tokens for r in expected]
        for ours, theirs in zip(compiled.seen, eager.seen, strict=True):
            assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    assert written[0][0].tokens != written[1][0].tokens
    assert [type(module) for module in model.modules()] == kinds
