"""Leaving padding out of the layers changes no result: of any family, method, task, precision and compiler."""

import copy
import json

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from sat_lightning import BaseMixin, mixins, non_conflict
from sat_lightning.data import LabelCollate, PadCollate, PairCollate, SampleOptions, UnpadCollate
from sat_lightning.errors import DataError, InputError
from sat_lightning.training import SATDataModule
from sat_lightning.training.dataoptions import DataOptions
from tests import methods
from tests.families import FAMILIES
from tests.methods import METHODS
from tests.task_examples import TASKS, build
from tests.zero_cases import Recorder

LENGTHS = [9, 4, 1, 6]


def make_mask(lengths=LENGTHS, width=9):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def indices(mask):
    return mask.flatten().nonzero()[:, 0]


def padded(mask, seed=0):
    """A call whose mask hides the padding from all."""
    input_ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": input_ids, "attention_mask": mask[:, None, None, :]}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, inputs, mask, **more):
    """What the model says of the tokens, and every gradient."""
    model.zero_grad()
    result = model(**inputs, **more)[0]
    result = result[mask] if result.shape[:2] == mask.shape else result
    result.float().square().mean().backward()
    return result.detach(), gradients(model)


#: Text families whose rows are tokens and nothing else; those of the second set call True what is hidden.
HIDING = {"glm130b", "glm130b-2d", "chatglm", "chatglm2", "chatglm3", "chatglm4"}
TEXT = [name for name, family in FAMILIES.items() if family.inputs(0).keys() == {"input_ids"} and name != "cuda2d"]


@pytest.mark.parametrize("family", TEXT)
def test_a_family_says_the_same_of_its_tokens(family):
    model, mask = FAMILIES[family].build().train(), make_mask()
    inputs = padded(mask)
    if family in HIDING:
        inputs["attention_mask"] = ~inputs["attention_mask"]
    expected, found = (run(model, inputs, mask, **more) for more in ({}, {"token_indices": indices(mask)}))
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_is_the_same_within_its_rounding():
    model, mask = FAMILIES["bert"].build().to(torch.bfloat16), make_mask()
    expected, found = (
        run(model, padded(mask), mask, **more)[0].float() for more in ({}, {"token_indices": indices(mask)})
    )
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].is_head])
def test_a_method_learns_the_same(method, family):
    if family in METHODS[method].refused:
        return  # see tests/test_methods.py
    model, names = methods.build(family, method)
    mask = make_mask()
    inputs = padded(mask) | METHODS[method].call
    expected, found = (run(model.train(), inputs, mask, **more) for more in ({}, {"token_indices": indices(mask)}))
    assert any(name.startswith(f"mixins.{names[0]}") for name in found[1]) or method in ("bitfit", "layernorm")
    assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_layers_see_tokens_only_and_the_final_hook_zeros():
    seen = {}

    class Watch(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states, *, old_impl, **kw):
            seen["mlp"] = hidden_states.shape
            return old_impl(hidden_states, **kw)

        @non_conflict
        def attention_fn(self, query, key, value, mask, *args, old_impl, **kw):
            seen["attention"] = query.shape
            return old_impl(query, key, value, mask, *args, **kw)

        @non_conflict
        def final_forward(self, logits, *, old_impl, **kw):
            seen["final"] = logits
            return old_impl(logits, **kw)

    model, mask = FAMILIES["llama"].build(), make_mask()
    model.add_mixin("watch", Watch())
    _, *layers = model(**padded(mask), token_indices=indices(mask), output_hidden_states=True)
    assert seen["mlp"] == (1, 20, 32) and seen["attention"] == (4, 4, 9, 8)
    assert seen["final"].shape == (4, 9, 32) and not seen["final"][~mask].any() and seen["final"][mask].all()
    _, *whole = model(**padded(mask), output_hidden_states=True)
    for one, other in zip(layers, whole, strict=True):
        assert_close(one["hidden_states"][mask], other["hidden_states"][mask])
        assert not one["hidden_states"][~mask].any()


@pytest.mark.parametrize("method", [None, *(name for name in METHODS if "t5" not in METHODS[name].refused)])
def test_an_encoder_and_its_decoder_leave_out_what_each_pads(method):
    model, _ = methods.build("t5", method)
    read, written = make_mask([9, 4]), make_mask([2, 7], width=7)
    torch.manual_seed(0)
    ids = {"enc_input_ids": torch.randint(5, 60, (2, 9)), "dec_input_ids": torch.randint(5, 60, (2, 7))}
    inputs = ids | {"enc_attention_mask": read} | (METHODS[method].call if method else {})
    if method == "task-heads":
        inputs["token_mask"] = written  # it pools
    left_out = {"enc_token_indices": indices(read), "dec_token_indices": indices(written)}
    found = []
    for more in ({}, left_out):
        model.zero_grad()
        _, result, *_ = model(**inputs, **more)
        result = result[written] if result.dim() == 3 else result  # a head may have pooled
        result.square().mean().backward()
        found.append((result.detach(), gradients(model)))
    assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)
    with pytest.raises(InputError, match="their own, enc_ and dec_token_indices"):
        model(**inputs, token_indices=indices(read))


