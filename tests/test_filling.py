"""`filling_sequence`: SAT's contract, with the text that the uncached model would have written."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import BaseMixin, non_conflict
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import (
    BaseStrategy,
    BeamSearchStrategy,
    filling_sequence,
    generate,
    get_masks_and_position_ids_default,
    get_masks_and_position_ids_glm,
    stream_filling_sequence,
)
from sat_lightning.generation.memory import Memory
from sat_lightning.mixins import CachedAutoregressiveMixin, PrefixTuningMixin
from tests.families import FAMILIES, ids
from tests.test_cached_autoregressive import CAUSAL, ORDERS, PAIRS, Prefix

GREEDY = BaseStrategy(top_k=1)
GIVEN = [20, 29, 37, 53, -1, -1, 41, 12, -1, 9, -1, -1]


def build(name="gpt2", **changes):
    return (FAMILIES | ORDERS)[name].build(**changes).eval()


def slots(values=GIVEN):
    return torch.tensor(values)


def written(score, values=GIVEN):
    """The most likely text, everything computed anew for every slot."""
    tokens = []
    for token in values:
        with torch.no_grad():
            tokens.append(token if token >= 0 else int(score(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


# ---- the text is the uncached one


@pytest.mark.parametrize("name", [*CAUSAL, *ORDERS])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_writes_what_the_uncached_model_writes(name, with_prefix):
    model = build(name)
    if with_prefix:
        model.add_mixin("prefix", Prefix(model.config))
    expected = written(lambda tokens: model(tokens, attention_mask="causal")[0])
    tokens, mems = filling_sequence(model, slots(), 1, GREEDY)
    assert tokens.tolist() == [expected]
    size = 2 * model.config.num_key_value_heads * model.config.head_size
    assert mems.shape == (model.config.num_layers, 1, 11, size) and not mems.requires_grad


@pytest.mark.parametrize("name", ["glm-blank", "chatglm"])
def test_a_family_lays_its_text_out_itself(name):
    """Context, a blank (1), and behind the token 2 what fills it."""
    model, values = build(name), [20, 29, 1, 33, 2, -1, -1, 17, -1]
    expected = written(lambda tokens: model(tokens)[0], values)
    tokens, mems = filling_sequence(model, slots(values), 1, GREEDY)
    assert tokens.tolist() == [expected] and mems.shape[2] == 8
    layout = partial(get_masks_and_position_ids_glm, mask_position=2, context_length=4)
    by_hand, same = filling_sequence(model, slots(values), 1, GREEDY, get_masks_and_position_ids=layout)
    assert by_hand.tolist() == [expected]
    assert_close(same, mems)


@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_writes_what_it_would_uncached(name):
    model, source = build(name), ids(1)
    mask = torch.ones(1, 9)
    mask[:, 7:] = 0
    expected = written(lambda tokens: model(source, dec_input_ids=tokens, enc_attention_mask=mask)[1])
    tokens, mems = filling_sequence(model, slots(), 2, GREEDY, enc_input_ids=source, enc_attention_mask=mask)
    assert tokens.tolist() == [expected, expected] and mems.shape[1] == 2
    with torch.no_grad():
        outputs = model.encode(source, attention_mask=mask)
    reads = {"encoder_outputs": outputs, "cross_attention_mask": mask[:, None, None]}
    assert filling_sequence(model.decoder, slots(), 1, GREEDY, **reads)[0].tolist() == [expected]
    assert filling_sequence(model, slots(), 1, GREEDY, **reads)[0].tolist() == [expected]
    with pytest.raises(InputError, match="needs what to read: pass enc_input_ids= or encoder_outputs="):
        filling_sequence(model, slots(), 1, GREEDY)


def test_each_row_reads_an_encoders_text_of_its_own():
    model, source = build("t5"), ids(2)
    expected = [written(lambda tokens, row=row: model(row[None], dec_input_ids=tokens)[1]) for row in source]
    assert expected[0] != expected[1]
    assert filling_sequence(model, slots(), 2, GREEDY, enc_input_ids=source)[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_ones_own(dtype):
    """Fractions are taken literally, and so are masks that hide a given token from all later ones."""
    model, values = build().to(dtype), [20, 29, 37, 53, -1, -1, -1]

    def layout(seq, hidden=0.0):
        tokens, mask, positions = get_masks_and_position_ids_default(seq)
        mask[..., 2:, 1] = hidden
        return tokens, mask, positions

    texts = []
    for hidden in (0.0, 0.5):
        get_layout = partial(layout, hidden=hidden)

        def score(tokens, get_layout=get_layout):
            return model(*(lambda t, m, p: (t, p, m))(*get_layout(tokens[0])))[0]

        tokens, mems = filling_sequence(model, slots(values), 1, GREEDY, get_masks_and_position_ids=get_layout)
        if dtype == torch.float32:
            assert tokens.tolist() == [written(score, values)]
        assert mems.dtype == dtype
        texts.append(mems)
    assert not torch.equal(*texts)


def test_log_attention_weights_are_cut_for_each_step():
    model = build()
    weights = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 3
    whole = written(
        lambda t: model(t, attention_mask="causal", log_attention_weights=weights[..., : t.shape[1], : t.shape[1]])[0]
    )
    assert filling_sequence(model, slots(), 1, GREEDY, log_attention_weights=weights)[0].tolist() == [whole]
    assert filling_sequence(model, slots(), 1, GREEDY)[0].tolist() != [whole]
    keys = weights[:, :, :1]
    whole = written(lambda t: model(t, attention_mask="causal", log_attention_weights=keys[..., : t.shape[1]])[0])
    assert filling_sequence(model, slots(), 1, GREEDY, log_attention_weights=keys)[0].tolist() == [whole]


# ---- memory


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptneo", "t5"])
@pytest.mark.parametrize("has_own_layout", [False, True])
def test_only_the_newest_positions_stay(name, has_own_layout):
    """Later tokens see 3 positions behind them, at absolute places: what a mask says to the uncached model."""
    model, length = build(name), 3
    mask = torch.ones(12, 12).tril()
    for start, stop in ((4, 5), (5, 8), (8, 10), (10, 11)):  # tokens are fed in these pieces
        mask[start:stop, : start - length] = 0
    kw = {}
    if name == "t5":
        kw = {"encoder_outputs": torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))}
        model = model.decoder

    def score(tokens):
        n = tokens.shape[1]
        return model(tokens, torch.arange(n)[None], mask[:n, :n], **kw)[0]

    more = {"get_masks_and_position_ids": lambda seq: get_masks_and_position_ids_default(seq)} if has_own_layout else {}
    tokens, mems = filling_sequence(model, slots(), 1, GREEDY, length, **more, **kw)
    assert tokens.tolist() == [written(score)]
    assert mems.shape[2] == 3
    steps = stream_filling_sequence(model, slots(), 1, GREEDY, length, **kw)
    assert [mems.shape[2] for _, mems in steps] == [3] * 5
    assert filling_sequence(model, slots(), 1, GREEDY, **kw)[1].shape[2] == 11


def test_phases_continue_one_another():
    model, values = build("mistral"), [*GIVEN, 33, -1, -1, 7, -1]
    expected, whole = filling_sequence(model, slots(values), 1, GREEDY)
    first, mems = filling_sequence(model, slots(), 1, GREEDY)
    second, mems = filling_sequence(model, torch.cat([first[0], slots(values[12:])]), 1, GREEDY, mems=mems)
    assert torch.equal(second, expected)
    assert_close(mems, whole)


def test_phases_continue_with_what_is_left_of_the_memory():
    model, values = build(), [20, 29, 37, 53, -1, -1, -1, -1, -1, -1]
    expected, whole = filling_sequence(model, slots(values), 1, GREEDY, 4)
    first, mems = filling_sequence(model, slots(values[:7]), 1, GREEDY, 4)
    seq = torch.cat([first[0], slots([-1, -1, -1])])
    second, mems = filling_sequence(model, seq, 1, GREEDY, 4, mems=mems, num_forgotten=2)
    assert torch.equal(second, expected)
    assert_close(mems, whole)


def test_mems_of_one_row_serve_many_and_of_many_each_its_own():
    model = build()
    strategy = BaseStrategy(top_k=5)
    first, mems = filling_sequence(model, slots(GIVEN[:8]), 1, strategy, seed=1)
    seq = torch.cat([first[0], slots([-1, -1])])
    many, grown = filling_sequence(model, seq, 3, strategy, mems=mems, seed=2)
    again, _ = filling_sequence(model, seq, 3, strategy, seed=2)
    assert torch.equal(many, again) and grown.shape[1] == 3
    seq = torch.cat([seq[:8], slots([41, -1, -1])])
    mems = grown[:, :, :8]
    assert torch.equal(
        filling_sequence(model, seq, 3, GREEDY, mems=mems)[0], filling_sequence(model, seq, 3, GREEDY)[0]
    )


def test_memory_is_not_copied_at_every_step(monkeypatch):
    moves, model = [], build(max_sequence_length=64)
    move = Memory._move
    monkeypatch.setattr(Memory, "_move", lambda *args: (moves.append(1), move(*args)))
    filling_sequence(model, slots([5] + [-1] * 60), 1, GREEDY)
    assert len(moves) == 1
    filling_sequence(model, slots([5] + [-1] * 60), 1, GREEDY, 10)
    assert len(moves) <= 1 + 1 + 60 // 10


# ---- streams


@pytest.mark.parametrize("length", [100000, 3])
def test_a_stream_shows_every_token(length):
    model = build()
    steps = list(stream_filling_sequence(model, slots(), 1, GREEDY, length))
    tokens, mems = filling_sequence(model, slots(), 1, GREEDY, length)
    assert [step.shape[1] for step, _ in steps] == [5, 6, 9, 11, 12]
    for step, memory in steps:  # what was handed out is still what it was
        assert torch.equal(step, tokens[:, : step.shape[1]])
        stop = step.shape[1] - 1
        if length > 3:
            assert_close(memory, mems[:, :, :stop])
    assert_close(steps[-1][1], mems)


def test_two_streams_over_one_model_do_not_meet():
    model, others = build("llama"), [31, 9, 48, -1, -1, -1, -1]
    before = model.hook_origins
    expected = [filling_sequence(model, slots(values), 1, GREEDY)[0] for values in (GIVEN, others)]
    streams = [stream_filling_sequence(model, slots(v), 1, GREEDY) for v in (GIVEN, others)]
    last = [None, None]
    for _ in range(5):
        for i, one in enumerate(streams):
            last[i] = next(one, (last[i], None))[0]
            assert model.hook_origins == before and not model.mixins.keys() & {"auto-regressive"}
    assert all(torch.equal(*pair) for pair in zip(last, expected, strict=True))


def test_a_stream_refuses_at_once():
    with pytest.raises(InputError, match="seq is empty"):
        stream_filling_sequence(build(), slots([]).long())


# ---- the model is left as it was


class Fails(BaseMixin):
    @non_conflict
    def final_forward(self, logits, *, old_impl, mems=None, **kw):
        if mems is not None and mems.shape[2] > 5:
            raise RuntimeError("no more")
        return old_impl(logits, **kw)


def test_the_model_is_left_as_it_was():
    model = build(hidden_dropout=0.5).train()
    model.transformer.layers[0].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    before, keys = model.hook_origins, list(model.state_dict())
    expected = filling_sequence(model, slots(), 1, GREEDY)[0]  # no dropout acts
    assert torch.equal(filling_sequence(model, slots(), 1, GREEDY)[0], expected)
    for _ in stream_filling_sequence(model, slots(), 1, GREEDY):
        assert [module.training for module in model.modules()] == modes
    model.add_mixin("fails", Fails())
    failing = model.hook_origins
    with pytest.raises(RuntimeError, match="no more"):
        filling_sequence(model, slots(), 1, GREEDY)
    assert model.hook_origins == failing
    model.del_mixin("fails")
    assert [module.training for module in model.modules()] == modes
    assert model.hook_origins == before and list(model.state_dict()) == keys


def test_a_cache_that_is_there_is_used():
    model = build()
    expected = filling_sequence(model, slots(), 1, GREEDY)[0]
    model.add_mixin("cache", CachedAutoregressiveMixin())
    assert torch.equal(filling_sequence(model, slots(), 1, GREEDY)[0], expected)
    assert model.hook_origins["attention_fn"] == "cache -> default"


def test_a_compiled_model_writes_too():
    model = build(num_layers=1)
    compiled = torch.compile(model, backend="eager")
    text = slots([20, 29, 37, -1, -1])
    assert torch.equal(filling_sequence(compiled, text, 1, GREEDY)[0], filling_sequence(model, text, 1, GREEDY)[0])


class Alone(BaseMixin):
    """An attention that answers by itself, so that the cache is never asked."""

    @non_conflict
    def attention_forward(self, hidden_states, mask, *, old_impl, **kw):
        return hidden_states


def test_a_model_whose_cache_is_never_asked():
    model = build()
    model.add_mixin("alone", Alone())
    with pytest.raises(InputError, match=r"layers \[0, 1\] gave no mem_kv"):
        filling_sequence(model, slots(), 1, GREEDY)


# ---- strategies


def test_rows_draw_by_themselves_and_from_the_seed():
    model, strategy = build(), BaseStrategy(top_k=20)
    three = filling_sequence(model, slots(), 3, strategy, seed=7)[0]
    assert torch.equal(filling_sequence(model, slots(), 1, strategy, seed=7)[0], three[:1])
    assert len({tuple(row) for row in three.tolist()}) == 3
    assert three[:, [0, 1, 2, 3, 6, 7, 9]].tolist() == [[20, 29, 37, 53, 41, 12, 9]] * 3
    torch.manual_seed(5)
    first = filling_sequence(model, slots())[0]
    torch.manual_seed(5)
    assert torch.equal(filling_sequence(model, slots())[0], first)


def test_a_row_ends_by_itself():
    model = build()
    strategy = BaseStrategy(top_k=20)
    values = [20, 29, *[-1] * 8, 7, -1]
    free = filling_sequence(model, slots(values), 4, strategy, seed=3)[0]
    end = int(free[0, 4])
    ended = filling_sequence(model, slots(values), 4, BaseStrategy(top_k=20, end_tokens=[end]), seed=3)[0]
    for row, found in zip(free.tolist(), ended.tolist(), strict=True):
        stop = next((i for i in range(2, 12) if row[i] == end and values[i] < 0), 11)
        assert found == row[: stop + 1] + [-1] * (11 - stop)
    alone = filling_sequence(model, slots(values), 1, BaseStrategy(top_k=20, end_tokens=[end]), seed=3)
    assert alone[0].tolist() == [ended[0, : alone[0].shape[1]].tolist()] and alone[0][0, -1] == end
    assert alone[1].shape[2] == alone[0].shape[1] - 1


class SatGreedy:
    """As SAT's users write them: with its state in itself."""

    def __init__(self, end=None):
        self.end, self.is_done, self.seen = end, False, []

    def forward(self, logits, tokens, mems, temperature=None):
        self.seen.append(logits)
        choice = logits.argmax(-1, keepdim=True)
        self.is_done = self.is_done or choice[:, 0].tolist() == [self.end] * len(choice)
        return torch.cat([tokens, choice], dim=1), mems

    def finalize(self, tokens, mems):
        return tokens, mems


