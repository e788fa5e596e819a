"""What a text must look like: the hook, regular expressions and JSON schemas, greedy, drawn and by beams."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch

from sat_lightning.data.model_tokenizers import get_tokenizer
from sat_lightning.data.tokenizer import ByteTokenizer, TokenizersFile
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import (
    AllowedTokens,
    BaseStrategy,
    BeamSearchStrategy,
    Grammar,
    generate,
    greedy,
    json_schema,
    regex,
)
from tests.families import FAMILIES
from tests.test_beam import by_row, search
from tests.test_strategies import run, table_model

END = ByteTokenizer.end_of_document_id
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def byte_model(seed=0, vocab_size=260):
    """Logits that are random in the newest tokens; the vocabulary is padded beyond the tokenizer's."""
    table = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda row: table[(sum(row[-3:]) + len(row)) % 64]


def text_of(row, num_prompt):
    return ByteTokenizer().decode(np.array(row[num_prompt:]))


@pytest.mark.parametrize("strategy", [greedy, BaseStrategy])
def test_the_hook_decides_row_by_row(strategy):
    seen = []

    def only_next(prefix):
        seen.append(list(prefix))
        return None if len(prefix) % 2 else [(prefix[-1] + 1) % 23, 3]

    strategy = strategy(processors=[AllowedTokens(only_next)], end_tokens=[3])
    texts = run(strategy, table_model(), [[1, 2, 4], [9]], 12, seed=3)
    for row, num_prompt in zip(texts, (3, 1), strict=True):
        for i in range(num_prompt, len(row)):
            assert i % 2 or row[i] in {(row[i - 1] + 1) % 23, 3}
            assert row[:i] in seen
    assert all(len(prefix) > 0 and -1 not in prefix for prefix in seen)
    ended = next(row for row in texts if row[-1] == 3)
    assert ended not in seen, "asked for a row that was done"


@pytest.mark.parametrize("strategy", [None, BaseStrategy(), BeamSearchStrategy(2)], ids=["greedy", "drawn", "beams"])
def test_generate_takes_the_hook(strategy):
    class Mine:
        start = step = finalize = None

    model, prompts = FAMILIES["gpt2"].build().eval(), [[4, 5, 6], [7]]

    def only_next(prefix):
        return [(prefix[-1] + 1) % 20, (prefix[-1] + 2) % 20]

    for result in generate(model, prompts, strategy=strategy, max_new_tokens=6, allowed_tokens=only_next, seed=0):
        row = result.prompt_tokens[-1:] + result.tokens
        assert len(row) == 7 and all((b - a) % 20 in (1, 2) for a, b in itertools.pairwise(row))
    if strategy is not None:
        assert strategy.processors == ()
    with pytest.raises(ConfigError, match="allowed_tokens needs a BaseStrategy or a BeamSearchStrategy, not a Mine"):
        generate(model, prompts, strategy=Mine(), allowed_tokens=only_next)


def test_what_the_hook_may_not_say():
    with pytest.raises(InputError, match=r"allowed_tokens gave ids \[23, -1\] for row 0; the vocabulary has 23 tokens"):
        run(greedy(processors=[AllowedTokens(lambda prefix: [1, 23, -1])]), table_model(), [[1]], 2)
    with pytest.raises(InputError, match="step 1, row 0: no token is allowed"):
        run(greedy(processors=[AllowedTokens(lambda p: [] if len(p) > 1 else None)]), table_model(), [[1]], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [r"[a-c]{3}-[0-9]{2,4}", r"(yes|no|maybe)", "é{2}x"])
def test_text_matches_the_regular_expression(pattern, dtype):
    table = byte_model()
    strategy = BaseStrategy(processors=[regex(pattern, ByteTokenizer())], end_tokens=[END], temperature=2.0)
    prompts = [[1, 2, 3], [200], [7, 8]]
    texts = run(strategy, lambda row: table(row).to(dtype), prompts, 40, seed=1)
    for row, prompt in zip(texts, prompts, strict=True):
        assert row[-1] == END and re.fullmatch(pattern, text_of(row, len(prompt)))
    alone = [
        run(strategy, lambda r: table(r).to(dtype), [p], 40, seed=1, row_ids=[i])[0] for i, p in enumerate(prompts)
    ]
    assert texts == alone


