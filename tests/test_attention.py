"""Every backend equals attention written out, for every kind of mask and head."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sat_lightning import BaseModel, TransformerConfig
from sat_lightning.errors import InputError
from sat_lightning.models import GPT2Model
from sat_lightning.nn import attention_fn_default, standard_attention
from sat_lightning.nn.masks import make_masks

BACKENDS = ["auto", "eager", "sdpa", "flash", "flex"]
BATCH, HEADS, SIZE = 3, 4, 8


def make_mask(kind: str, s: int, t: int, dtype: torch.dtype):
    """Return (tensor for the definition, what the backbone passes)."""
    like = torch.zeros(1, dtype=dtype)
    causal = torch.ones(s, t).tril(t - s)
    padding = torch.ones(BATCH, 1, 1, t)
    padding[1, ..., t // 2 :], padding[2, ..., 1:] = 0, 0
    if kind == "full":
        mask, known = make_masks(None, batch_size=BATCH, query_length=s, like=like)
        return torch.ones(1, 1), mask, known
    if kind == "causal":
        mask, known = make_masks(-1, batch_size=BATCH, query_length=s, like=like)
        return causal, mask, known
    tensor = {
        "padding": padding,
        "padded causal": padding * causal,
        "blind rows": padding * causal * (torch.arange(s) % 3 != 1)[:, None],
        "one row a query": causal,
    }[kind]
    mask, known = make_masks(tensor.bool(), batch_size=BATCH, query_length=s, like=like)
    return tensor, mask, known


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "causal", "padding", "padded causal", "blind rows", "one row a query"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("s", "t"), [(7, 7), (3, 7), (1, 7), (7, 3)])
def test_every_backend_equals_the_definition(backend, kind, key_heads, s, t):
    query = torch.randn(BATCH, HEADS, s, SIZE)
    key, value = torch.randn(2, BATCH, key_heads, t, SIZE)
    tensor, mask, known = make_mask(kind, s, t, torch.float32)
    for weights in (None, torch.randn(1, HEADS, s, t), torch.randn(BATCH, 1, s, t)):
        for scaled in (True, False):
            options = {"log_attention_weights": weights, "scaling_attention_score": scaled}
            expected = standard_attention(query, key, value, tensor, **options)
            got = attention_fn_default(query, key, value, mask, attention_backend=backend, **options, **known)
            assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "flash"])
@pytest.mark.parametrize("kind", ["full", "causal", "padding", "blind rows"])
def test_gradients_equal_the_definition(backend, kind):
    inputs = [torch.randn(BATCH, HEADS, 6, SIZE, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, HEADS, 6, 6, requires_grad=True)
    tensor, mask, known = make_mask(kind, 6, 6, torch.float32)
    gradient = torch.randn(BATCH, HEADS, 6, SIZE)
    for extra in (None, weights):
        leaves = inputs + ([] if extra is None else [extra])
        expected = torch.autograd.grad(
            standard_attention(*inputs, tensor, log_attention_weights=extra), leaves, gradient
        )
        options = {"log_attention_weights": extra, "attention_backend": backend, **known}
        if backend == "flash" and extra is not None:
            with pytest.raises(InputError, match="'flash' gives log_attention_weights no gradient: choose 'sdpa'"):
                attention_fn_default(*inputs, mask, **options)
            continue
        got = torch.autograd.grad(attention_fn_default(*inputs, mask, **options), leaves, gradient)
        for mine, theirs in zip(got, expected, strict=True):
            assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["causal", "padding", "blind rows"])
def test_bf16_equals_fp32_within_its_precision(backend, kind):
    query, key, value = torch.randn(3, BATCH, HEADS, 9, SIZE).bfloat16()
    tensor, mask, known = make_mask(kind, 9, 9, torch.bfloat16)
    expected = standard_attention(query.float(), key.float(), value.float(), tensor)
    got = attention_fn_default(query, key, value, mask, attention_backend=backend, **known)
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


def test_fractions_scale_the_scores_on_every_fused_backend():
    query, key, value = torch.randn(3, BATCH, HEADS, 5, SIZE)
    tensor = 1 - torch.rand(BATCH, 1, 5, 5) * 2e-4
    tensor[..., 0] = 0
    expected = standard_attention(query, key, value, tensor)
    rounded = standard_attention(query, key, value, tensor.round())
    assert (expected - rounded).abs().max() > 1e-2
    mask, known = make_masks(tensor, batch_size=BATCH, query_length=5, like=query)
    for backend in BACKENDS:
        got = attention_fn_default(query, key, value, mask, attention_backend=backend, **known)
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_averages_all_values():
    query, key, value = torch.randn(3, 2, HEADS, 4, SIZE)
    mask, known = make_masks(torch.zeros(4, 4, dtype=torch.bool), batch_size=2, query_length=4, like=query)
    for backend in BACKENDS:
        got = attention_fn_default(query, key, value, mask, attention_backend=backend, **known)
        assert_close(got, value.mean(2, keepdim=True).expand_as(got), atol=1e-5, rtol=1e-5)


def test_known_masks_take_the_fast_paths_by_identity(monkeypatch):
    calls = []
    real = nn.functional.scaled_dot_product_attention

    def spy(*args, **kw):
        calls.append((kw.get("is_causal", False), kw.get("attn_mask") is not None))
        return real(*args, **kw)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    model = BaseModel(TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=9))
    ids = torch.zeros(2, 6, dtype=torch.long)
    model(ids, attention_mask=None)
    model(ids, attention_mask="causal")
    model(ids, attention_mask=torch.ones(6, 6, dtype=torch.bool).tril())  # equal, but not known: never looked at
    assert calls == [(False, False), (True, False), (False, True)]


def test_dropout_of_attention_acts_in_training_only():
    model = GPT2Model(
        TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, vocab_size=9, attention_dropout=0.5)
    )
    ids = torch.arange(8)[None]
    assert not torch.equal(model.train()(ids)[0], model(ids)[0])
    assert torch.equal(model.eval()(ids)[0], model(ids)[0])
    eager = standard_attention(*torch.randn(3, 1, 1, 64, 8), torch.ones(1, 1), nn.Dropout(0.5).train())
    assert torch.isfinite(eager).all()


def test_flex_refuses_what_it_cannot_do():
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    with pytest.raises(InputError, match="attention_backend 'flex' has no backward pass on CPU: choose 'sdpa'"):
        attention_fn_default(query, query, query, None, attention_backend="flex")
    with pytest.raises(InputError, match="attention_backend 'flex' has no dropout: set attention_dropout to 0"):
        attention_fn_default(query, query, query, None, nn.Dropout(0.1).train(), attention_backend="flex")


def test_a_hook_that_adds_keys_must_extend_the_mask():
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(InputError, match=r"attention_mask has shape \[4, 4\], the scores are \[4, 6\]"):
        attention_fn_default(query, key, key, torch.ones(4, 4))