class SatSubclass(BaseStrategy):
    """Never the likeliest token of all."""

    def forward(self, logits, tokens, mems):
        likeliest = logits.argmax(-1, keepdim=True)
        assert self.topk == self.top_k
        return super().forward(logits.scatter(1, likeliest, -1e4), tokens, mems, temperature=0.5)

    def finalize(self, tokens, mems):
        super().finalize(tokens, mems)
        return {"tokens": tokens, "mems": mems}


def test_strategies_written_for_sat():
    model = build()
    expected, mems = filling_sequence(model, slots(), 2, GREEDY)
    strategy = SatGreedy()
    tokens, found = filling_sequence(model, slots(), 2, strategy)
    assert torch.equal(tokens, expected) and len(strategy.seen) == 5
    assert_close(found, mems)
    second = filling_sequence(model, slots(), 2, SatSubclass(top_k=1))["tokens"]
    with torch.no_grad():
        scores = model(second, attention_mask="causal")[0]
    for place in (4, 5, 8, 10, 11):
        assert torch.equal(second[:, place], scores[:, place - 1].topk(2).indices[:, 1])
    with pytest.raises(ConfigError, match=r"strategy is a object: it has neither step\(logits, state\)"):
        filling_sequence(model, slots(), 2, object())


def test_a_loop_written_for_sat():
    """It feeds the model and asks the strategy itself; `forward` is `step` with a text in the place of a state."""
    model = build()
    model.add_mixin("auto-regressive", CachedAutoregressiveMixin())
    expected = filling_sequence(model, slots([20, 29, 37, *[-1] * 6]), 1, BaseStrategy(top_k=1, repetition_penalty=2.0))
    end = int(expected[0][0, 6])
    strategy = BaseStrategy(top_k=1, repetition_penalty=2.0, end_tokens=[end])
    for _ in range(2):
        tokens, mems = torch.tensor([[20, 29, 37]]), None
        while not strategy.is_done:
            with torch.no_grad():
                logits, *layers = model(tokens[:, 0 if mems is None else mems.shape[2] :], attention_mask=-1, mems=mems)
            new = torch.stack([layer["mem_kv"] for layer in layers])
            mems = new if mems is None else torch.cat([mems, new], dim=2)
            tokens, mems = strategy.forward(logits[:, -1], tokens, mems)
        tokens, mems = strategy.finalize(tokens, mems)
        assert not strategy.is_done and torch.equal(tokens, expected[0][:, :7])
    nothing = torch.full((2, 60), float("nan"))
    with pytest.raises(InputError, match="step 0, row 0: the logits are NaN"):
        strategy.forward(nothing, torch.tensor([[5], [6]]), None)
    assert strategy.forward(nothing, torch.tensor([[5], [6]]), None, nan_default_token=9)[0].tolist() == [
        [5, 9],
        [6, 9],
    ]


