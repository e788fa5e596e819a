"""Options of the backbone: shapes, names, rotary rules, dropout, drop path, experts, cross attention."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sat_lightning import BaseMixin, BaseModel, TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.models import GPT2Model
from sat_lightning.nn import RMSNorm
from sat_lightning.nn.drop_path import drop_path
from sat_lightning.nn.rotary import RotaryEmbedding, rotate
from tests.golden_mixins import Router

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=16)
IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


def test_the_families_own_mask_and_positions():
    model = GPT2Model(TINY).eval()
    expected = model(IDS, torch.arange(10)[None], -1)[0]
    assert torch.equal(model(IDS)[0], expected)
    assert torch.equal(model(IDS, attention_mask="causal")[0], expected)
    assert not torch.allclose(model(IDS, attention_mask=None)[0], expected), "an explicit None is full attention"
    changed = IDS.clone()
    changed[:, -1] = 0
    assert torch.equal(model(changed)[0][:, :-1], expected[:, :-1]), "a later token changed an earlier one"
    plain = BaseModel(TINY).eval()
    assert torch.equal(plain(IDS)[0], plain(IDS, torch.arange(10), None)[0])


def test_a_callers_mask_is_honoured():
    model = GPT2Model(TINY).eval()
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    mask[1, ..., 0] = False
    got = model(IDS, attention_mask=mask)[0]
    assert_close(got[0], model(IDS)[0][0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[1], model(IDS)[0][1], atol=1e-3)


@pytest.mark.parametrize("order", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("is_decoder", [False, True, [False, True]])
def test_names_in_the_state_dict_are_sats(order, is_decoder):
    model = BaseModel(TINY.replace(layernorm_order=order, is_decoder=is_decoder, cross_attn_hidden_size=24))
    names = set(model.state_dict())
    for i in range(2):
        crosses = is_decoder[i] if isinstance(is_decoder, list) else is_decoder
        prefix = f"transformer.layers.{i}."
        assert (f"{prefix}third_layernorm.weight" in names) == (order == "sandwich")
        assert (f"{prefix}cross_attention.key_value.weight" in names) == crosses
        assert (f"{prefix}post_cross_attention_layernorm.weight" in names) == crosses
        if crosses:
            assert model.state_dict()[f"{prefix}cross_attention.key_value.weight"].shape == (64, 24)
    logits = model(IDS, encoder_outputs=torch.randn(2, 5, 24))[0]
    assert logits.shape == (2, 10, 50)


def test_biases_by_kind():
    def biases(**changes):
        return {k.split(".", 3)[-1] for k in BaseModel(TINY.replace(**changes)).state_dict() if k.endswith("bias")}

    linears = {
        "attention.query_key_value.bias",
        "attention.dense.bias",
        "mlp.dense_h_to_4h.bias",
        "mlp.dense_4h_to_h.bias",
    }
    assert linears <= biases(is_gated_mlp=True)
    assert "mlp.dense_h_to_4h_gate.bias" not in biases(is_gated_mlp=True)
    assert not linears & biases(use_bias=False)
    assert linears & biases(use_bias=False, use_qkv_bias=True) == {"attention.query_key_value.bias"}


def test_norms_activation_and_final_norm_are_chosen_by_the_class():
    model = BaseModel(TINY.replace(use_final_layernorm=False), layernorm=RMSNorm, activation_func=nn.functional.silu)
    assert not any("final_layernorm" in name or name.endswith("layernorm.bias") for name in model.state_dict())
    layer = model.transformer.layers[0]
    x = torch.randn(2, 3, 32)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert_close(layer.input_layernorm(x), expected)
    assert layer.mlp.activation_func is nn.functional.silu


def test_initial_weights_follow_their_rules_and_overrides():
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=500)
    state = BaseModel(config).state_dict()
    assert_close(state["transformer.word_embeddings.weight"].std().item(), 0.02, atol=1e-3, rtol=0)
    assert_close(state["transformer.layers.3.mlp.dense_h_to_4h.weight"].std().item(), 0.02, atol=1e-3, rtol=0)
    assert_close(state["transformer.layers.3.mlp.dense_4h_to_h.weight"].std().item(), 0.02 / 4, atol=3e-4, rtol=0)
    assert state["transformer.layers.3.attention.dense.bias"].abs().sum() == 0
    ones = BaseModel(TINY, init_method=nn.init.ones_).state_dict()
    assert (ones["transformer.layers.1.attention.dense.weight"] == 1).all()


def test_params_dtype_and_casts_keep_rotary_exact():
    config = TINY.replace(is_rotary_emb=True)
    model = BaseModel(config, params_dtype=torch.bfloat16)
    assert model.transformer.word_embeddings.weight.dtype == torch.bfloat16
    exact = BaseModel(config).transformer.position_embeddings.inv_freq
    assert torch.equal(model.transformer.position_embeddings.inv_freq, exact)
    assert torch.equal(model.half().float().transformer.position_embeddings.inv_freq, exact)
    with torch.device("meta"):
        built = BaseModel(config)
    built.to_empty(device="cpu")
    assert torch.equal(built.transformer.position_embeddings.inv_freq, exact)


# ---- rotary


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_rotation_is_the_complex_product(interleaved, dim):
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 0, 100, 3]])
    embedding = RotaryEmbedding(dim, base=100.0, interleaved=interleaved)
    got = rotate(x, *embedding(positions, torch.float32), interleaved)
    angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(0, dim, 2) / dim)
    if interleaved:
        pairs = torch.complex(x[..., 0:dim:2], x[..., 1:dim:2])
    else:
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = (
        torch.stack((turned.real, turned.imag), -1).flatten(-2)
        if interleaved
        else torch.cat((turned.real, turned.imag), -1)
    )
    assert_close(got, torch.cat((expected, x[..., dim:]), -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2},
    ],
)
def test_scaling_rules_equal_hugging_face(rule):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    embedding = RotaryEmbedding(32, base=10000.0, scaling=rule)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={**rule, "rope_theta": 10000.0},
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[rule["rope_type"]](config, "cpu")
    assert_close(embedding.inv_freq * embedding.stretch, expected, atol=1e-7, rtol=1e-5)
    assert embedding.magnitude == pytest.approx(magnitude)


def test_the_ntk_rule_stretches_only_the_slowest_frequency_wholly():
    plain = RotaryEmbedding(32)
    scaled = RotaryEmbedding(32, scaling={"rope_type": "ntk", "factor": 4.0})
    assert_close(scaled.stretch[0].item(), 1.0)
    assert_close(scaled.stretch[-1].item(), 0.25, atol=1e-5, rtol=1e-5)
    assert torch.equal(scaled.inv_freq, plain.inv_freq), "files hold the frequencies before scaling"
    with pytest.raises(ConfigError, match="rope_scaling: rule 'linear' needs the setting 'factor'"):
        RotaryEmbedding(32, scaling={"rope_type": "linear"})


def test_rotary_scores_depend_on_distance_only_and_reach_beyond_the_table():
    model = BaseModel(TINY.replace(is_rotary_emb=True, max_sequence_length=4)).eval()
    ids = IDS.clone()
    assert_close(model(ids, torch.arange(10))[0], model(ids, torch.arange(10) + 77)[0], atol=1e-4, rtol=1e-4)
    assert model(IDS)[0].shape == (2, 10, 50)


# ---- dropout, drop path


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    x = torch.ones(10_000, 2, 3)
    y = drop_path(x, 0.25, training=True)
    assert_close(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert_close(y.mean().item(), 1.0, atol=0.02, rtol=0)
    assert drop_path(x, 0.25, training=False) is x
    model = BaseModel(TINY.replace(drop_path=0.5)).train()
    assert not torch.equal(model(IDS)[0], model(IDS)[0])
    assert torch.equal(model.eval()(IDS)[0], model(IDS)[0])


def test_hidden_dropout_acts_at_its_three_places():
    model = BaseModel(TINY.replace(hidden_dropout=0.3))
    layer = model.transformer.layers[0]
    places = [model.transformer.embedding_dropout, layer.attention.output_dropout, layer.mlp.dropout]
    assert [place.p for place in places] == [0.3, 0.3, 0.3]
    for place in places:
        model.train()
        torch.manual_seed(0)
        with_it = model(IDS)[0]
        place.p = 0.0
        torch.manual_seed(0)
        assert not torch.equal(model(IDS)[0], with_it)


# ---- activation checkpointing


@pytest.mark.parametrize(
    ("num_layers", "every", "skip", "blocks"),
    [
        (4, 1, 0, [(0, 1, False), (1, 2, False), (2, 3, False), (3, 4, False)]),
        (5, 2, 0, [(0, 2, False), (2, 4, False), (4, 5, False)]),
        (5, 2, 2, [(0, 2, False), (2, 3, False), (3, 5, True)]),
        (3, 8, 1, [(0, 2, False), (2, 3, True)]),
    ],
)
def test_which_layers_are_recomputed(num_layers, every, skip, blocks):
    config = TINY.replace(
        num_layers=num_layers, checkpoint_activations=True, checkpoint_num_layers=every, checkpoint_skip_layers=skip
    )
    model = BaseModel(config)
    assert model.transformer.blocks() == blocks
    assert model.eval().transformer.blocks() == [(0, num_layers, True)]


def test_checkpointing_recomputes_the_same_dropout_and_really_recomputes():
    calls = []

    class Count(BaseMixin):
        @BaseMixin.non_conflict
        def mlp_forward(self, hidden_states, old_impl=None, **kw):
            calls.append(kw["layer_id"])
            return old_impl(hidden_states, **kw)

    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = BaseModel(TINY.replace(hidden_dropout=0.2, attention_dropout=0.2, checkpoint_activations=checkpoint))
        model.add_mixin("count", Count())
        calls.clear()
        torch.manual_seed(1)
        model.train()(IDS)[0].square().sum().backward()
        gradients.append(model.transformer.word_embeddings.weight.grad)
        assert calls == ([0, 1] if not checkpoint else [0, 1, 1, 0])
    assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


# ---- experts


def test_experts_equal_the_sum_over_the_chosen_ones():
    config = TINY.replace(num_experts=4, is_gated_mlp=True)
    model = BaseModel(config).eval()
    model.add_mixin("router", Router(2, 32, 4))
    mlp, hooks = model.transformer.layers[0].mlp, model.hooks
    x = torch.randn(2, 5, 32)
    got = mlp(x, hooks=hooks, layer_id=0)
    weights, chosen = model.get_mixin("router").routing_forward(x, 0)
    expected = torch.zeros(10, 32)
    for token in range(10):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            expected[token] += weight * mlp.expert(x.flatten(0, 1)[token], expert, hooks=hooks)
    assert_close(got.flatten(0, 1), expected, atol=1e-6, rtol=1e-5)


def test_an_expert_that_no_token_chose_still_gets_a_gradient():
    class First(BaseMixin):
        def routing_forward(self, hidden_states, **kw):
            count = hidden_states.shape[:-1].numel()
            return hidden_states.new_ones(count, 1), torch.zeros(count, 1, dtype=torch.long)

    model = BaseModel(TINY.replace(num_experts=3))
    model.add_mixin("router", First())
    model(IDS)[0].sum().backward()
    assert model.transformer.layers[0].mlp.dense_h_to_4h_2.weight.grad.abs().sum() == 0


def test_the_example_router_chooses_two_experts_that_sum_to_one():
    model = BaseModel(TINY.replace(num_experts=3))
    weights, chosen = model.transformer.layers[0].mlp.route(torch.randn(2, 5, 32))
    assert weights.shape == chosen.shape == (10, 2)
    assert_close(weights.sum(-1), torch.ones(10))
    assert (chosen[:, 0] != chosen[:, 1]).all()


# ---- cross attention


def test_cross_attention_masks_and_remembered_keys():
    model = BaseModel(TINY.replace(is_decoder=True)).eval()
    encoder = torch.randn(2, 6, 32)
    whole = model(IDS, encoder_outputs=encoder)[0]
    assert_close(model(IDS, encoder_outputs=encoder, cross_attention_mask=None)[0], whole)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.long)
    mask[..., 4:] = 0
    changed = encoder.clone()
    changed[:, 4:] = 9.0
    hidden = [model(IDS, encoder_outputs=e, cross_attention_mask=mask)[0] for e in (encoder, changed)]
    assert_close(hidden[0], hidden[1])
    assert not torch.allclose(hidden[0], whole, atol=1e-4)
    layers = model.transformer.layers
    remembered = []
    for layer in layers:
        mixed = layer.cross_attention.key_value(encoder)
        remembered.append(tuple(x.unflatten(-1, (4, 8)).transpose(1, 2) for x in mixed.chunk(2, -1)))
    assert_close(model(IDS, encoder_outputs=remembered)[0], whole)
    without = model(IDS)[0]
    assert without.shape == whole.shape
    assert not torch.allclose(without, whole, atol=1e-4)


def test_grouped_queries_equal_repeated_heads():
    torch.manual_seed(0)
    grouped = BaseModel(TINY.replace(num_multi_query_heads=2)).eval()
    full = BaseModel(TINY).eval()
    state = grouped.state_dict()
    for i in range(2):
        for kind in ("weight", "bias"):
            key = f"transformer.layers.{i}.attention.query_key_value.{kind}"
            q, k, v = state[key].split([32, 16, 16])
            k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
            state[key] = torch.cat((q, k, v))
    full.load_state_dict(state)
    assert_close(full(IDS)[0], grouped(IDS)[0], atol=1e-5, rtol=1e-5)


def test_target_ids_give_the_mean_cross_entropy_unless_somebody_wraps_the_head():
    model = GPT2Model(TINY)
    targets = IDS.clone()
    targets[0, :4] = -100
    logits = model(IDS)[0]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert model.hooks.computes_loss
    assert_close(model(IDS, target_ids=targets)[0], expected, atol=1e-5, rtol=1e-5)

    class Scale(BaseMixin):
        @BaseMixin.non_conflict
        def final_forward(self, logits, old_impl=None, **kw):
            return old_impl(logits, **kw) * 2

    model.add_mixin("scale", Scale())
    assert not model.hooks.computes_loss
    assert_close(model(IDS)[0], logits * 2)
    assert math.isfinite(expected.item())


def test_causality_survives_a_wrapper_that_copies_the_tensors_it_passes_on() -> None:
    """As ZeRO-3 and FSDP do: a mask known by its identity must not become another object on its way."""
    model = GPT2Model(TINY).eval()
    expected = model(IDS)[0]
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(x.view_as(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        )
    assert torch.equal(model(IDS)[0], expected)
    changed = IDS.clone()
    changed[:, -1] = 0
    assert torch.equal(model(changed)[0][:, :-1], expected[:, :-1]), "a later token changed an earlier one"
