"""`generate` writes what Hugging Face's `generate` writes: the same weights, ragged prompts, greedy and by beams."""

import pytest
import torch
import transformers

from sat_lightning.generation import BeamSearchStrategy, generate
from sat_lightning.generation.beam_scoring import PlainBeamScoring
from tests.hf_parity import randomise, to_ours

SIZES = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "gptneo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **SIZES, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=4, max_position_embeddings=64,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=5)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, eos_token_id=2, pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
}  # fmt: skip
ROWS = [[5, 9, 17, 30, 8, 41, 12], [7, 22, 3], [40, 11, 33, 6, 19], [25]]


def pair(name):
    torch.manual_seed(0)
    theirs = MODELS[name]()
    randomise(theirs, std=0.3)
    return theirs.eval(), to_ours(theirs)[0]


def write_theirs(name, theirs, **options):
    """Tokens of each row up to its end, every row alone."""
    written = []
    for row in ROWS:
        ids = torch.tensor([row])
        found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
        begin = 1 if name == "t5" else len(row)
        for tokens in found[:, begin:].tolist():
            written.append(tokens[: tokens.index(2) + 1] if 2 in tokens else tokens)
    return written


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_hugging_face(name):
    theirs, ours = pair(name)
    expected = write_theirs(name, theirs, do_sample=False)
    assert len({tuple(row) for row in expected}) > 1
    results = generate(ours, ROWS, max_new_tokens=12, end_tokens=[2])
    assert [result.tokens for result in results] == expected
    packed = generate(ours, ROWS, max_new_tokens=12, end_tokens=[2], pack_weights=True)
    assert [result.tokens for result in packed] == expected


@pytest.mark.parametrize("name", MODELS)
def test_beams_equal_hugging_face(name):
    theirs, ours = pair(name)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.8, "do_sample": False}
    expected = write_theirs(name, theirs, **options)
    scoring = PlainBeamScoring(0.8, early_stopping=False)
    strategy = BeamSearchStrategy(3, end_tokens=[2], scoring=scoring)
    for batch_size in (None, 1):  # all rows at once with padding, and each alone without
        results = generate(ours, ROWS, max_new_tokens=12, strategy=strategy, batch_size=batch_size)
        found = [hypothesis.tokens for best in results for hypothesis in (best, *best.alternatives)]
        assert found == expected