def test_a_strategy_written_for_sat_begins_anew_in_each_call():
    """In SAT one that has ended in a stream stops the next call at once."""
    model = build()
    expected = filling_sequence(model, slots(), 1, GREEDY)[0]
    strategy = SatGreedy(end=int(expected[0, 8]))
    for _ in range(2):
        steps = list(stream_filling_sequence(model, slots(), 1, strategy))
        assert torch.equal(steps[-1][0], expected[:, :9])
    assert not strategy.is_done


class SatBeams(SatGreedy):
    """Turns its two rows around at every step, memory and all."""

    num_beams = 2

    def forward(self, logits, tokens, mems, temperature=None):
        tokens, mems = super().forward(logits, tokens, mems)
        tokens = tokens.clone()
        if tokens.shape[1] == 5:
            tokens[1, -1] = 3
        return tokens.flip(0), mems.expand(-1, 2, -1, -1).flip(1)


def test_a_strategy_may_reorder_tokens_and_memory():
    model, values = build(), [20, 29, 37, 53, -1, -1, -1, -1]
    likely = written(lambda t: model(t, attention_mask="causal")[0], values)
    other = written(lambda t: model(t, attention_mask="causal")[0], [*values[:4], 3, -1, -1, -1])
    tokens, mems = filling_sequence(model, slots(values), 1, SatBeams())
    assert tokens.tolist() == [likely, other]
    alone = filling_sequence(model, slots([*values[:4], 3, -1, -1, -1]), 1, GREEDY)[1]
    assert_close(mems[:, 1:], alone)


