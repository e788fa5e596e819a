"""`torch.compile(fullgraph=True)` over a model with its mixins stacked: one graph, no recompilation, equal numbers."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.models import GPT2Model
from tests import sat_style
from tests.test_hooks import STACKS, stacked
from tests.test_hooks import TINY as THREE_LAYERS

pytestmark = pytest.mark.usefixtures("no_unfinished_kernels")
TINY = THREE_LAYERS.replace(num_layers=2)


class LinearScale(BaseMixin):
    """Wraps `linear_forward` and `query_key_forward`, as LoRA and QK-norm do."""

    def __init__(self, num_layers):
        super().__init__()
        self.scale = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(1)) for _ in range(num_layers)])

    @non_conflict
    def linear_forward(self, x, *, linear, name, layer_id, old_impl=None, **kw):
        output = old_impl(x, linear=linear, name=name, layer_id=layer_id, **kw)
        return output * self.scale[layer_id] if name == "dense" else output

    @non_conflict
    def query_key_forward(self, query, key, old_impl=None, **kw):
        query, key = old_impl(query, key, **kw)
        return torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(key, dim=-1)


def build(name: str) -> BaseModel:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2Model(TINY)
    if name == "relative bias":
        model = BaseModel(TINY)
        model.add_mixin("bias", sat_style.RelativeBiasMixin(4, 6))
    elif name == "decoder":
        model = BaseModel(TINY.replace(is_decoder=True, layernorm_order="post"))
    else:
        model = stacked(STACKS[name.removesuffix(" checkpointed")].replace(num_layers=2))
    if name.endswith("checkpointed"):
        model = stacked(STACKS[name.removesuffix(" checkpointed")].replace(num_layers=2, checkpoint_activations=True))
    model.add_mixin("linears", LinearScale(TINY.num_layers))
    return model


@pytest.mark.parametrize(
    "name", ["gpt2", "plain", "plain checkpointed", "rotary-gqa", "experts", "relative bias", "decoder"]
)
def test_one_graph_no_recompilation_equal_outputs_and_gradients(name):
    torch._dynamo.reset()
    model = build(name).train()
    kw = {"encoder_outputs": torch.randn(2, 5, 32)} if name == "decoder" else {}
    batches = [torch.randint(0, 50, (2, 10)) for _ in range(3)]
    mask = -1 if name != "gpt2" else "causal"
    eager = []
    for ids in batches:
        model.zero_grad()
        logits = model(ids, attention_mask=mask, **kw)[0]
        logits.square().mean().backward()
        eager.append((logits.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
    # One stack goes through the real code generator, which takes a minute; the others stop before it.
    backend = "inductor" if name == "plain checkpointed" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for i, ids in enumerate(batches):
        if i == 1:  # from the second batch on nothing may be compiled again
            torch.compiler.set_stance("fail_on_recompile")
        try:
            model.zero_grad()
            logits = compiled(ids, attention_mask=mask, **kw)[0]
            logits.square().mean().backward()
        finally:
            torch.compiler.set_stance("default")
        assert_close(logits, eager[i][0], atol=1e-4, rtol=1e-4)
        for key, gradient in eager[i][1].items():
            got = dict(model.named_parameters())[key].grad
            assert_close(got, gradient, atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_the_fused_loss_compiles_into_one_graph():
    torch._dynamo.reset()
    model = GPT2Model(TINY).train()
    ids = torch.randint(0, 50, (2, 11))
    expected = model(ids[:, :-1], target_ids=ids[:, 1:])[0]
    expected.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(ids[:, :-1], target_ids=ids[:, 1:])[0]
    got.backward()
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for key, gradient in gradients.items():
        assert_close(dict(model.named_parameters())[key].grad, gradient, atol=1e-4, rtol=1e-3)


def test_untouched_layers_share_one_compiled_graph():
    torch._dynamo.reset()
    model = BaseModel(TransformerConfig(num_layers=6, hidden_size=32, num_attention_heads=4, vocab_size=50)).eval()
    counter = torch._dynamo.testing.CompileCounter()
    for layer in model.transformer.layers:
        layer.compile(fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        model(torch.randint(0, 50, (2, 8)))
    assert counter.frame_count <= 2, "layer_id may specialise once, then it is symbolic: never a graph a layer"
