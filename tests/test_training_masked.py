"""Tasks that hide words: what is hidden, what is learned of it, and what a teacher adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sat_lightning import AutoModel
from sat_lightning.data import ByteTokenizer, PadCollate, SampleOptions, Tokenize, TokenizersFile
from sat_lightning.data.words import WordEdges
from sat_lightning.errors import ConfigError
from sat_lightning.models import BertModel, DistillModel, GPT2Model
from sat_lightning.models.bert import BertConfig
from sat_lightning.training import (
    DataOptions,
    DistillationTask,
    ExportModel,
    MaskedLanguageModelingTask,
    SATDataModule,
    TrainableOnly,
)
from sat_lightning.training.distillation import soft_loss
from sat_lightning.training.hidden_loss import HiddenLoss, HiddenLossConfig
from sat_lightning.training.masking import WordMasking
from tests.training_examples import SIZES, CountingData, counting_loader, make_model, make_trainer

MASK = 16  # of 17 words


def make_bert(**changes: Any) -> BertModel:
    return BertModel(BertConfig(**{**SIZES, "layernorm_order": "pre", **changes}))


def make_pair() -> DistillModel:
    return DistillModel(make_model(), make_model(num_layers=1))


@pytest.mark.parametrize("is_fixed", [False, True])
def test_of_the_chosen_words_80_percent_are_masked_10_another_10_the_same(is_fixed: bool):
    torch.manual_seed(0)
    input_ids = torch.randint(1, 1000, (200, 500))
    batch = WordMasking(0, 0.15).hide({"input_ids": input_ids}, 1000, is_fixed)
    shown, targets = batch["input_ids"], batch["target_ids"]
    chosen = targets != -100
    assert torch.equal(targets[chosen], input_ids[chosen]) and torch.equal(shown[~chosen], input_ids[~chosen])
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.005)
    assert (shown == 0)[chosen].float().mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == input_ids)[chosen].float().mean() == pytest.approx(0.1, abs=0.02)


def test_padding_and_special_tokens_are_never_chosen_and_words_are_chosen_whole():
    input_ids = torch.arange(12).repeat(3, 1)
    targets = torch.where(input_ids < 9, input_ids, -100)
    batch = WordMasking(20, 1.0, [5]).hide({"input_ids": input_ids, "target_ids": targets}, 21)
    assert ((batch["target_ids"] != -100) == ((input_ids < 9) & (input_ids != 5))).all()
    torch.manual_seed(1)
    words = {"input_ids": torch.randint(0, 20, (8, 40)), "word_ids": torch.arange(40).repeat(8, 1) // 4}
    batch = WordMasking(20, 0.5).hide(words, 21)
    whole = (batch["target_ids"] != -100).view(8, 10, 4)
    assert torch.equal(whole.all(-1), whole.any(-1)) and whole.any() and not whole.all()
    assert "word_ids" not in batch


def test_in_evaluation_a_text_decides_whatever_its_batch_and_its_padding():
    torch.manual_seed(2)
    masking, texts = WordMasking(50, 0.3, [7]), [torch.randint(0, 50, (length,)) for length in (30, 9, 30, 17)]
    texts[2][:20] = texts[0][:20]
    alone = [masking.hide({"input_ids": text[None]}, 51, is_fixed=True) for text in texts]
    torch.manual_seed(3)  # random numbers play no part
    for side in ("right", "left"):
        together = PadCollate(side=side)([{"input_ids": text, "target_ids": text} for text in texts])
        hidden = masking.hide(together, 51, is_fixed=True)
        for row, (text, own) in enumerate(zip(texts, alone, strict=True)):
            place = slice(0, len(text)) if side == "right" else slice(30 - len(text), 30)
            for name in ("input_ids", "target_ids"):
                assert torch.equal(hidden[name][row, place], own[name][0])
            assert (hidden["target_ids"][row] != -100).sum() == (own["target_ids"] != -100).sum()
    same_start = [own["target_ids"][0, :20] != -100 for own in (alone[0], alone[2])]
    assert not torch.equal(*same_start)  # texts that begin alike are hidden apart
    ones = masking.hide({"input_ids": torch.ones(1, 1000, dtype=torch.long)}, 51, is_fixed=True)
    assert 0.25 < (ones["target_ids"] != -100).float().mean() < 0.35


def test_masks_outside_their_range_are_refused():
    with pytest.raises(ConfigError, match=r"mask_prob is 0\. Set it to a share of the tokens, above 0"):
        WordMasking(3, 0)
    with pytest.raises(ConfigError, match="mask_token_id is 17 and the model's vocab_size 17. Raise vocab_size"):
        WordMasking(17).hide({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, 17)


def test_the_loss_is_the_mean_over_hidden_words_and_0_without_any():
    task = MaskedLanguageModelingTask(make_bert(), mask_token_id=MASK, mask_prob=0.4).eval()
    batch = {"input_ids": torch.randint(0, 16, (3, 12))}
    loss = task.forward_step(batch)
    hidden = WordMasking(MASK, 0.4).hide(batch, 17, is_fixed=True)
    targets = hidden["target_ids"]
    expected = F.cross_entropy(task.model(hidden["input_ids"])[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    assert task.count_targets(batch) == (targets != -100).sum()
    nothing = {"input_ids": torch.full((2, 4), MASK)}
    assert task.forward_step(nothing) == 0 and task.count_targets(nothing) == 0


def test_a_masked_model_learns_and_every_validation_hides_the_same_words():
    torch.manual_seed(0)
    optim = {"learning_rate": 1e-2, "warmup_steps": 10}
    task = MaskedLanguageModelingTask(make_bert, mask_token_id=MASK, mask_prob=0.3, optim=optim)
    trainer = make_trainer(80)
    data = DataLoader([{"input_ids": torch.full((16,), row % 16)} for row in range(64)], batch_size=8)
    trainer.fit(task, data)
    first = trainer.validate(task, data, verbose=False)[0]
    assert first == trainer.validate(task, data, verbose=False)[0]
    assert first["val_loss"] < 2.0  # log(17) is 2.83
    assert first["val_perplexity"] == pytest.approx(torch.tensor(first["val_loss"]).exp().item(), rel=1e-4)


def test_a_resumed_run_hides_what_it_would_have_hidden(tmp_path: Path):
    def run(steps: int, path: Path | None = None) -> tuple[Any, Any]:
        torch.manual_seed(0)
        optim = {"schedule": "constant", "warmup_steps": 0}
        task, trainer = MaskedLanguageModelingTask(make_bert, mask_token_id=MASK, optim=optim), make_trainer(steps)
        trainer.fit(task, counting_loader(num_rows=8), ckpt_path=path)  # one batch an epoch
        return task, trainer

    whole, _ = run(6)
    _, half = run(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(6, tmp_path / "half.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_soft_loss_is_the_divergence_of_the_warmed_answers():
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    targets = torch.tensor([[1, 2, -100], [-100, -100, 4]])
    expected = 0.0
    for row, column in ((0, 0), (0, 1), (1, 2)):
        p, q = ((x[row, column] / 3).softmax(-1) for x in (teacher, student))
        expected += 9 * (p * (p / q).log()).sum()
    torch.testing.assert_close(soft_loss(teacher, student, targets, 3.0), torch.as_tensor(expected))
    assert soft_loss(teacher, teacher, targets, 3.0).abs() < 1e-6


def test_the_loss_of_distillation_is_the_weighted_sum_and_only_the_student_learns():
    task = DistillationTask(make_pair(), temperature=2.0, soft_weight=0.25)
    batch = next(iter(counting_loader()))
    loss, parts = task.forward_step(batch)
    torch.testing.assert_close(loss, 0.25 * parts["soft_loss"] + 0.75 * parts["hard_loss"])
    loss.backward()
    assert all(parameter.grad is None for parameter in task.model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.model.student.parameters())


def test_a_student_comes_near_its_teacher_and_checkpoints_leave_the_teacher_out(tmp_path: Path):
    torch.manual_seed(0)
    teacher = make_model()
    teacher.save_pretrained(tmp_path / "teacher")
    how = {"teacher_path": str(tmp_path / "teacher"), "soft_weight": 1.0, "optim": {"learning_rate": 3e-3}}
    task = DistillationTask(make_pair, **how)
    trainer = make_trainer(30, callbacks=[TrainableOnly()])
    trainer.fit(task, datamodule=CountingData())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, task.model.teacher.state_dict()[name])
    before = DistillationTask(make_pair(), soft_weight=1.0)
    before.model.teacher.load_state_dict(teacher.state_dict())
    batch = next(iter(counting_loader()))
    assert task.eval().forward_step(batch)[0] < 0.5 * before.eval().forward_step(batch)[0]
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert saved and not [name for name in saved if ".teacher." in name]
    again = DistillationTask(make_pair, **how)
    make_trainer(31, callbacks=[TrainableOnly()]).fit(again, datamodule=CountingData(), ckpt_path=tmp_path / "run.ckpt")


def test_families_mix_and_what_cannot_teach_is_refused():
    pair = DistillModel(make_bert(), GPT2Model(make_model(num_layers=1).config))
    task = DistillationTask(pair, mask_token_id=MASK, mask_prob=0.5)
    task.forward_step(next(iter(counting_loader())))[0].backward()
    with pytest.raises(ConfigError, match="the model is a GPT2Model. Build a DistillModel"):
        DistillationTask(make_model()).configure_model()
    with pytest.raises(ConfigError, match="vocab_size is 17 of the teacher and 18 of the student"):
        DistillationTask(DistillModel(make_model(), make_model(vocab_size=18))).configure_model()
    with pytest.raises(ConfigError, match="temperature is 0 and soft_weight 0.5. Set temperature above 0"):
        DistillationTask(make_pair(), temperature=0)


def make_rows(folder: Path, num_rows: int = 24) -> SATDataModule:
    lines = [f"{'ab ' * (1 + number % 4)}end" for number in range(num_rows)]
    (folder / "rows.txt").write_text("\n".join(lines))
    options = DataOptions(samples=SampleOptions(), cache_dir=str(folder))
    return SATDataModule(str(folder / "rows.txt"), 16, 6, validation=0.25, options=options)


def test_an_encoder_does_not_look_at_the_padding_of_rows(tmp_path: Path):
    samples = [Tokenize("bytes")({"text": text}) for text in ("short", "a longer text")]
    task = MaskedLanguageModelingTask(make_bert(vocab_size=258), mask_token_id=257, mask_prob=1.0).eval()
    batch = PadCollate(token_mask=True)(samples)
    assert batch["token_mask"].sum(1).tolist() == [5, 13]

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = task._masking.hide(batch, 258, is_fixed=True)
        visible = {"attention_mask": hidden["token_mask"][:, None, None]} if "token_mask" in hidden else {}
        logits = task.model(hidden["input_ids"], **visible)[0]
        expected = F.cross_entropy(logits.flatten(0, 1), hidden["target_ids"].flatten())
        torch.testing.assert_close(task.forward_step(batch), expected)
        return logits[0, :5]

    hidden = losses(batch)
    longer = PadCollate(token_mask=True, length=16)(samples)
    longer["input_ids"][~longer["token_mask"]] = 7
    task._masking.mask_prob = 1e-9  # nothing is hidden: what is seen is the same
    batch = PadCollate(token_mask=True)(samples)
    torch.testing.assert_close(losses_free(task, batch)[0, :5], losses_free(task, longer)[0, :5])
    assert not torch.equal(hidden, losses_free(task, batch)[0, :5])
    seen = {}
    task = MaskedLanguageModelingTask(lambda: make_bert(vocab_size=258), mask_token_id=257)
    task.forward_step, inner = (lambda batch: (seen.update(batch), inner(batch))[1]), task.forward_step  # type: ignore
    make_trainer(1).fit(task, make_rows(tmp_path))
    assert seen["token_mask"].dtype == torch.bool and not seen["token_mask"].all()


def losses_free(task: MaskedLanguageModelingTask, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a batch of which nothing is hidden."""
    from sat_lightning.training.targets import hide_padding

    inputs, _ = task.prepare(batch)
    return task.model(**hide_padding(task.model, inputs))[0]