@pytest.mark.parametrize("end_tokens", [(), (7, 31, 59)])
def test_beams_are_those_of_generate(end_tokens):
    model, prompt = build("llama"), [20, 29, 37, 53]
    strategy = BeamSearchStrategy(3, end_tokens=end_tokens, no_repeat_ngram_size=2)
    texts, mems = filling_sequence(model, slots([*prompt, *[-1] * 9]), 1, strategy)
    (result,) = generate(model, [prompt], strategy=strategy, max_new_tokens=9)
    expected = [prompt + found.tokens for found in (result, *result.alternatives)]
    assert [text.tolist() for text in texts] == expected and mems is None


def test_running_beams_come_with_their_memory():
    model, strategy = build(), BeamSearchStrategy(3, consider_end=False)
    tokens, mems = filling_sequence(model, slots(), 1, strategy)
    assert tokens.shape == (3, 12) and mems.shape[:3] == (2, 3, 11)
    assert tokens[:, [0, 1, 2, 3, 6, 7, 9]].tolist() == [[20, 29, 37, 53, 41, 12, 9]] * 3
    for row, memory in zip(tokens, mems.unbind(1), strict=True):
        alone = filling_sequence(model, torch.cat([row[:-1], slots([-1])]), 1, GREEDY)[1]
        assert_close(memory[:, None], alone)
    *_, (last, memory) = stream_filling_sequence(model, slots(), 1, strategy)
    assert torch.equal(last, tokens)
    assert_close(memory, mems)


