"""Strategies beside Hugging Face's `generate` on a converted model: greedy texts, and what sampling draws from."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from sat_lightning.generation import BaseStrategy, DecodingState, generate, greedy
from tests.hf_parity import randomise, to_ours

PROMPTS = [[2, 5, 7, 5], [9, 3, 3, 1], [30, 31, 6, 0]]
NUM_STEPS, ENDS = 10, [1, 8, 17, 25]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40, "n_positions": 48}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    else:
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=40,
                intermediate_size=48, max_position_embeddings=48,
            )
        )  # fmt: skip
    randomise(theirs, std=0.3)
    return theirs.eval(), to_ours(theirs)[0]


#: Ours, theirs.
SETTINGS = {
    "plain": ({}, {}),
    "penalty": ({"signed_repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
    "ngrams": ({"no_repeat_ngram_size": 2, "ban_prompt_ngrams": True}, {"no_repeat_ngram_size": 2}),
    "words": ({"bad_words": [[4], [7, 8], [5, 2, 9]]}, {"bad_words_ids": [[4], [7, 8], [5, 2, 9]]}),
    "ends": (
        {"min_new_tokens": 5, "end_tokens": [1, 8, 17, 25]},
        {"min_new_tokens": 5, "eos_token_id": [1, 8, 17, 25]},
    ),
}
FILTERS = {
    "plain": {"temperature": 1.0, "top_k": 0},
    "hot": {"temperature": 1.7, "top_k": 12},
    "cold": {"temperature": 0.6, "top_k": 0, "top_p": 0.85},
    "both": {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "min_p": 0.02},
    "typical": {"temperature": 1.4, "top_k": 0, "typical_p": 0.8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_texts_are_theirs(pair, name):
    theirs, ours = pair
    settings, their_settings = SETTINGS[name]
    rows = torch.tensor(PROMPTS)
    options = {"eos_token_id": None, "pad_token_id": 39} | their_settings
    expected = theirs.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=NUM_STEPS, do_sample=False, **options
    )
    found = generate(ours, PROMPTS, strategy=greedy(**settings), max_new_tokens=NUM_STEPS)
    for result, row in zip(found, expected[:, rows.shape[1] :].tolist(), strict=True):
        assert row[: len(result.tokens)] == result.tokens and not set(row[len(result.tokens) :]) - {39}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("rules", ["plain", "penalty"])
def test_sampling_draws_from_what_theirs_draws_from(pair, name, rules):
    """Their own text, drawn with a seed, is put into our state: each step's probabilities are equal."""
    theirs, ours = pair
    filters, rows = FILTERS[name], torch.tensor(PROMPTS)
    settings, their_settings = SETTINGS[rules]
    torch.manual_seed(1)
    their_filters = {"top_k": 0, "top_p": 1.0} | filters
    out = theirs.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=NUM_STEPS, do_sample=True, eos_token_id=None,
        pad_token_id=39, output_scores=True, return_dict_in_generate=True, **their_filters, **their_settings,
    )  # fmt: skip
    strategy = BaseStrategy(**filters, **settings)
    state = strategy.start(DecodingState.create(rows, NUM_STEPS, seed=0))
    for step in range(NUM_STEPS):
        with torch.no_grad():
            logits = ours(state.tokens[:, : state.length])[0][:, -1]
        probs = strategy.filter(strategy.process(logits, state)).softmax(-1)
        assert_close(probs, out.scores[step].softmax(-1), atol=1e-5, rtol=1e-4)
        state.append(out.sequences[:, rows.shape[1] + step])
