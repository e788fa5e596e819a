"""`generate` and `stream`: a ragged batch writes what each row writes alone, and what the uncached model writes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import BaseStrategy, BeamSearchStrategy, generate, stream
from sat_lightning.generation.text import RowText
from sat_lightning.mixins import KeyValueCache, LoraMixin, StaticCacheMixin
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
        (torch.tensor([5, 6]), {}, InputError, "pass a list of prompts"),
        (np.array([5, 6]), {}, InputError, "pass a list of prompts"),
        ({"input_ids": [[5]]}, {}, InputError, "prompts is a dict; pass a list"),
        (None, {}, InputError, "prompts is a NoneType; pass a list"),
        ([[5], [5.5]], {}, InputError, "prompt 1 is a list of what are no ids; it must be a text, or whole numbers"),
        ([torch.tensor([5.5])], {}, InputError, r"prompt 0 is torch.float32 \[1\] of what are no ids"),
        ([[[5]]], {}, InputError, "prompt 0 is a list of what are no ids"),
        ([[5]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0, it must be a whole number of at least 1"),
        ([[5]], {"max_new_tokens": 2.5}, ConfigError, "max_new_tokens is 2.5, it must be a whole number"),
        ([[5]], {"seed": -1}, ConfigError, "seed is -1, it must be a whole number of at least 0"),
        ([[5]], {"end_tokens": "a"}, ConfigError, r"end_tokens must be ids, such as \[2\], not 'a'"),
        ([[5]], {"temperature": 0.5}, ConfigError, r"It belongs to the strategy: strategy=BaseStrategy\(temperature="),
        ([[5]], {"strategy": BaseStrategy}, ConfigError, "strategy is the class BaseStrategy; it must be an object"),
        ([[5]], {"strategy": "greedy"}, ConfigError, "strategy is a str; it must be an object with start, step"),
        ([[5]], {"cache_dtype": torch.int32}, ConfigError, "cache_dtype is torch.int32; it is a floating dtype or"),
        ([[5]], {"max_new_token": 5}, ConfigError, "Did you mean 'max_new_tokens'"),
        ([[5]], {"cache_dtype": "fp8"}, ConfigError, "cache_dtype is 'fp8', known are fp32, fp16, bf16, int8"),
    ],
)
def test_refusals(prompts, options, error, text):
    with pytest.raises(error, match=text):
        generate(FAMILIES["gpt2"].build(), prompts, **options)


def test_a_stream_refuses_at_once():
    with pytest.raises(InputError, match="prompt 0 is empty"):
        stream(FAMILIES["gpt2"].build(), [[]])


def test_prompts_are_anything_of_ids():
    model, rows = FAMILIES["gpt2"].build().eval(), [[5, 6, 7], [8, 9]]
    expected = [r.tokens for r in generate(model, rows, max_new_tokens=3)]
    padded = torch.tensor([[5, 6, 7], [-1, 8, 9]])
    kinds = (np.array, torch.tensor, partial(torch.tensor, dtype=torch.int32), tuple)
    for prompts in (*([kind(row) for row in rows] for kind in kinds), iter(rows), padded, padded.numpy()):
        assert [r.tokens for r in generate(model, prompts, max_new_tokens=3)] == expected
    assert generate(model, rows, max_new_tokens=np.int64(3), seed=np.int64(3))[0].tokens == expected[0]
    end = expected[0][0]
    for ends in (end, [end], torch.tensor([end])):
        assert generate(model, rows, max_new_tokens=3, end_tokens=ends)[0].finish == "end"
        strategy = BaseStrategy(top_k=1, end_tokens=ends)
        assert generate(model, rows, max_new_tokens=3, strategy=strategy)[0].finish == "end"


def test_generations_in_turns_over_one_model():
    model, rows = FAMILIES["gpt2"].build().train(), prompts_of("gpt2")
    expected = [r.tokens for r in generate(model, rows, max_new_tokens=6)]
    names, written = list(model.mixins), ([[] for _ in rows], [[] for _ in rows])
    first, second = stream(model, rows, max_new_tokens=6), stream(model, rows, max_new_tokens=6, pack_weights=True)
    for _ in range(9):  # the first begins before the second, and ends before it
        piece = next(first)
        written[0][piece.index].append(piece.token)
    assert [r.tokens for r in generate(model, rows[:2], max_new_tokens=6)] == expected[:2]
    piece = next(second)
    written[1][piece.index].append(piece.token)
    for pieces, found in ((first, written[0]), (second, written[1])):
        for piece in pieces:
            found[piece.index].append(piece.token)
        assert found == expected
        assert model.training == (pieces is second)
    assert list(model.mixins) == names and all(module.training for module in model.modules())
    closed, other = stream(model, rows, max_new_tokens=6), stream(model, rows, max_new_tokens=6)
    next(closed), next(other)
    closed.close()
    assert len(list(other)) == 6 * len(rows) - 1
    assert list(model.mixins) == names and all(module.training for module in model.modules())


def test_no_prompts_give_no_results():
    assert generate(FAMILIES["gpt2"].build(), []) == []


def test_a_cache_that_is_full_says_so():
    model = FAMILIES["gpt2"].build().eval()
    model.add_mixin("cache", StaticCacheMixin())
    with pytest.raises(InputError, match="holds 0 tokens of at most 4, 9 more do not fit. Make it with capacity=9"):
        model(ids(), cache=KeyValueCache(4))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptneo", "chatglm", "t5-gated"])
def test_bf16_stays_near_fp32_and_ragged_near_alone(name):
    model, rows = FAMILIES[name].build().eval(), prompts_of(name)
    exact, batch = Watched(), Watched()
    generate(model, rows, max_new_tokens=1, strategy=exact)
    model.to(torch.bfloat16)
    generate(model, rows, max_new_tokens=1, strategy=batch)
    assert_close(batch.seen[0], exact.seen[0], atol=0.2, rtol=0.1)
    for index, row in enumerate(rows):
        alone = Watched()
        generate(model, [row], max_new_tokens=1, strategy=alone)
        assert_close(alone.seen[0][0], batch.seen[0][index], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("cache_dtype", "atol"), [("fp32", 1e-6), ("bf16", 0.05), ("fp16", 0.01), ("int8", 0.1)])
def test_keys_and_values_may_be_kept_in_less(cache_dtype, atol):
    for name in ("llama", "t5", "mistral"):
        model, rows = FAMILIES[name].build().eval(), prompts_of(name)
        exact, kept = Watched(), Watched()
        generate(model, rows, max_new_tokens=2, strategy=exact)
        generate(model, rows, max_new_tokens=2, strategy=kept, cache_dtype=cache_dtype)
        assert_close(kept.seen[0], exact.seen[0], atol=atol, rtol=atol)
        assert torch.equal(kept.seen[0], exact.seen[0]) == (cache_dtype == "fp32")


def test_int8_keeps_a_scale_for_each_token_and_head():
    cache, size = KeyValueCache(5, dtype=torch.int8), torch.tensor([1e-3, 1.0, 1e3])
    key = torch.randn(2, 3, 4, 8) * size[:, None, None]
    got, _ = cache.write(0, key, key)
    assert cache.layers[0][0].dtype is torch.int8
    assert ((got - key).abs() <= key.abs().amax(-1, keepdim=True) / 254 * 1.001).all()


@pytest.mark.parametrize("pack_weights", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "glm-blank"])
def test_compiled_steps_are_one_graph_for_all_tokens_and_calls(name, pack_weights):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, rows = FAMILIES[name].build().eval(), prompts_of(name)
    eager = generate(model, rows, max_new_tokens=8)
    for _ in range(2):
        compiled = generate(model, rows, max_new_tokens=8, compile="eager", pack_weights=pack_weights)
        assert [r.tokens for r in compiled] == [r.tokens for r in eager]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


class Letters:
    """A tokenizer of one letter an id, from "A" on."""

    def encode(self, text):
        return [ord(letter) - 65 for letter in text]

    def decode(self, ids):
        return "".join(chr(65 + int(token)) for token in ids)


@pytest.mark.parametrize("check_every", [1, 4])
def test_stop_strings_end_a_row_and_are_cut_off(check_every):
    model, tokenizer = FAMILIES["qwen3"].build().eval(), Letters()
    rows = prompts_of("qwen3")
    free = [r.text for r in generate(model, rows, max_new_tokens=8, strategy=Watched(), tokenizer=tokenizer)]
    stop, options = free[0][2:4], {"max_new_tokens": 8, "tokenizer": tokenizer, "check_every": check_every}
    results = generate(model, rows, strategy=Watched(), stop_strings=[stop], **options)
    for text, result in zip(free, results, strict=True):
        assert result.text == text.partition(stop)[0] and result.finish == ("stop" if stop in text else "length")
        assert len(result.tokens) == (text.index(stop) + 2 if stop in text else 8)
    pieces = {}
    for piece in stream(model, rows, strategy=Watched(), stop_strings=[stop], **options):
        pieces.setdefault(piece.index, []).append(piece)
    assert ["".join(p.text for p in pieces[i]) for i in pieces] == [r.text for r in results]
    assert [[p.token for p in pieces[i]] for i in pieces] == [r.tokens for r in results]
    assert [pieces[i][-1].finish for i in pieces] == [r.finish for r in results]


def test_characters_of_several_tokens_are_shown_whole():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    reader = RowText(Bytes(), ["|end"])
    shown = [reader.add([byte]) for byte in "né|en, €|end rest".encode()]
    assert shown[:3] == ["n", "", "é"] and "|en," in shown and "€" in shown
    assert "".join(shown) + reader.close() == "né|en, €" and reader.is_stopped
    cut = RowText(Bytes(), ["|end"])
    assert cut.add(b"a|e" + "é".encode()[:1]) == "a" and cut.close() == "|e\N{REPLACEMENT CHARACTER}"


def test_nan_logits_name_step_and_row():
    model = FAMILIES["gpt2"].build().eval()
    with torch.no_grad():
        model.transformer.word_embeddings.weight[7] = float("nan")
    with pytest.raises(InputError, match="step 0, row 1: the logits are NaN or infinite"):
        generate(model, [[5, 6], [7, 8], [5]], max_new_tokens=3)
    with pytest.raises(InputError, match="step 0, row 2"):  # the second of three batches
        generate(model, [[5, 6, 8], [5], [7, 8]], max_new_tokens=3, batch_size=1)


def test_what_is_cached_is_not_given_back_again():
    model = FAMILIES["glm130b"].build().eval()
    assert "mem_kv" in model(ids())[1]
    model.add_mixin("cache", StaticCacheMixin())
    assert "mem_kv" not in model(ids(), cache=KeyValueCache(9))[1]


def test_a_task_and_its_wrappers_are_looked_into():
    model = FAMILIES["gpt2"].build().eval()
    task = torch.nn.Module()
    task.model = torch.nn.DataParallel(model)
    expected = generate(model, [[5, 6]], max_new_tokens=3)[0].tokens
    assert generate(task, torch.tensor([[5, 6]]), max_new_tokens=3)[0].tokens == expected
    with pytest.raises(InputError, match="A Linear is no model"):
        generate(torch.nn.Linear(2, 2), [[5]])
    with pytest.raises(InputError, match=r"visibility='causal'"):
        generate(FAMILIES["bert"].build(), [[5]])
    with pytest.raises(InputError, match="input_ids has 3 tokens, layout"):
        generate(FAMILIES["cuda2d"].build(), [[5, 6, 7]])


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"strategy": BeamSearchStrategy(2)}])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_each_prompt_has_its_own_adapter(name, options):
    model, rows = FAMILIES[name].build().eval(), prompts_of("gpt2")
    parts = [model] if name == "gpt2" else [model.encoder, model.decoder]
    for i in range(2):
        for part in parts:
            part.add_mixin(f"lora{i}", LoraMixin(part.config, rank=2))
            torch.manual_seed(i)
            for parameter in part.get_mixin(f"lora{i}").parameters():
                torch.nn.init.normal_(parameter)
    alone = []
    for chosen in (-1, 0, 1):
        for part in parts:
            for i in range(2):
                part.get_mixin(f"lora{i}").enabled = i == chosen
        alone.append(generate(model, rows, max_new_tokens=5, **options))
    for part in parts:
        for i in range(2):
            part.get_mixin(f"lora{i}").enable()
    mixed = generate(model, rows, max_new_tokens=5, adapter_ids=[1, -1, 0, 1], **options)
    assert [found.tokens for found in mixed] == [alone[c + 1][i].tokens for i, c in enumerate([1, -1, 0, 1])]
    assert len({tuple(found[0].tokens) for found in alone}) == 3


def test_adapter_ids_fit_prompts_and_adapters():
    model = FAMILIES["gpt2"].build().eval()
    with pytest.raises(InputError, match="adapter_ids has 1 entries for 2 prompts"):
        generate(model, [[1], [2]], adapter_ids=[0])
    with pytest.raises(InputError, match=r"adapter_ids names \[0\]; the model has \[-1\], -1 for none"):
        generate(model, [[1]], adapter_ids=[0])


def test_a_stream_shows_no_token_of_useless_logits():
    model = FAMILIES["gpt2"].build().eval()
    first = generate(model, [[5, 6]], max_new_tokens=1)[0].tokens[0]
    with torch.no_grad():
        model.transformer.word_embeddings.weight[first] = float("nan")
    with pytest.raises(InputError, match="step 0, row 0"):
        next(stream(model, [[5, first]]))


def test_an_encoder_reads_as_much_as_it_has_positions():
    model = FAMILIES["encoder-decoder"].build().eval()
    longest = model.config.max_sequence_length
    assert len(generate(model, [[5] * longest], max_new_tokens=2)[0].tokens) == 2
    with pytest.raises(InputError, match=rf"prompt 0 has {longest + 1} tokens, .* \(max_sequence_length\). Shorten"):
        generate(model, [[5] * (longest + 1)], max_new_tokens=2)
    for start, error, text in (
        ((), ConfigError, r"decoder_start is \(\); it is the ids that a decoder begins with"),
        (0, ConfigError, "decoder_start is 0; it is the ids"),
        ((60,), InputError, "decoder_start 0 holds the id 60"),
    ):
        with pytest.raises(error, match=text):
            generate(model, [[5]], decoder_start=start)
    with pytest.raises(ConfigError, match="row_ids holds -1; they are at least 0"):
        generate(model, [[5]], row_ids=[-1])


def spaced_tokenizer():
    """A tokenizer as LLaMA's: a word begins with a space, which is left out where a text begins."""
    library = pytest.importorskip("tokenizers")
    words = ["<s>", "<unk>", *(f"\u2581w{i}" for i in range(50)), *"abcdefgh"]
    tokenizer = library.Tokenizer(library.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = library.decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])

    class Spaced:
        vocab_size = len(words)

        def decode(self, token_ids):
            return tokenizer.decode(list(token_ids))

    return Spaced()


def test_text_goes_on_with_the_space_that_divides_it_from_the_prompt():
    tokenizer, model = spaced_tokenizer(), FAMILIES["qwen3"].build().eval()
    reader = RowText(tokenizer, (), [0, 2, 3])
    assert [reader.add([token]) for token in (4, 52, 5)] == [" w2", "a", " w3"] and reader.close() == ""
    for before in ([], [0], [5, 6, 0], [tokenizer.vocab_size]):  # a text begins, or a model's own mark stands before it
        assert RowText(tokenizer, (), before).add([4, 5]) == "w2 w3"
    assert RowText(tokenizer, [" w3"], [2]).add([4, 5]) == " w2"
    rows = prompts_of("qwen3")
    pieces = {}
    for piece in stream(model, rows, max_new_tokens=6, tokenizer=tokenizer, strategy=Watched()):
        pieces[piece.index] = pieces.get(piece.index, "") + piece.text
    results = generate(model, rows, max_new_tokens=6, tokenizer=tokenizer, strategy=Watched())
    for index, result in enumerate(results):
        whole = tokenizer.decode([*rows[index], *result.tokens])
        assert tokenizer.decode(rows[index]) + result.text == whole == tokenizer.decode(rows[index]) + pieces[index]