def test_images_are_read_once():
    """Later steps find them in the memory."""
    family = FAMILIES["glm4v"]
    model, given = family.build().eval(), family.inputs(0)
    seen = {"image_embed_mask": given["image_embed_mask"][:1], "vision_image": given["vision_image"][:1]}
    values = [*given["input_ids"][0].tolist(), -1, 7, -1, -1]

    def score(tokens):
        mask = torch.nn.functional.pad(seen["image_embed_mask"], (0, tokens.shape[1] - 9))
        return model(tokens, image_embed_mask=mask, vision_image=seen["vision_image"])[0]

    tokens = filling_sequence(model, slots(values), 1, GREEDY, **seen)[0]
    assert tokens.tolist() == [written(score, values)]


def test_a_function_is_called_as_sat_calls_a_model():
    model = build()
    model.add_mixin("auto-regressive", CachedAutoregressiveMixin())
    seen = []

    def call(**kw):
        seen.append(set(kw))
        return model(**kw)

    assert torch.equal(filling_sequence(call, slots(), 1, GREEDY)[0], filling_sequence(model, slots(), 1, GREEDY)[0])
    keywords = {"input_ids", "position_ids", "attention_mask", "mems", "log_attention_weights"}
    assert seen == [keywords] * len(seen)


def test_rows_with_weights_of_their_own():
    model = build()
    weights = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)) * 3
    tokens, mems = filling_sequence(model, slots(), 2, GREEDY, log_attention_weights=weights)
    for row in range(2):
        alone = filling_sequence(model, slots(), 1, GREEDY, log_attention_weights=weights[row : row + 1])
        assert torch.equal(tokens[row : row + 1], alone[0])
        assert_close(mems[:, row : row + 1], alone[1])
    assert not torch.equal(mems[:, 0], mems[:, 1])