@pytest.mark.parametrize("is_checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_into_one_graph_for_all_numbers_of_tokens(is_checkpointed):
    model = FAMILIES["bert"].build(checkpoint_activations=is_checkpointed, num_layers=1).train()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    twin.compile(fullgraph=True, backend="aot_eager")
    counters.clear()
    for lengths in (LENGTHS, [9, 9, 2, 3], [1, 2, 3, 9]):
        mask = make_mask(lengths)
        expected, found = (run(one, padded(mask), mask, token_indices=indices(mask)) for one in (model, twin))
        assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] <= 2  # the first number of tokens, and any


def test_a_batch_of_which_nothing_is_a_token_is_computed():
    model, mask = FAMILIES["bert"].build(), torch.zeros(2, 9, dtype=torch.bool)
    result = model(**padded(mask), token_indices=indices(mask))[0]
    assert result.shape == (2, 9, 60) and result.isfinite().all()


@pytest.mark.parametrize(
    ("token_indices", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.long), r"int64 \[2, 9\]; for 2 rows of 9 tokens it must be int64 \[n\]"),
        (torch.zeros(3), r"float32 \[3\]"),
        (torch.zeros(19, dtype=torch.long), r"int64 \[19\]"),
    ],
)
def test_other_indices_are_refused(token_indices, message):
    with pytest.raises(InputError, match=message):
        FAMILIES["bert"].build()(**padded(make_mask([9, 4])), token_indices=token_indices)


class Replaced(BaseMixin):
    def attention_forward(self, hidden_states, mask, **kw):
        return hidden_states


class Rows(BaseMixin):
    @non_conflict
    def mlp_forward(self, hidden_states, *, old_impl, **kw):
        return old_impl(hidden_states, **kw) * torch.ones(2, 1, 1)


class More(BaseMixin):
    @non_conflict
    def word_embedding_forward(self, input_ids, *, old_impl, **kw):
        return torch.nn.functional.pad(old_impl(input_ids, **kw), (0, 0, 0, 1))

    @non_conflict
    def position_embedding_forward(self, position_ids, *, old_impl, **kw):
        return None


@pytest.mark.parametrize(
    ("mixin", "message"),
    [
        (Replaced, "'mine' replaces attention_forward, which puts padding back"),
        (Rows, r"13 tokens are computed, and a layer holds \[2, 13, .*a hook that needs whole rows"),
        (More, "about 9 tokens, and the embeddings are 10 long"),
    ],
)
def test_hooks_that_need_whole_rows_are_refused(mixin, message):
    model, mask = FAMILIES["bert"].build(), make_mask([9, 4])
    model.add_mixin("mine", mixin())
    with pytest.raises(InputError, match=message):
        model(**padded(mask), token_indices=indices(mask))


def test_dropping_whole_paths_is_refused_in_training_only():
    model, mask = FAMILIES["bert"].build(drop_path=0.5), make_mask([9, 4])
    model.eval()(**padded(mask), token_indices=indices(mask))
    with pytest.raises(InputError, match="drop_path is 0.5: it drops whole rows"):
        model.train()(**padded(mask), token_indices=indices(mask))


def test_samples_are_told_apart():
    model, mask = FAMILIES["bert"].build(), make_mask([9, 4])
    model.add_mixin("lora", mixins.LoraMixin(model.config, rank=2))
    methods.stir(model, ["lora"])
    calls = ({}, {"token_indices": indices(mask)})
    expected, found = (run(model, padded(mask), mask, adapter_ids=[0, -1], **more) for more in calls)
    assert_close(found, expected, atol=1e-5, rtol=1e-3)
    for ids in ([0, 0], [-1, -1]):
        assert not torch.allclose(run(model, padded(mask), mask, adapter_ids=ids)[0], found[0])


# ---- batches


def text(*lengths):
    return [{"input_ids": torch.arange(5, 5 + n), "token_mask": torch.ones(n, dtype=torch.bool)} for n in lengths]


