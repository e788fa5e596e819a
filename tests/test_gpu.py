"""What only a GPU can show: its kernels give the definition's numbers, and a step never waits for the device."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import BaseModel, TransformerConfig
from sat_lightning.models import GPT2Model
from sat_lightning.nn import attention_fn_default, standard_attention
from sat_lightning.nn.masks import make_masks
from tests.test_hooks import STACKS, stacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = TransformerConfig(num_layers=2, hidden_size=128, num_attention_heads=4, vocab_size=100)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "flex"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, -1, "padding"])
def test_every_backend_equals_the_definition(backend, key_heads, mask):
    query = torch.randn(2, 4, 64, 32, device="cuda", requires_grad=True)
    key, value = torch.randn(2, 2, key_heads, 64, 32, device="cuda")
    padding = torch.ones(2, 1, 1, 64, device="cuda", dtype=torch.bool)
    padding[1, ..., 40:] = False
    tensors = {None: torch.ones(1, 1, device="cuda"), -1: torch.ones(64, 64, device="cuda").tril(), "padding": padding}
    given, known = make_masks(
        padding if mask == "padding" else mask, batch_size=2, query_length=64, like=query.detach()
    )
    expected = standard_attention(query, key, value, tensors[mask].float())
    got = attention_fn_default(query, key, value, given, attention_backend=backend, **known)
    assert_close(got, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(x.square().sum(), query)[0] for x in (got, expected)]
    assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mask", [None, -1])
def test_flash_in_half_precision(mask):
    query, key, value = torch.randn(3, 2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
    given, known = make_masks(mask, batch_size=2, query_length=64, like=query)
    exact = torch.ones(64, 64, device="cuda").tril() if mask == -1 else torch.ones(1, 1, device="cuda")
    got = attention_fn_default(query, key, value, given, attention_backend="flash", **known)
    assert_close(
        got.float(), standard_attention(query.float(), key.float(), value.float(), exact), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("name", ["gpt2", "plain", "rotary-gqa"])
def test_a_training_step_never_waits_for_the_device(name):
    model = (GPT2Model(CONFIG) if name == "gpt2" else stacked(STACKS[name])).cuda().train()
    ids = torch.randint(0, 50, (2, 12), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    keywords = {"target_ids": ids} if name == "gpt2" else {}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model(ids, attention_mask=-1, **keywords)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cpu_and_gpu_agree():
    model = BaseModel(CONFIG).eval()
    ids = torch.randint(0, 100, (2, 20))
    expected = model(ids, attention_mask=-1)[0]
    assert_close(model.cuda()(ids.cuda(), attention_mask=-1)[0].cpu(), expected, atol=1e-4, rtol=1e-3)