def test_a_task_that_holds_a_model():
    model = build()
    task = torch.nn.Module()
    task.model = model
    assert torch.equal(filling_sequence(task, slots(), 1, GREEDY)[0], filling_sequence(model, slots(), 1, GREEDY)[0])


# ---- what is refused


@pytest.mark.parametrize(
    ("seq", "message"),
    [
        ([-1, 5, -1], r"seq begins with a slot \(-1\): nothing is given that it could follow"),
        ([], "seq is empty; it must begin with a given token"),
        ([5, 6], "none of the 2 places of seq is a slot: put -1"),
        ([5, 60, -1], r"seq\[1\] is 60, outside the vocabulary of 60 \(ids 0 to 59\)"),
        ([[5, -1]], r"seq is int64 \[1, 2\]; it must be a tensor \[length\] of ids"),
        ([5.0, -1.0], r"seq is float32 \[2\]; it must be a tensor \[length\] of ids"),
        ([5] * 20 + [-1] * 5, "The sequence has 25 tokens, max_sequence_length is 24"),
    ],
)
def test_a_text_that_cannot_be_filled(seq, message):
    seq = torch.tensor(seq) if seq else torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        filling_sequence(build(), seq, 1, GREEDY)


def test_a_layout_that_leaves_the_table():
    def far(seq):
        tokens, mask, positions = get_masks_and_position_ids_default(seq)
        return tokens, mask, positions + 20

    with pytest.raises(InputError, match="position_ids reach 31, and the model's table has 24 positions"):
        filling_sequence(build(), slots(), 1, GREEDY, get_masks_and_position_ids=far)