def test_packed_rows_and_unknown_words_are_refused(tmp_path: Path):
    data = make_rows(tmp_path)
    data.options = DataOptions(samples=SampleOptions(pack=True), cache_dir=str(tmp_path))
    task = MaskedLanguageModelingTask(lambda: make_bert(vocab_size=258), mask_token_id=257)
    with pytest.raises(ConfigError, match="samples.pack lets a token see only what is before it"):
        make_trainer(1).fit(task, data)
    task = MaskedLanguageModelingTask(make_bert(), mask_token_id=MASK, whole_words=True)
    with pytest.raises(ConfigError, match="whole_words needs the tokenizer of a SATDataModule"):
        task.forward_step({"input_ids": torch.zeros(1, 4, dtype=torch.long)})


def test_words_are_told_apart_by_the_tokens(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    text = "The cat's 2nd é-mail,  ok\nyes"
    ids = torch.from_numpy(ByteTokenizer().encode(text))[None]
    numbers = WordEdges(ByteTokenizer(), 300).number(ids)[0].tolist()
    words: dict[int, bytes] = {}
    for number, byte in zip(numbers, text.encode(), strict=True):
        words[number] = words.get(number, b"") + bytes([byte])
    assert [word.decode() for word in words.values()] == (
        ["The", " ", "cat", "'", "s", " ", "2nd", " ", "é", "-", "mail", ",", " ", " ", "ok", "\n", "yes"]
    )
    pieces = {piece: number for number, piece in enumerate(["[UNK]", "play", "##ing", "##s", "cat", "."])}
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    library.add_special_tokens(["[SEP]"])
    edges = WordEdges(TokenizersFile("a file", content=library.to_str().encode()), 10)
    assert edges.number(torch.tensor([[1, 2, 3, 1, 4, 3, 5, 6, 9]])).tolist() == [[0, 0, 0, 1, 2, 2, 3, 4, 5]]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"])
    library.train_from_iterator(["the cat sat. the mat"] * 9, trainer)
    file = TokenizersFile("a file", content=library.to_str().encode())
    ids = torch.from_numpy(file.encode("the cats sat. mate"))[None]
    numbers = WordEdges(file, 300).number(ids)[0].tolist()
    joined: dict[int, list[int]] = {}
    for number, token in zip(numbers, ids[0].tolist(), strict=True):
        joined.setdefault(number, []).append(token)
    assert [file.decode(tokens) for tokens in joined.values()] == ["the", " cats", " sat", ".", " mate"]


def test_whole_words_of_a_data_module_are_hidden_together(tmp_path: Path):
    task = MaskedLanguageModelingTask(
        lambda: make_bert(vocab_size=258), mask_token_id=257, mask_prob=0.5, whole_words=True
    )
    seen: list[Any] = []
    task.prepare, inner = (lambda batch: (seen.append((batch, inner(batch))), seen[-1][1])[1]), task.prepare  # type: ignore
    make_trainer(4).fit(task, make_rows(tmp_path))
    edges, num_hidden = WordEdges(ByteTokenizer(), 258), 0
    for batch, (_, targets) in seen:
        for numbers, target, mask in zip(edges.number(batch["input_ids"]), targets, batch["token_mask"], strict=True):
            for number in numbers[mask].unique():
                own = (target != -100)[mask & (numbers == number)]
                assert own.all() or not own.any()
                num_hidden += int(own.all() and len(own) > 1)
    assert num_hidden > 5


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_layers_of_the_student_are_compared_with_those_of_the_teacher(kind: str, order: str):
    torch.manual_seed(0)
    pair = DistillModel(
        make_bert(num_layers=4, layernorm_order=order), make_bert(num_layers=2, hidden_size=16, layernorm_order=order)
    )
    config = HiddenLossConfig(weight=3.0, kind=kind, layers={0: 1, 3: 0}, weights=[1.0, 3.0])  # type: ignore[arg-type]
    task = DistillationTask(pair, mask_token_id=MASK, hidden=config)
    task.configure_model()
    batch = {"input_ids": torch.randint(0, 16, (2, 9)), "token_mask": torch.arange(9) < torch.tensor([[9], [4]])}
    batch["target_ids"] = torch.where(batch["token_mask"], batch["input_ids"], -100)
    loss, parts = task.eval().forward_step(batch)
    expected_loss = 0.5 * parts["soft_loss"] + 0.5 * parts["hard_loss"] + 3.0 * parts["hidden_loss"]
    torch.testing.assert_close(loss, expected_loss)
    hidden = task._masking  # what was shown is drawn anew: compare on what nothing is hidden of
    hidden.mask_prob = 1e-9
    parts = task.forward_step(batch)[1]
    mask, total = {"attention_mask": batch["token_mask"]}, 0.0
    for share, above, below, projection in ((0.25, 0, 1, 0), (0.75, 3, 0, 1)):
        states = []
        for model, layer in ((pair.teacher, above), (pair.student, below)):
            layers = model(batch["input_ids"], output_hidden_states=True, **mask)[1:]
            state = layers[layer]["hidden_states"]
            if order == "post":
                rest = model.transformer.layers[layer + 1 :]
                state = (rest[0].input_layernorm if len(rest) else model.transformer.final_layernorm)(state)
            states.append(state)
        given, wanted = task.hidden_loss.projections[projection](states[1]), states[0]
        each = ((given - wanted) ** 2).mean(-1) if kind == "mse" else 1 - F.cosine_similarity(given, wanted, -1)
        total = total + share * each[batch["token_mask"]].mean()
    torch.testing.assert_close(parts["hidden_loss"], total)


def test_what_is_compared_by_default_and_what_cannot_be():
    assert HiddenLossConfig().pairs(6, 2) == [(2, 0, 0.5), (5, 1, 0.5)]
    with pytest.raises(ConfigError, match=r"5 layers of the teacher do not divide evenly .* as \{4: 1\}"):
        HiddenLossConfig().pairs(5, 2)
    with pytest.raises(
        ConfigError, match="hidden.layers has 6: 1; the teacher's layers are 0 to 5, the student's 0 to 1"
    ):
        HiddenLossConfig(layers={6: 1}).pairs(6, 2)
    with pytest.raises(ConfigError, match="hidden.weights is .* for 2 pairs of layers"):
        HiddenLossConfig(weights=[1.0]).pairs(6, 2)
    with pytest.raises(ConfigError, match="hidden.weight is 0"):
        HiddenLossConfig(weight=0)
    with pytest.raises(ConfigError, match="hidden.kind is 'l1'"):
        HiddenLossConfig(kind="l1")  # type: ignore[arg-type]
    equal = HiddenLoss(HiddenLossConfig(), make_bert(), make_bert(num_layers=1))
    assert not list(equal.parameters())  # as wide as the teacher: nothing is projected


def test_projections_learn_are_saved_and_go_on_and_the_student_is_exported_alone(tmp_path: Path):
    def make(steps: int = 6) -> tuple[DistillationTask, Any]:
        torch.manual_seed(0)
        pair = lambda: DistillModel(make_bert(), make_bert(num_layers=1, hidden_size=16))  # noqa: E731
        hidden = HiddenLossConfig(kind="mse", layers={1: 0})
        optim = {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"}
        task = DistillationTask(pair, mask_token_id=MASK, hidden=hidden, trainable=["student"], optim=optim)
        callbacks = [TrainableOnly(), ExportModel(part="student")]
        return task, make_trainer(steps, callbacks=callbacks, default_root_dir=tmp_path)

    task, trainer = make()
    trainer.fit(task, CountingData())
    assert {"hidden_loss", "soft_loss"} <= {name.removeprefix("train_") for name in trainer.callback_metrics}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    names = [name for name in saved["state_dict"] if "hidden_loss" in name]
    assert names == ["hidden_loss.projections.0.weight", "hidden_loss.projections.0.bias"]
    assert not [name for name in saved["state_dict"] if ".teacher." in name]
    fresh, _ = make()
    fresh.configure_model()
    assert not torch.equal(fresh.hidden_loss.projections[0].weight, saved["state_dict"][names[0]])
    again, trainer = make(8)
    trainer.fit(again, CountingData(), ckpt_path=tmp_path / "run.ckpt")
    student = AutoModel.from_pretrained(tmp_path / "model")
    assert type(student) is BertModel and student.config.num_layers == 1
    for name, value in again.model.student.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
    with pytest.raises(ConfigError, match="a DistillModel has no part 'studnet', only teacher, student. Did you mean"):
        make_trainer(1, callbacks=[ExportModel(part="studnet")]).fit(make()[0], CountingData())


def test_patterns_do_not_wake_the_teacher_and_pairs_of_models_do_not_teach():
    task = DistillationTask(make_pair(), trainable=["transformer"])
    task.configure_model()
    assert not any(parameter.requires_grad for parameter in task.model.teacher.parameters())
    from sat_lightning.models import T5Model
    from sat_lightning.models.t5 import T5Config

    pair = DistillModel(make_model(), T5Model(T5Config(**SIZES)))
    with pytest.raises(ConfigError, match="the student is a T5Model, which is made of several models"):
        DistillationTask(pair).configure_model()