def test_a_collate_tells_which_entries_are_tokens():
    batch = UnpadCollate(LabelCollate(multiple_of=4), 1)([*text(3, 5), None])
    assert batch["token_indices"].tolist() == [0, 1, 2, 8, 9, 10, 11, 12]
    assert batch["input_ids"].flatten()[batch["token_indices"]].tolist() == [5, 6, 7, 5, 6, 7, 8, 9]
    assert "token_indices" not in UnpadCollate(LabelCollate(), 1)(text(3, 3))
    assert UnpadCollate(PadCollate(token_mask=True, side="left"), 1)(
        [{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(1)}]
    )["token_indices"].tolist() == [0, 1, 2, 5]


def test_a_collate_tells_it_of_both_parts_of_a_pair():
    pairs = [
        {"input_ids": torch.arange(3), "target_ids": torch.arange(2)},
        {"input_ids": torch.arange(2), "target_ids": torch.arange(3)},
        None,
    ]
    batch = UnpadCollate(PairCollate(), 1)(pairs)
    assert batch["enc_token_indices"].tolist() == [0, 1, 2, 3, 4, 6]
    assert batch["dec_token_indices"].tolist() == [0, 1, 3, 4, 5]


def test_a_few_numbers_of_tokens_are_enough():
    collate = UnpadCollate(LabelCollate(), round_to=4)
    assert collate(text(3, 5, 2))["token_indices"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # 10 are tokens
    assert "token_indices" not in collate(text(4, 5))  # 9 are, of 10
    numbers = {len(UnpadCollate(LabelCollate())(text(60, *[n] * 7))["token_indices"]) for n in range(1, 50)}
    assert numbers == {128, 192, 256, 320, 384, 448}
    with pytest.raises(DataError, match="round_to is 0"):
        UnpadCollate(LabelCollate(), 0)


def test_batches_are_planned_as_without_it():
    collate = UnpadCollate(PadCollate(length=12, multiple_of=4, token_mask=True))
    assert (collate.length, collate.multiple_of) == (12, 4)


def test_a_batch_that_does_not_say_what_is_padding_is_refused():
    with pytest.raises(DataError, match="and no token_mask, which says what is padding. Let PadCollate add one"):
        UnpadCollate(PadCollate())([{"input_ids": torch.arange(3)}])


# ---- training


def losses_of(task, collate, folder, **changes):
    example = TASKS[task]
    L.seed_everything(0, verbose=False)
    teacher = {"teacher_path": str(folder / "teacher")} if task == "distillation" else {}
    recorder = Recorder(None)
    module = example.make(**teacher)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", devices=1, callbacks=[recorder], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = [example.train_loader(), example.val_loader()]
    for loader in loaders:
        loader.collate_fn = collate(loader.collate_fn)
    trainer.fit(module, *loaders)
    rates = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    return recorder.losses, rates


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("task", [name for name in TASKS if name != "image"])
def test_a_task_learns_and_is_rated_the_same(task, round_to, tmp_path):
    torch.manual_seed(7)
    build("GPT2Model").save_pretrained(tmp_path / "teacher")

    def told(collate):  # the samples of these tasks come without masks of their own
        if isinstance(collate, PadCollate):
            collate.token_mask = True
        return collate

    seen = []

    def watched(collate):
        def make(samples):
            batch = UnpadCollate(told(collate), round_to)(samples)
            seen.append(any("token_indices" in name for name in batch))
            return batch

        return make

    expected, found = (losses_of(task, collate, tmp_path) for collate in (told, watched))
    assert any(seen)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found[1] == pytest.approx(expected[1], rel=1e-3)


def opened(path, **options):
    data = SATDataModule(
        str(path), tokenizer="bytes", sequence_length=256, batch_size=3, options=DataOptions(**options)
    )
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def test_the_data_module_does_it_by_one_word(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n, "more": "y"}) + "\n" for n in (9, 200) * 3))
    batch = opened(path, samples=SampleOptions(), unpad=True)
    assert set(indices(batch["token_mask"]).tolist()) <= set(batch["token_indices"].tolist())
    assert len(batch["token_indices"]) % 64 == 0 and len(batch["token_indices"]) < batch["input_ids"].numel()
    assert "token_mask" not in opened(path, samples=SampleOptions())
    pairs = opened(path, samples=SampleOptions(read=["text"], fields=["more"]), unpad=True)
    assert set(indices(pairs["attention_mask"]).tolist()) <= set(pairs["enc_token_indices"].tolist())


def test_where_nothing_is_padded_it_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 50)
    with pytest.raises(DataError, match="rows of running text have none. Remove unpad"):
        opened(tmp_path / "text.txt", unpad=True)
    with pytest.raises(DataError, match="samples are packed or images. Remove unpad"):
        DataOptions(samples=SampleOptions(pack=True), unpad=True)
