"""`generate` and `stream`: a ragged batch writes what each row writes alone, and what the uncached model writes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import BaseStrategy, generate, stream
from sat_lightning.mixins import KeyValueCache, StaticCacheMixin
from tests.families import FAMILIES, ids

CAUSAL = [
    "gpt2", "gptneo", "glm130b", "glm130b-2d", "chatglm2", "chatglm3", "chatglm4", "llama-old", "llama", "llama3",
    "mistral", "qwen2", "qwen3", "mixtral", "glm4v",
]  # fmt: skip
BLANKS = ["glm-blank", "chatglm"]
PAIRS = ["encoder-decoder", "t5", "t5-gated"]


class Watched(BaseStrategy):
    """Greedy without repeating a token, so that the path depends on every step; notes the logits of each."""

    def __init__(self):
        super().__init__(top_k=1)
        self.seen = []

    def process(self, logits, state):
        self.seen.append(logits)
        generated = state.tokens[:, state.prompt_length : state.length]
        return logits.scatter(1, generated.clamp(min=0), -1e4) if generated.numel() else logits


def prompts_of(name):
    rows = [ids(1, length, seed=length)[0].tolist() for length in (7, 3, 10, 3)]
    return [[*row, 1, 2] for row in rows] if name in BLANKS else rows


def uncached(model, row, num_tokens, start=None):
    """Write by running the whole text anew for each token; returns tokens and the logits of each step."""
    written, seen = [], []
    for _ in range(num_tokens):
        with torch.no_grad():
            if start is None:
                logits = model(torch.tensor([row + written]))[0][0, -1]
            else:
                decoder_ids = torch.tensor([[start, *written]])
                logits = model(enc_input_ids=torch.tensor([row]), dec_input_ids=decoder_ids)[1][0, -1]
        seen.append(logits)
        allowed = logits.clone()
        allowed[written] = -1e4
        written.append(int(allowed.argmax()))
    return written, torch.stack(seen)


@pytest.mark.parametrize("name", [*CAUSAL, *BLANKS, *PAIRS])
def test_ragged_batch_equals_uncached_rows(name):
    model, rows, strategy = FAMILIES[name].build().eval(), prompts_of(name), Watched()
    results = generate(model, rows, max_new_tokens=8, strategy=strategy)
    got = torch.stack(strategy.seen, dim=1)
    for index, row in enumerate(rows):
        tokens, logits = uncached(model, row, 8, 0 if name in PAIRS else None)
        assert_close(got[index], logits, atol=1e-5, rtol=1e-4)
        assert results[index].tokens == tokens and results[index].finish == "length"


def test_without_a_cache_the_mixin_does_nothing_and_leaves_the_state_dict():
    model = FAMILIES["gpt2"].build()
    before, names = model(ids())[0], list(model.state_dict())
    model.add_mixin("cache", StaticCacheMixin())
    assert torch.equal(model(ids())[0], before) and list(model.state_dict()) == names


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = FAMILIES["gpt2"].build().train()
    model.transformer.layers[0].eval()
    origins, modes = model.hook_origins, [module.training for module in model.modules()]
    generate(model, [[5, 6]], max_new_tokens=2)
    with pytest.raises(RuntimeError):
        generate(model, [[5, 6]], max_new_tokens=2, model_kw={"log_attention_weights": torch.ones(7, 7)})
    assert model.hook_origins == origins and [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_batches_by_length_keep_the_order_of_the_prompts():
    model, rows = FAMILIES["llama"].build().eval(), prompts_of("llama")
    whole = generate(model, rows, max_new_tokens=5)
    for batch_size in (1, 2, 3):
        parts = generate(model, rows, max_new_tokens=5, batch_size=batch_size)
        assert [r.tokens for r in parts] == [r.tokens for r in whole]
        assert [r.prompt_tokens for r in parts] == rows


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gptneo", "t5", "glm-blank"])
def test_prompts_read_in_parts_are_read_alike(name):
    model, rows = FAMILIES[name].build().eval(), prompts_of(name)
    whole, parts = Watched(), Watched()
    generate(model, rows, max_new_tokens=4, strategy=whole)
    generate(model, rows, max_new_tokens=4, strategy=parts, prefill_chunk=3)
    assert_close(torch.stack(parts.seen), torch.stack(whole.seen), atol=1e-5, rtol=1e-4)


def test_stream_yields_what_generate_returns():
    model, rows = FAMILIES["gpt2"].build().eval(), prompts_of("gpt2")
    results = generate(model, rows, max_new_tokens=6)
    written = {index: [] for index in range(len(rows))}
    last = {}
    for piece in stream(model, rows, max_new_tokens=6):
        written[piece.index].append(piece.token)
        last[piece.index] = piece.finish
    assert list(written.values()) == [r.tokens for r in results] and set(last.values()) == {"length"}
    assert "generation-cache" not in model.mixins


def test_rows_end_on_their_own():
    model, rows = FAMILIES["qwen3"].build().eval(), prompts_of("qwen3")
    free = [r.tokens for r in generate(model, rows, max_new_tokens=8, strategy=Watched())]
    ends = [free[0][2], free[2][5]]
    for check_every in (1, 3, 100):
        options = {"max_new_tokens": 8, "end_tokens": ends, "check_every": check_every}
        for row, result in zip(free, generate(model, rows, strategy=Watched(), **options), strict=True):
            until = min([row.index(end) + 1 for end in ends if end in row], default=8)
            assert result.tokens == row[:until] and result.finish == ("end" if row[until - 1] in ends else "length")


@pytest.mark.parametrize(
    ("prompts", "options", "error", "text"),
    [
        ([[]], {}, InputError, "prompt 0 is empty"),
        ([[5], [60]], {}, InputError, "prompt 1 holds the id 60; the model has 60 words"),
        ([[5], [5] * 24], {}, InputError, "prompt 1 has 24 tokens, and the model has 24 positions"),
        ([[5] * 20], {"max_new_tokens": 5}, InputError, "25 positions, the model has 24 .*lower max_new_tokens to 4"),
        ([[5]], {"end_tokens": [60]}, ConfigError, "60.* outside the vocabulary of 60"),
        (["text"], {}, InputError, "prompt 0 is a text; pass tokenizer="),
        ([5, 6], {}, InputError, "pass a list of prompts"),
        ([[5]], {"max_new_token": 5}, ConfigError, "Did you mean 'max_new_tokens'"),
        ([[5]], {"cache_dtype": "fp8"}, ConfigError, "cache_dtype is 'fp8', known are fp32, fp16, bf16, int8"),
    ],
)
def test_refusals(prompts, options, error, text):
    with pytest.raises(error, match=text):
        generate(FAMILIES["gpt2"].build(), prompts, **options)


def test_no_prompts_give_no_results():
    assert generate(FAMILIES["gpt2"].build(), []) == []


def test_a_cache_that_is_full_says_so():
    model = FAMILIES["gpt2"].build().eval()
    model.add_mixin("cache", StaticCacheMixin())
    with pytest.raises(InputError, match="holds 0 tokens of at most 4, 9 more do not fit. Make it with capacity=9"):
        model(ids(), cache=KeyValueCache(4))