def test_a_list_is_no_seq():
    with pytest.raises(InputError, match="seq is a list; it must be a tensor"):
        filling_sequence(build(), [5, -1], 1, GREEDY)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 64), r"mems has shape \[2, 3, 4, 64\]; for 2 row\(s\) it must be \[num_layers, 2, length"),
        ((2, 4, 64), r"mems has shape \[2, 4, 64\]; for 2 row\(s\)"),
        ((1, 2, 3, 64), r"mems has shape \[1, 2, 3, 64\]; for 2 rows it must be \[2 layers, 2, length, 64\]"),
        ((2, 2, 3, 32), r"mems has shape \[2, 2, 3, 32\]; for 2 rows it must be \[2 layers, 2, length, 64\]"),
        ((2, 2, 4, 64), r"mems hold 4 positions and seq has 4 tokens before its first slot: none is left to feed"),
    ],
)
def test_mems_that_cannot_be_continued(shape, message):
    with pytest.raises(InputError, match=message):
        filling_sequence(build(), slots(), 2, GREEDY, mems=torch.zeros(shape))


def test_numbers_out_of_their_range():
    with pytest.raises(InputError, match="batch_size is 0"):
        filling_sequence(build(), slots(), 0, GREEDY)
    with pytest.raises(InputError, match="max_memory_length is -1"):
        filling_sequence(build(), slots(), 1, GREEDY, -1)


class Breaks(BaseMixin):
    """From the third call on the second row's scores are no numbers."""

    @non_conflict
    def final_forward(self, logits, *, old_impl, mems=None, **kw):
        scores = old_impl(logits, **kw)
        if mems is not None and mems.shape[2] >= 5:
            scores[1] = float("nan")
        return scores


@pytest.mark.parametrize("strategy", [GREEDY, BaseStrategy(), SatGreedy()])
def test_logits_that_are_no_numbers_name_step_and_row(strategy):
    model = build()
    model.add_mixin("breaks", Breaks())
    seen = []
    with pytest.raises(InputError, match="step 2, row 1: the logits are NaN or infinite"):
        for tokens, _ in stream_filling_sequence(model, slots([20, 29, 37, 53, -1, -1, -1, -1]), 2, strategy):
            seen.append(tokens)
    assert len(seen) == 2  # nothing was made of them


def test_one_look_at_the_device_for_each_token(monkeypatch):
    looks = Counter()

    def counting(name, real):
        return lambda *args, **kw: (looks.update([name]), real(*args, **kw))[1]

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    model, counts = build(), []
    for num_slots in (4, 14):
        looks.clear()
        filling_sequence(model, slots([5, 6] + [-1] * num_slots), 2, BaseStrategy(end_tokens=[59]), seed=0)
        counts.append(looks.total())
    assert counts[1] - counts[0] <= 10


def test_a_method_that_is_disabled_stays_so():
    model = build("gpt2")
    expected = filling_sequence(model, slots(), 1, GREEDY)[0]
    model.add_mixin("prefix", PrefixTuningMixin(model.config, 3))
    with torch.no_grad():
        for prefix in model.get_mixin("prefix").parameters():
            prefix.normal_(std=3)
    assert not torch.equal(filling_sequence(model, slots(), 1, GREEDY)[0], expected)
    model.get_mixin("prefix").disable()
    assert torch.equal(filling_sequence(model, slots(), 1, GREEDY)[0], expected)
