"""Tasks that hide words: what is hidden, what is learned of it, and what a teacher adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sat_lightning.data import PadCollate
from sat_lightning.errors import ConfigError
from sat_lightning.models import BertModel, DistillModel, GPT2Model
from sat_lightning.models.bert import BertConfig
from sat_lightning.training import DistillationTask, MaskedLanguageModelingTask, TrainableOnly
from sat_lightning.training.distillation import soft_loss
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
