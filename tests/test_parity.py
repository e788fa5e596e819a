"""The backbone equals the reference: recorded cases, and Hugging Face's GPT-2 on random weights."""

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import TransformerConfig
from sat_lightning.models import GPT2Model
from tests.golden_cases import Case, case_names

RIGHT = case_names()


@pytest.mark.parametrize("name", RIGHT)
def test_equals_the_recorded_outputs(name):
    Case(name).check()


@pytest.mark.parametrize("name", case_names("base_"))
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash", "flex"])
def test_equals_the_recorded_outputs_by_every_backend(name, backend):
    Case(name, attention_backend=backend).check()


@pytest.mark.parametrize("name", [name for name in case_names("base_|hook_|mixin_|gpt2") if name != "base_moe"])
def test_checkpointing_changes_no_output_and_no_gradient(name):
    gradients = []
    for changes in ({}, {"checkpoint_activations": True}, {"checkpoint_activations": True, "checkpoint_num_layers": 2}):
        case = Case(name, **changes)
        case.model.train()
        call = case.record["calls"][0]
        logits = case.run(call)[0]
        logits.square().mean().backward()
        gradients.append({k: p.grad for k, p in case.model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[-1].keys()
        for key, gradient in gradients[-1].items():
            assert_close(gradient, gradients[0][key], atol=1e-7, rtol=1e-5)


def test_log_attention_weights_are_never_dropped():
    case = Case("bug_logweights_ignored")
    calls = {call["name"]: call for call in case.record["calls"]}
    assert_close(case.run(calls["causal"])[0], case.tensors["expected.causal.logits"], atol=3e-6, rtol=1e-5)
    got = case.run(calls["causal_logw"])[0]
    assert (got - case.tensors["expected.causal_logw.logits"]).abs().max() > 1e-3, "the recorded fault came back"
    eager = Case("bug_logweights_ignored", attention_backend="eager")
    assert_close(got, eager.run(calls["causal_logw"])[0], atol=3e-6, rtol=1e-5)


def test_a_padding_mask_is_never_taken_for_a_causal_one():
    case = Case("bug_keypad_first_only")
    calls = {call["name"]: call for call in case.record["calls"]}
    right = case.run(calls["as_b1ss"])[0]
    assert_close(right, case.tensors["expected.as_b1ss.logits"], atol=3e-6, rtol=1e-5)
    assert_close(case.run(calls["as_b11s"])[0], right, atol=3e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def hf_pair():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 48, "n_head": 4, "vocab_size": 97, "n_positions": 32}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, tie_word_embeddings=False, attn_implementation="eager")
    )
    config = TransformerConfig(
        num_layers=3, hidden_size=48, num_attention_heads=4, vocab_size=97, max_sequence_length=32
    )
    ours = GPT2Model(config)
    state = {k: torch.randn_like(v) * 0.1 for k, v in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(_from_hugging_face(state, config.num_layers), strict=True)
    return theirs.eval(), ours.eval()


def _from_hugging_face(theirs, num_layers):
    """Rename GPT-2's tensors; its linears are stored transposed."""
    ours = {
        "transformer.word_embeddings.weight": theirs["transformer.wte.weight"],
        "transformer.position_embeddings.weight": theirs["transformer.wpe.weight"],
        "mixins.gpt2-final.lm_head.weight": theirs["lm_head.weight"],
    }
    names = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    for i in range(num_layers):
        for our_name, their_name in names.items():
            for kind in ("weight", "bias"):
                tensor = theirs[f"transformer.h.{i}.{their_name}.{kind}"]
                is_linear = "layernorm" not in our_name and kind == "weight"
                ours[f"transformer.layers.{i}.{our_name}.{kind}"] = tensor.T if is_linear else tensor
    for kind in ("weight", "bias"):
        ours[f"transformer.final_layernorm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
    return ours


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_gpt2_equals_hugging_face(hf_pair, dtype, tolerance):
    theirs, ours = (model.to(dtype) for model in hf_pair)
    ids = torch.randint(0, 97, (3, 17))
    with torch.no_grad():
        assert_close(ours(ids)[0], theirs(ids).logits, atol=tolerance, rtol=tolerance)
        padding = torch.ones(3, 17, dtype=torch.long)
        padding[1, 11:], padding[2, 5:] = 0, 0
        mask = padding[:, None, None, :].bool() & torch.ones(17, 17, dtype=torch.bool).tril()
        mine, reference = ours(ids, attention_mask=mask)[0], theirs(ids, attention_mask=padding).logits
        visible = padding.bool()
        assert_close(mine[visible], reference[visible], atol=tolerance, rtol=tolerance)
    for model in hf_pair:
        model.to(torch.float32)


def test_gpt2_loss_and_gradients_equal_hugging_face(hf_pair):
    theirs, ours = hf_pair
    ids = torch.randint(0, 97, (2, 17))
    loss = ours(ids[:, :-1], target_ids=ids[:, 1:])[0]
    reference = theirs(ids, labels=ids).loss
    assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    loss.backward()
    reference.backward()
    mine = dict(ours.named_parameters())
    expected = _from_hugging_face({k: p.grad for k, p in theirs.named_parameters()}, 3)
    for name, gradient in expected.items():
        assert_close(mine[name].grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    ours.zero_grad()
    theirs.zero_grad()
