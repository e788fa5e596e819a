"""Blocked attention equals attention written out, in value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat_lightning.nn import blocked_attention as module
from sat_lightning.nn.blocked_attention import blocked_attention, is_blocked_faster


def heads(length: int, batch: int = 2, num_heads: int = 3, size: int = 8, dtype=torch.float32) -> list[Tensor]:
    """Query, key and value as views of one projection, as the backbone passes them."""
    generator = torch.Generator().manual_seed(length)
    mixed = torch.randn(batch, length, 3 * num_heads * size, generator=generator).to(dtype)
    parts = (x.unflatten(-1, (num_heads, size)).transpose(1, 2) for x in mixed.split(num_heads * size, dim=-1))
    return [x.detach().requires_grad_() for x in parts]


def written_out(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    scores = scale * query @ key.transpose(-1, -2)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ value


def output_and_gradients(function, tensors: list[Tensor], **options) -> list[Tensor]:
    output = function(*tensors, **options)
    towards = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, towards)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 130, 257])
def test_equals_attention_written_out(length, is_causal):
    options = {"is_causal": is_causal, "scale": 0.3}
    ours = output_and_gradients(blocked_attention, heads(length), **options)
    for actual, expected in zip(ours, output_and_gradients(written_out, heads(length), **options), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_scores", [1, 64 * 130 * 4])
def test_groups_of_heads(num_scores, monkeypatch):
    """One head a time, and four of six heads, so that the last group is smaller."""
    options = {"is_causal": True, "scale": 0.3}
    expected = output_and_gradients(written_out, heads(130), **options)
    monkeypatch.setattr(module, "_NUM_SCORES", num_scores)
    for actual, wanted in zip(output_and_gradients(blocked_attention, heads(130), **options), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [48, 256])
def test_bfloat16_is_within_rounding_of_the_fused_kernel(length):
    """Relative error against fp64, which 8 bits limit to about 0.005: under 0.01, and 2.2 times the fused kernel's."""
    tensors = heads(length, size=64, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    options = {"is_causal": True, "scale": 0.125}
    ours, fused, expected = (
        output_and_gradients(function, inputs, **options)
        for function, inputs in (
            (blocked_attention, tensors),
            (F.scaled_dot_product_attention, tensors),
            (written_out, exact),
        )
    )
    for actual, kernel, true in zip(ours, fused, expected, strict=True):
        error, limit = ((x.double() - true).norm() / true.norm() for x in (actual, kernel))
        assert error < 0.01 and error < 2.2 * limit


def test_left_to_torch_under_torch_func():
    chosen: list[bool] = []
    query = torch.randn(1, 2, 256, 8, dtype=torch.bfloat16)
    torch.func.grad(lambda q: chosen.append(is_blocked_faster(q, q)) or q.sum())(query)
    assert chosen == [False] and is_blocked_faster(query, query) == module._has_bfloat16_products()


@pytest.mark.usefixtures("no_unfinished_kernels")
def test_compiles_into_one_graph_without_recompiling():
    options = {"is_causal": True, "scale": 0.3}
    compiled = torch.compile(blocked_attention, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in range(2):
            tensors = [x.detach().add(batch).requires_grad_() for x in heads(70)]
            ours = output_and_gradients(compiled, tensors, **options)
            for actual, expected in zip(ours, output_and_gradients(written_out, tensors, **options), strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_operators_are_well_formed():
    tensors = [x.detach().flatten(0, 1).contiguous() for x in heads(5)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operators = torch.ops.sat_lightning
    torch.library.opcheck(operators.blocked_attention.default, (*tensors, True, 0.5), test_utils=checks)
    arguments = (tensors[0], *tensors, True, 0.5)
    torch.library.opcheck(operators.blocked_attention_backward.default, arguments, test_utils=checks[:2])


def test_scores_are_not_kept():
    """What stays between forward and backward is the query, key and value, not `s * s` scores."""
    saved: list[int] = []
    tensors = heads(256)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        blocked_attention(*tensors, is_causal=True, scale=1.0)
    assert saved == [tensors[0].numel()] * 3


def test_chosen_only_where_it_is_faster():
    def chosen(length: int, dtype: torch.dtype, keys: int | None = None, device="cpu") -> bool:
        query = torch.empty(1, 2, length, 8, dtype=dtype, device=device)
        return is_blocked_faster(query, query.new_empty(1, 2, keys or length, 8))

    assert not any(chosen(256, dtype) for dtype in (torch.float32, torch.float64, torch.float16))
    assert not chosen(256, torch.bfloat16, keys=257) and not chosen(256, torch.bfloat16, device="meta")
    supported = module._has_bfloat16_products()
    assert [chosen(s, torch.bfloat16) for s in (8, 2048, 2049)] == [supported, supported, False]
