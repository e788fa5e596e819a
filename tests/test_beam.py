"""Beam search: equal to trying everything, to Hugging Face's on a converted model, and to SAT's bookkeeping."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import BeamSearchStrategy, DecodingState, PlainBeamScoring, generate
from tests.families import FAMILIES
from tests.hf_parity import randomise, to_ours
from tests.test_generate import prompts_of
from tests.test_strategies import ragged, table_model

RECORDED = load_file(Path(__file__).parent / "data" / "generation_steps.safetensors")


def search(strategy, score_rows, prompts, num_steps, **options):
    """Drive a beam search; `score_rows(rows [b, n], -1 on the left) -> [b, v]` sees whole rows: no cache is needed."""
    state = strategy.start(DecodingState.create(ragged(prompts), num_steps, **options))
    assert len(state.tokens) == len(prompts) * strategy.num_beams
    while state.length < state.capacity:
        next_tokens, state = strategy.step(score_rows(state.tokens[:, : state.length]), state)
        state.append(next_tokens)
        if state.all_done():
            break
    results = strategy.finalize(state)
    return [[(text.tokens.tolist(), text.score) for text in texts] for texts in results]


def by_row(model):
    return lambda rows: torch.stack([model(row[row >= 0].tolist() or [0]) for row in rows])


def everything(model, prompt, num_steps, end_tokens, divisor, vocab_size):
    """Every text there is, scored: those that end, and those that fill the room."""
    texts = []
    for length in range(1, num_steps + 1):
        for tail in itertools.product(range(vocab_size), repeat=length):
            if set(tail[:-1]) & end_tokens or (length < num_steps and tail[-1] not in end_tokens):
                continue
            row, total = list(prompt), 0.0
            for token in tail:
                total += model(row).log_softmax(-1)[token].item()
                row.append(token)
            texts.append((row, total / divisor(length)))
    return sorted(texts, key=lambda text: -text[1])


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("end_tokens", [{1}, {1, 3}, set()], ids=["one end", "two ends", "no end"])
def test_enough_beams_find_what_trying_everything_finds(end_tokens, penalty):
    vocab_size, num_steps, num_beams = 5, 3, 5**2
    model = table_model(4, vocab_size, scale=1.0)
    scoring = PlainBeamScoring(penalty, early_stopping="never")
    strategy = BeamSearchStrategy(num_beams, end_tokens=sorted(end_tokens), scoring=scoring)
    strategy._check_vocabulary = lambda *_: None  # more beams than tokens: only so is the search complete
    prompts = [[1, 2], [4], [3, 3, 0]]
    results = search(strategy, by_row(model), prompts, num_steps)
    for prompt, found in zip(prompts, results, strict=True):
        best = everything(model, prompt, num_steps, end_tokens, scoring.divisor, vocab_size)[: len(found)]
        assert len(found) == num_beams
        assert [row for row, _ in found[:10]] == [row for row, _ in best[:10]]
        assert_close(torch.tensor([s for _, s in found[:10]]), torch.tensor([s for _, s in best[:10]]))


@pytest.fixture(scope="module")
def gpt2_pair():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40, "n_positions": 48}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    randomise(theirs, std=0.3)
    return theirs.eval(), to_ours(theirs)[0]


def score_rows_of(model):
    @torch.no_grad()
    def score_rows(rows):
        position_ids = ((rows >= 0).cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(rows.shape[1], rows.shape[1]).tril()
        mask = (causal * (rows >= 0)[:, None, None, :]).clamp(max=1)
        return model(rows.clamp(min=0), position_ids, mask)[0][:, -1]

    return score_rows


@pytest.mark.parametrize(
    ("settings", "theirs_settings"),
    [
        ({"num_beams": 4}, {"length_penalty": 1.0, "early_stopping": False}),
        ({"num_beams": 3, "end_tokens": [5, 9, 11]}, {"length_penalty": 0.6, "early_stopping": True}),
        ({"num_beams": 5, "end_tokens": [7, 12, 20]}, {"length_penalty": 2.0, "early_stopping": "never"}),
        ({"num_beams": 4, "end_tokens": [7, 12, 20]}, {"length_penalty": -1.0, "early_stopping": False}),
        (
            {"num_beams": 4, "no_repeat_ngram_size": 2, "ban_prompt_ngrams": True, "end_tokens": [3]},
            {"length_penalty": 0.0, "early_stopping": False},
        ),
        (
            {"num_beams": 3, "temperature": 1.5, "min_new_tokens": 6, "end_tokens": [3, 5, 9, 30]},
            {"length_penalty": 1.0, "early_stopping": True},
        ),
    ],
    ids=["plain", "early", "never", "negative", "ngrams", "least"],
)
def test_equals_hugging_face_beam_for_beam_and_score_for_score(gpt2_pair, settings, theirs_settings):
    theirs, ours = gpt2_pair
    prompts, num_steps = [[2, 5, 7, 5], [9], [30, 31, 6]], 12
    rows = ragged(prompts)
    names = {"num_beams", "no_repeat_ngram_size", "min_new_tokens"}
    expected = theirs.generate(
        rows.clamp(min=0),
        attention_mask=(rows >= 0).long(),
        max_new_tokens=num_steps,
        eos_token_id=settings.get("end_tokens"),
        pad_token_id=39,  # 0 would be taken for none
        num_return_sequences=settings["num_beams"],
        do_sample=False,
        renormalize_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **theirs_settings,
        **{name: value for name, value in settings.items() if name in names},
        # Their beam search would ignore a temperature that is not asked for as a processor.
        logits_processor=[transformers.TemperatureLogitsWarper(settings.get("temperature", 1.0))],
    )
    scoring = PlainBeamScoring(**theirs_settings)
    results = search(BeamSearchStrategy(**settings, scoring=scoring), score_rows_of(ours), prompts, num_steps)
    num_beams = settings["num_beams"]
    their_scores = expected.sequences_scores.view(len(prompts), num_beams)
    for i, (prompt, texts) in enumerate(zip(prompts, results, strict=True)):
        assert len(texts) == num_beams
        for j, (row, score) in enumerate(texts):
            generated = row[len(prompt) :]
            theirs_row = expected.sequences[i * num_beams + j, rows.shape[1] :].tolist()
            assert theirs_row[: len(generated)] == generated and not set(theirs_row[len(generated) :]) - {39}
            assert abs(score - their_scores[i, j].item()) < 1e-4
    if settings.get("end_tokens") and "min_new_tokens" not in settings:
        assert len({len(row) for texts in results for row, _ in texts}) > 1, "no beam ended before the room"


class Replay(BeamSearchStrategy):
    """SAT's search: candidates are the recorded draws, and every beam leads at the beginning."""

    def start(self, state):
        state = super().start(state)
        state.extras["beams"].scores.zero_()
        return state

    def choose(self, scores, num_candidates):
        places = RECORDED[f"{self.case}.step{self.step_number}.multinomial_result"][None]
        assert places.shape[1] == num_candidates
        values, order = scores.gather(1, places).sort(dim=1, descending=True)
        return values, places.gather(1, order)


