"""Perplexity, scores of long texts, and choices: against definitions written out, and against Hugging Face."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from sat_lightning import BaseMixin
from sat_lightning.errors import InputError
from sat_lightning.generation import choices as choices_module
from sat_lightning.generation import evaluate_perplexity, score, score_choices
from sat_lightning.generation import perplexity as perplexity_module
from sat_lightning.mixins import PromptTuningMixin
from tests.families import FAMILIES, ids
from tests.hf_parity import randomise, to_ours


class Words:
    """A tokenizer of characters, which has a token for ' a' of its own."""

    end_of_document_id = 1

    def encode(self, text: str) -> list[int]:
        return [5 + ord(c) % 50 if c != "\0" else 2 for c in text.replace(" a", "\0")]


class PlainHead(BaseMixin):
    """A head that knows nothing of targets."""

    def final_forward(self, logits: torch.Tensor, **kw: object) -> torch.Tensor:
        return F.linear(logits, self.transformer.word_embeddings.weight)


def build(name: str = "gpt2", **changes: object):
    return FAMILIES[name].build(**changes).eval()


def true_losses(model, tokens, **kw):
    """Nats of every token but the first, `[b, s - 1]`, in fp64 from the logits."""
    with torch.no_grad():
        log_probs = model(tokens[:, :-1], **kw)[0].double().log_softmax(-1)
    return -log_probs.gather(2, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("has_own_head", [False, True])
def test_perplexity_is_the_masked_mean_of_the_losses_of_what_is_no_padding(has_own_head: bool) -> None:
    model, tokens = build(), ids(3, 9)
    if has_own_head:
        model.del_mixin("gpt2-final")
        model.add_mixin("head", PlainHead())
    losses = true_losses(model, tokens)
    padded = tokens.clone()
    padded[0, 6:], padded[2, 3:] = -1, -1
    weights = torch.rand(3, 9)
    kept = weights.clone()
    kept[0, 6:], kept[2, 3:] = 0, 0
    copies = padded.clone(), weights.clone()
    mean = evaluate_perplexity(model, padded, loss_mask=weights)
    each = evaluate_perplexity(model, padded, loss_mask=weights, reduction="none")
    assert torch.equal(padded, copies[0]) and torch.equal(weights, copies[1])
    assert_close(each.double(), losses * kept[:, 1:].double(), atol=1e-5, rtol=1e-5)
    assert_close(mean.double(), (losses * kept[:, 1:]).sum(1) / kept[:, 1:].sum(1).double(), atol=1e-5, rtol=1e-5)
    one_row = evaluate_perplexity(model, tokens[1], loss_mask=weights[1])
    assert_close(one_row, mean[1:2])


def test_a_mask_of_one_row_serves_all_and_padding_of_one_hides_nothing_of_another() -> None:
    model, tokens = build(), ids(2, 8)
    losses = true_losses(model, tokens).float()
    tokens[0, 4:] = -1
    each = evaluate_perplexity(model, tokens, loss_mask=torch.ones(8, dtype=torch.long), reduction="none")
    assert (each[0, 3:] == 0).all()
    assert_close(each[1], losses[1], atol=1e-5, rtol=1e-5)
    assert_close(each[0, :3], losses[0, :3], atol=1e-5, rtol=1e-5)


def test_words_without_probability_are_taken_from_all_others_and_cost_infinitely_much_unless_masked() -> None:
    model, tokens = build(), ids(2, 8, high=40)
    tokens[0, 5] = 50
    mask = torch.ones(2, 8)
    invalid = [slice(45, 55), 58]
    got = evaluate_perplexity(model, tokens, loss_mask=mask, invalid_slices=invalid)
    assert got[0] == math.inf
    logits = model(tokens)[0].double()
    logits[..., 45:55] = -math.inf
    logits[..., 58] = -math.inf
    assert_close(got[1].double(), F.cross_entropy(logits[1, :-1], tokens[1, 1:]), atol=1e-5, rtol=1e-5)
    mask[0, 5] = 0
    masked = evaluate_perplexity(model, tokens, loss_mask=mask, invalid_slices=invalid)
    assert masked.isfinite().all()
    masked.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_losses_of_logits_are_the_same_in_chunks_and_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(2, 7, 30) * 40, ids(2, 7, high=30)
    targets[0, 2] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    monkeypatch.setattr(perplexity_module, "_CHUNK", 70)
    assert_close(perplexity_module.losses_of_logits(logits, targets), expected)
    half = logits.bfloat16()
    expected = F.cross_entropy(half.float().flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    assert_close(perplexity_module.losses_of_logits(half, targets), expected)


def test_perplexity_of_half_precision_and_its_gradients_are_those_of_the_loss() -> None:
    model, tokens = build(), ids(2, 8)
    (mean := evaluate_perplexity(model, tokens)).mean().backward()
    gradient = model.transformer.word_embeddings.weight.grad.clone()
    model.zero_grad()
    loss = F.cross_entropy(model(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert_close(gradient, model.transformer.word_embeddings.weight.grad, atol=1e-5, rtol=1e-4)
    half = evaluate_perplexity(model.bfloat16(), tokens)
    assert half.dtype == torch.float32
    assert_close(half, mean.detach(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 1, dtype=torch.long)}, "at least two tokens"),
        ({"reduction": "sum"}, "Choose 'mean' or 'none'"),
        ({"loss_mask": torch.ones(2, 5)}, r"loss_mask has shape \[2, 5\], tokens \[2, 8\]"),
    ],
)
def test_perplexity_refuses(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_perplexity(**({"model": build(), "tokens": ids(2, 8)} | changes))


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 8), (8, 1), (24, None), (5, None)])
def test_each_token_of_a_long_text_is_scored_once_with_the_context_that_is_promised(window, stride) -> None:
    model = build().train()  # scoring is without dropout, and leaves the mode as it was
    model.transformer.layers[0].eval()
    texts = [ids(1, length, seed=length)[0].tolist() for length in (1, 2, 20, 9, 23, 8, 30)] + [[]]
    scores = score(model, texts, window_length=window, stride=stride, batch_size=3)
    assert model.training and not model.transformer.layers[0].training
    model.eval()
    step = stride or -(-window // 2)
    for text, found in zip(texts, scores, strict=True):
        expected, num_targets = [], len(text) - 1
        for target in range(1, len(text)):
            # Which window scores it: the first holds `window` targets, each later one `step` more.
            stop = window if target <= window else window + math.ceil((target - window) / step) * step
            stop = min(stop, num_targets)
            start = max(0, stop - window)
            seen = target - start
            assert target <= window or seen >= window - step + 1
            expected.append(true_losses(model, torch.tensor([text[start : target + 1]]))[0, -1])
        assert found.num_tokens == max(0, num_targets)
        if expected:
            assert_close(found.token_losses.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
            assert found.perplexity == pytest.approx(math.exp(found.mean_loss))


def test_bits_per_byte_count_the_whole_text_behind_the_end_of_a_document() -> None:
    model, tokenizer = build(), Words()
    texts = ["as an añb", "x"]
    scores = score(model, texts, tokenizer=tokenizer)
    for text, found in zip(texts, scores, strict=True):
        row = torch.tensor([[1, *tokenizer.encode(text)]])
        assert_close(found.token_losses.double(), true_losses(model, row)[0], atol=1e-5, rtol=1e-5)
        assert found.num_bytes == len(text.encode())
        assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / len(text.encode()))
    assert score(model, texts, tokenizer=tokenizer, prefix_ids=[])[0].bits_per_byte is None
    assert score(model, [[5, 6, 7]], num_bytes=[4])[0].bits_per_byte == pytest.approx(
        score(model, [[5, 6, 7]])[0].loss / math.log(2) / 4
    )


def test_a_prefix_of_several_tokens_is_seen_and_not_scored() -> None:
    model = build()
    found = score(model, [[9, 8, 7]], prefix_ids=[3, 4, 5])[0]
    expected = true_losses(model, torch.tensor([[3, 4, 5, 9, 8, 7]]))[0, 2:]
    assert_close(found.token_losses.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["hi"]}, "no tokenizer"),
        ({"texts": [[4, -1]]}, "holds the id -1"),
        ({"stride": 9, "window_length": 8}, "stride is 9; choose 1 to 8"),
        ({"stride": 0}, "stride is 0"),
        ({"num_bytes": [1, 2]}, "2 entries for 1 texts"),
        ({"prefix_ids": [3] * 9, "window_length": 8}, "9 tokens, more than the window of 8"),
    ],
)
def test_score_refuses(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(**({"model": build(), "texts": [[4, 5]]} | changes))


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    from sat_lightning import BaseModel

    model = BaseModel(build().config).eval()
    with pytest.raises(InputError, match='lets every token see every token.*attention_mask="causal"'):
        score(model, [[4, 5, 6]])
    found = score(model, [[4, 5, 6]], attention_mask="causal")[0]
    expected = true_losses(model, torch.tensor([[4, 5, 6]]), attention_mask="causal")[0]
    assert_close(found.token_losses.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gptneo", "chatglm2", "mixtral"])
def test_padding_behind_a_row_changes_no_score(name: str) -> None:
    model = build(name)
    texts = [ids(1, length, seed=length)[0] for length in (12, 5, 9)]
    for text, found in zip(texts, score(model, texts), strict=True):
        assert_close(found.token_losses.double(), true_losses(model, text[None])[0], atol=1e-5, rtol=1e-5)


def behind(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    return true_losses(model, torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 :]


def test_choices_are_scored_behind_their_prompts_by_every_normalisation() -> None:
    model, tokenizer = build(), Words()
    questions = [("which: ", ["a", "as b", "c"]), ("so ", ["x", "y"]), ("", ["q", "rs"])]
    split = {"a": [2], "as b": [2, *tokenizer.encode("s b")]}
    kinds = {
        kind: score_choices(model, questions, tokenizer=tokenizer, normalise=kind) for kind in ("sum", "token", "byte")
    }
    kinds["unconditional"] = score_choices(
        model, questions, tokenizer=tokenizer, normalise="unconditional", unconditional_prompt="Answer:"
    )
    for index, (prompt, choices) in enumerate(questions):
        for place, choice in enumerate(choices):
            # The space at the end of a prompt is the choice's.
            before = tokenizer.encode(prompt.rstrip()) or [1]
            answer = split.get(choice, tokenizer.encode(" " * prompt.endswith(" ") + choice))
            losses = behind(model, before, answer)
            assert_close(kinds["sum"][index].token_losses[place].double(), losses, atol=1e-5, rtol=1e-5)
            alone = behind(model, tokenizer.encode("Answer:"), answer).sum()
            wanted = {
                "sum": -losses.sum(), "token": -losses.mean(), "byte": -losses.sum() / len(choice.encode()),
                "unconditional": alone - losses.sum(),
            }  # fmt: skip
            for kind, value in wanted.items():
                assert_close(kinds[kind][index].scores[place], value, atol=2e-5, rtol=1e-5)
        assert kinds["sum"][index].best == int(kinds["sum"][index].scores.argmax())


def test_choices_of_one_token_read_their_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(), []
    monkeypatch.setattr(choices_module, "_NUM_LOGITS", 1)
    model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    prompts = [ids(1, 9)[0].tolist(), ids(1, 6, seed=1)[0].tolist()]
    answers = [[7], [8], [9], [10]]
    found = score_choices(model, [(prompt, answers) for prompt in prompts])
    assert sum(rows) == 2
    for prompt, scores in zip(prompts, found, strict=True):
        expected = torch.stack([-behind(model, prompt, answer).sum() for answer in answers])
        assert_close(scores.scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptneo", "mistral", "mixtral", "chatglm2", "glm130b-2d"])
def test_choices_of_several_tokens_share_what_was_made_of_a_long_prompt(name: str) -> None:
    model, rows = build(name, max_sequence_length=64), []
    origins = model.hook_origins
    model.train()
    model.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape)))
    prompts = [ids(1, 40)[0].tolist(), ids(1, 6, seed=1)[0].tolist()]
    answers = [[7, 8, 9], [8], [9, 7, 6, 5], [10, 11]]
    found = score_choices(model, [(prompt, answers) for prompt in prompts], batch_size=3)
    assert model.training and model.hook_origins == origins
    model.eval()
    if name in ("gpt2", "llama", "gptneo", "mistral", "mixtral"):
        assert rows[:3] == [(1, 39), (3, 4), (1, 2)]
    for prompt, scores in zip(prompts, found, strict=True):
        for answer, losses in zip(answers, scores.token_losses, strict=True):
            assert_close(losses.double(), behind(model, prompt, answer), atol=2e-5, rtol=1e-5)


def test_the_beginning_of_a_prompt_too_long_is_left_out() -> None:
    model = build()
    prompt, answer = ids(1, 40)[0].tolist(), [5, 6, 7]
    found = score_choices(model, [(prompt, [answer, [9]])])[0]
    assert_close(found.token_losses[0].double(), behind(model, prompt[-22:], answer), atol=1e-5, rtol=1e-5)
    assert_close(found.token_losses[1].double(), behind(model, prompt[-24:], [9]), atol=1e-5, rtol=1e-5)
    found = score_choices(model, [(prompt, [answer])], prefix_ids=[3])[0]
    assert_close(found.token_losses[0].double(), behind(model, [3, *prompt[-21:]], answer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ([([4], [])], {}, "has no choices"),
        ([([4], [[]])], {}, "has no tokens"),
        ([([], [[4]])], {}, "empty prompt: nothing predicts it"),
        ([([4], [[4] * 30])], {}, "30 tokens, the model reads 24"),
        ([([4], [[4]])], {"normalise": "bytes"}, "Choose one of sum, token, byte, unconditional"),
        ([([4], [[4]])], {"normalise": "byte"}, "give them as text"),
        ([([4], [[4]])], {"normalise": "unconditional"}, "belong together"),
    ],
)
def test_choices_refuse(questions: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_choices(build(), questions, **options)


def test_scores_equal_the_losses_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    )
    randomise(theirs, 0.2)
    theirs.eval()
    model = to_ours(theirs)[0]
    texts = [ids(1, length, seed=length) for length in (12, 7)]
    for text, found in zip(texts, score(model, [text[0] for text in texts]), strict=True):
        with torch.no_grad():
            assert found.mean_loss == pytest.approx(theirs(text, labels=text).loss.item(), abs=2e-6)
        assert evaluate_perplexity(model, text).item() == pytest.approx(found.mean_loss, abs=2e-6)


def test_choices_of_an_encoder_decoder_equal_the_losses_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=24, d_kv=5, d_ff=30, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config)
    randomise(theirs, 0.2)
    theirs.eval()
    model = to_ours(theirs)[0]
    prompts = [ids(1, 8)[0].tolist(), ids(1, 5, seed=1)[0].tolist()]
    answers = [[9, 4, 7], [5], [6, 8]]
    for batch_size in (2, 8):
        found = score_choices(model, [(prompt, answers) for prompt in prompts], batch_size=batch_size)
        for prompt, scores in zip(prompts, found, strict=True):
            for answer, losses in zip(answers, scores.token_losses, strict=True):
                with torch.no_grad():
                    expected = theirs(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
                assert losses.mean().item() == pytest.approx(expected.item(), abs=3e-6)


def test_choices_behind_a_long_prompt_of_a_model_with_a_learned_prompt() -> None:
    model = build(max_sequence_length=64)
    model.add_mixin("prompt", PromptTuningMixin(model.config, 3))
    prompt, answers = ids(1, 40)[0].tolist(), [[7, 8, 9], [7, 11], [13, 8]]
    (found,) = score_choices(model, [(prompt, answers)])
    for answer, losses in zip(answers, found.token_losses, strict=True):
        text = torch.tensor([[*prompt, *answer]])
        assert_close(losses.double(), true_losses(model, text)[0, len(prompt) - 1 :], atol=1e-5, rtol=1e-5)
    model.get_mixin("prompt").disable()
    (without,) = score_choices(model, [(prompt, answers)])
    assert not torch.allclose(without.scores, found.scores)