@pytest.mark.parametrize("has_free_whitespace", [True, False])
def test_json_follows_its_schema(has_free_whitespace):
    constraint = json_schema(SCHEMA, ByteTokenizer(), has_free_whitespace=has_free_whitespace)
    strategy = BaseStrategy(processors=[constraint], end_tokens=[END, 259], temperature=1.5)
    texts = run(strategy, byte_model(1), [[1], [2, 3], [9, 9, 9], [4]], 400, seed=5)
    values = [json.loads(text_of(row[:-1], n)) for row, n in zip(texts, (1, 2, 3, 1), strict=True)]
    for row, value in zip(texts, values, strict=True):
        assert row[-1] in (END, 259)
        assert value.keys() == {"name", "age", "tags"} and re.fullmatch("[a-z]{1,4}", value["name"])
        assert 0 <= value["age"] <= 99 and len(value["tags"]) <= 2 and set(value["tags"]) <= {"x", "y"}
    assert len({json.dumps(value) for value in values}) > 1
    if not has_free_whitespace:
        assert " " not in "".join(text_of(row[:-1], n) for row, n in zip(texts, (1, 2, 3, 1), strict=True))


def test_beams_keep_to_the_grammar():
    pattern = r"[ab]{2,5}c?"
    strategy = BeamSearchStrategy(4, end_tokens=[END], processors=[regex(pattern, ByteTokenizer())], length_penalty=0.0)
    for texts, num_prompt in zip(search(strategy, by_row(byte_model(2)), [[1], [5, 6]], 12), (1, 2), strict=True):
        found = [text_of(row, num_prompt) for row, _ in texts]
        assert len(set(found)) == 4 and all(re.fullmatch(pattern, text) for text in found)


def test_a_tokenizers_file_and_a_sentencepiece_model(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = ["one two three"] * 50 + ["twenty three and one"] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    library.save(str(tmp_path / "tokenizer.json"))
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "sp"), vocab_size=40, byte_fallback=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    for tokenizer in (TokenizersFile(str(tmp_path)), get_tokenizer(tmp_path / "sp.model")):
        strategy = BaseStrategy(
            processors=[regex(r" ?(one|two|three)( and one)*", tokenizer)], end_tokens=[tokenizer.end_of_document_id]
        )
        for row in run(strategy, byte_model(3, 300), [[5], [6], [7]], 60, seed=2):
            assert re.fullmatch(r" ?(one|two|three)( and one)*", tokenizer.decode(row[1:-1]))


def test_what_cannot_be_understood_is_refused():
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match=r"(?s)the grammar cannot be understood: .*unclosed group"):
        regex("(ab", tokenizer)
    with pytest.raises(ConfigError, match="the grammar cannot be understood: Invalid type: objekt"):
        json_schema({"type": "objekt"}, tokenizer)
    with pytest.raises(ConfigError, match="the JSON schema cannot be understood"):
        json_schema("{", tokenizer)
    with pytest.raises(ConfigError, match="a grammar needs an end token"):
        run(greedy(processors=[regex("a", tokenizer)]), byte_model(), [[1]], 2)
    with pytest.raises(ConfigError, match=r"object does not say what bytes its tokens are: give it to_json\(\) or"):
        run(greedy(processors=[regex("a", object())], end_tokens=[END]), byte_model(), [[1]], 2)
    with pytest.raises(ConfigError, match="ByteTokenizer with end token 258 does not fit a grammar"):
        run(greedy(processors=[regex("a", tokenizer)], end_tokens=[258]), byte_model(), [[1]], 2)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: regex("a", ByteTokenizer()), lambda: Grammar("{}", ByteTokenizer())):
        with pytest.raises(ConfigError, match=r'Run: pip install "sat_lightning\[constraints\]"'):
            make()
    assert AllowedTokens(lambda prefix: None) is not None