CASES = {
    "gen_beam": {"length_penalty": 0.7, "no_repeat_ngram_size": 2, "min_tgt_length": 9, "end_tokens": [7, 12, 30]},
    "gen_beam_det": {"length_penalty": 0.7, "no_repeat_ngram_size": 2, "end_tokens": [7], "top_k": 2, "top_p": 1.0},
    "gen_beam_noend": {"length_penalty": 0.7, "end_tokens": [7, 8], "temperature": 0.8, "consider_end": False},
}


@pytest.mark.parametrize("case", CASES)
def test_bookkeeping_of_sat_with_its_own_draws(case):
    """The recorded logits came from SAT's own beams: had one of ours another token, its next draw would not fit."""
    seq = RECORDED[f"{case}.seq"]
    strategy = Replay(num_beams=3, **CASES[case])
    strategy.case = case
    state = strategy.start(DecodingState.create(seq[None, seq >= 0], int((seq < 0).sum())))
    for strategy.step_number in range(9):
        next_tokens, state = strategy.step(RECORDED[f"{case}.step{strategy.step_number}.logits"], state)
        state.append(next_tokens)
    texts = strategy.finalize(state)[0]
    expected = [RECORDED[f"{case}.beam{i}"].tolist() for i in range(3)]
    assert [text.tokens.tolist() for text in texts] == expected
    if f"{case}.penalized_scores" in RECORDED:
        scores = torch.tensor([text.score for text in texts])
        assert_close(scores, RECORDED[f"{case}.penalized_scores"], atol=5e-6, rtol=1e-6)


def test_positional_arguments_are_those_of_sat():
    strategy = BeamSearchStrategy(3, 0.7, 0.8, 0.0, 0.9, False, [7], [slice(5, 6)], 2, 9, 1.2, 4, 50, 8)
    assert (strategy.num_beams, strategy.length_penalty, strategy.temperature, strategy.top_k) == (3, 0.7, 0.8, 0)
    assert (strategy.top_p, strategy.consider_end, strategy.end_tokens) == (0.9, False, (7,))
    assert (strategy.invalid_slices, strategy.no_repeat_ngram_size) == ((slice(5, 6),), 2)
    assert (strategy.min_tgt_length, strategy.repetition_penalty) == (9, 1.2)
    assert (strategy.scoring.prefer_min_length, strategy.scoring.prefer_max_length) == (4, 50)
    assert strategy.scoring.stop_n_iter_unchanged == 8


def test_formula_of_sat():
    scoring = BeamSearchStrategy(2, length_penalty=0.8, prefer_min_length=4, prefer_max_length=6).scoring
    assert scoring.divisor(5) == pytest.approx(6**0.8)
    assert scoring.divisor(6) == scoring.divisor(60) == pytest.approx(7**0.8)
    assert scoring.divisor(1) == pytest.approx(2 ** (0.25 * 0.8 + 0.75 * 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_do_not_disturb_each_other_and_nothing_is_drawn(dtype):
    table, prompts = table_model(1), [[1, 2, 3], [4], [5, 6, 7, 8, 9], [4]]
    model = by_row(lambda row: table(row).to(dtype))
    strategy = BeamSearchStrategy(4, end_tokens=[3, 8, 15], no_repeat_ngram_size=2, length_penalty=0.5)
    chance = torch.get_rng_state()
    together = search(strategy, model, prompts, 25)
    assert torch.equal(torch.get_rng_state(), chance)
    assert together == [search(strategy, model, [prompt], 25)[0] for prompt in prompts]
    assert together[1] == together[3]
    for texts, prompt in zip(together, prompts, strict=True):
        assert len({tuple(row) for row, _ in texts}) == 4, "copies"
        scores = [score for _, score in texts]
        assert scores == sorted(scores, reverse=True)
        for row, _ in texts:
            tail = row[len(prompt) :]
            assert not {3, 8, 15} & set(tail[:-1])
            pairs = list(itertools.pairwise(row))[len(prompt) - 1 :]
            assert len(pairs) == len(set(pairs))


def test_scores_are_those_of_the_texts():
    model = table_model(2)
    strategy = BeamSearchStrategy(3, end_tokens=[3, 8], scoring=PlainBeamScoring(0.7))
    for row, score in search(strategy, by_row(model), [[1, 2]], 10)[0]:
        total = sum(model(row[:i]).log_softmax(-1)[row[i]].item() for i in range(2, len(row)))
        assert score == pytest.approx(total / (len(row) - 2) ** 0.7, abs=1e-5)


def test_search_stops_when_the_best_has_stood_long_enough():
    logits = torch.zeros(9)
    logits[[2, 5]] = torch.tensor([9.0, 8.0])  # 2 ends at once; nothing later is better
    seen = []
    model = by_row(lambda row: seen.append(len(row)) or logits)
    strategy = BeamSearchStrategy(2, end_tokens=[2], stop_n_iter_unchanged=3)
    (best, _), *_ = search(strategy, model, [[1]], 20)[0]
    assert best == [1, 2] and max(seen) == 4


def test_a_dead_end_of_one_beam_does_not_end_the_others():
    """From token 2 nothing may follow; the beams that went there are dropped."""

    def no_way_on(logits, state):
        return logits.masked_fill((state.tokens[:, state.length - 1] == 2)[:, None], -math.inf)

    logits = torch.tensor([1.0, 2.0, 3.0, 0.0])
    strategy = BeamSearchStrategy(2, processors=[no_way_on], scoring=PlainBeamScoring())
    results = search(strategy, by_row(lambda row: logits), [[0], [2, 0]], 4)
    for texts in results:
        assert len(texts) == 2
        for row, score in texts:
            assert math.isfinite(score) and 2 not in row[2:-1]
    with pytest.raises(InputError, match="step 0, row 0: no token is allowed"):
        search(strategy, by_row(lambda row: logits), [[2]], 4)


def test_nan_logits_name_the_step():
    model = by_row(lambda row: torch.full((9,), math.nan) if len(row) == 3 else torch.randn(9))
    with pytest.raises(InputError, match="step 2, row 0: the logits are NaN"):
        search(BeamSearchStrategy(2), model, [[1]], 5)


def test_running_beams_and_no_room():
    strategy = BeamSearchStrategy(2, consider_end=False, end_tokens=[3])
    texts = search(strategy, by_row(table_model()), [[1, 2]], 6)[0]
    assert [len(row) for row, _ in texts] == [8, 8] and not any(3 in row for row, _ in texts)
    assert search(BeamSearchStrategy(2), by_row(table_model()), [[1, 2]], 0) == [[([1, 2], 0.0)]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer at least 1, not 0"),
        ({"num_beams": 2, "temperature": 0}, "temperature must be a finite number above 0.0, not 0"),
        ({"num_beams": 2, "stop_n_iter_unchanged": 0}, "stop_n_iter_unchanged must be an integer at least 1"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty must be a finite number, not nan"),
        ({"num_beams": 2, "top_p": 3}, "top_p must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BeamSearchStrategy(**settings)


def test_what_no_vocabulary_allows_is_refused():
    model = by_row(table_model(vocab_size=5))
    with pytest.raises(ConfigError, match="num_beams=6 is above the vocabulary of 5 tokens"):
        search(BeamSearchStrategy(6), model, [[1]], 2)
    with pytest.raises(ConfigError, match=r"end tokens \[5\] are outside the vocabulary of 5 tokens"):
        search(BeamSearchStrategy(2, end_tokens=[5]), model, [[1]], 2)
    with pytest.raises(ConfigError, match="early_stopping must be True, False or 'never', not 'always'"):
        PlainBeamScoring(early_stopping="always")
    with pytest.raises(ConfigError, match=r"call strategy.start\(state\) before the first step"):
        BeamSearchStrategy(2).step(torch.randn(1, 5), DecodingState.create(torch.ones(1, 1), 2))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral", "glm-blank", "chatglm", "t5"])
def test_with_a_cache_beams_are_those_without(name):
    """`generate` reorders the cache, positions and the encoder's outputs with the beams."""
    model, prompts = randomised(FAMILIES[name]), prompts_of(name)
    strategy = BeamSearchStrategy(3, end_tokens=[3, 8, 15, 21], no_repeat_ngram_size=2, scoring=PlainBeamScoring(0.5))
    sources = iter(())

    @torch.no_grad()
    def score_rows(rows):
        if name == "t5":
            source = torch.tensor([sources[0]]).expand(len(rows), -1)
            return model(enc_input_ids=source, dec_input_ids=rows)[1][:, -1]
        return torch.cat([model(row[row >= 0][None])[0][:, -1] for row in rows])

    found = generate(model, prompts, strategy=strategy, max_new_tokens=10)
    for prompt, result in zip(prompts, found, strict=True):
        sources, begin = [prompt], [0] if name == "t5" else prompt
        expected = search(strategy, score_rows, [begin], 10)[0]
        texts = [result, *result.alternatives]
        assert [text.tokens for text in texts] == [row[len(begin) :] for row, _ in expected]
        assert_close(torch.tensor([t.score for t in texts]), torch.tensor([s for _, s in expected]), atol=1e-4, rtol=0)
        assert all(text.finish == ("end" if text.tokens[-1] in strategy.end_tokens else "length") for text in texts)


def randomised(family):
    model = family.build(max_sequence_length=32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
