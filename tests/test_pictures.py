"""Pictures of what a task finds, and the mixin that gives the weights of attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from sat_lightning import BaseMixin, non_conflict
from sat_lightning.errors import ConfigError
from sat_lightning.mixins import AttentionMapsMixin, MLPHeadMixin, PrefixTuningMixin
from sat_lightning.models import BertModel, GPT2Model, LLaMAModel, ViTModel
from sat_lightning.training import (
    AttentionPlotter,
    ConfusionPlotter,
    ImageClassificationTask,
    ImageGrid,
    SequenceClassificationTask,
)
from tests.task_examples import TASKS
from tests.training_examples import make_trainer

SIZES = dict(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=24)


class Watch(BaseMixin):
    """Remembers what attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    @non_conflict
    def attention_fn(self, query, key, value, mask, dropout_fn, old_impl=None, **kw):
        self.seen.append((query, key, mask))
        return old_impl(query, key, value, mask, dropout_fn, **kw)


@pytest.mark.parametrize("family", [GPT2Model, BertModel, LLaMAModel])
@pytest.mark.parametrize("is_padded", [False, True])
def test_maps_are_the_weights_and_change_nothing(family: Any, is_padded: bool) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, **({"num_multi_query_heads": 2, "is_gated_mlp": True} if family is LLaMAModel else {})}
    model = family(family.config_class(**sizes)).eval()
    ids = torch.randint(0, 50, (3, 19))  # two and a half times the head's size: whole columns and a rest
    mask = torch.ones(3, 1, 1, 19, dtype=torch.bool)
    mask[1, ..., 12:] = False
    given = {"attention_mask": mask} if is_padded else {}
    plain = model(ids, **given)[0]
    watch = Watch()
    model.add_mixin("watch", watch)
    model.add_mixin("maps", AttentionMapsMixin())
    logits, *layers = model(ids, **given)
    assert torch.equal(logits, plain)
    for layer in layers:
        assert layer["attention_map"].shape == (3, 4, 19, 19)
        assert_close(layer["attention_map"].sum(-1), torch.ones(3, 4, 19))
    query, key, mask = watch.seen[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(mask.expand_as(scores) == 0, -torch.inf).softmax(-1)
    assert_close(layers[0]["attention_map"], weights, atol=1e-5, rtol=1e-5)
    model.del_mixin("maps")
    assert "attention_map" not in model(ids, **given)[1]


def test_a_prefix_keeps_its_share_of_the_weights() -> None:
    torch.manual_seed(0)
    model = BertModel(BertModel.config_class(**SIZES)).eval()
    model.add_mixin("prefix", PrefixTuningMixin(model.config, prefix_len=5))
    model.add_mixin("maps", AttentionMapsMixin())
    total = model(torch.randint(0, 50, (2, 11)))[1]["attention_map"].sum(-1)
    assert (total > 0.5).all() and (total < 0.9).all()  # 11 of 16 keys, nearly alike at random weights


def text_rows(num_rows: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 50, (num_rows, 9), generator=generator)
    mask = torch.arange(9) < 7
    return [{"input_ids": row, "token_mask": mask, "target_ids": row[0] % 2} for row in rows]


def make_text_task() -> SequenceClassificationTask:
    model = BertModel(BertModel.config_class(**SIZES))
    model.del_mixin("bert-final")
    model.add_mixin("head", MLPHeadMixin(model.config, 2, pooling="mean"))
    return SequenceClassificationTask(model)


def read_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image.convert("L"))
    assert pixels.std() > 5  # something is drawn
    return pixels.shape


def test_a_text_task_draws_its_confusion_and_its_attention(tmp_path: Path) -> None:
    task, callbacks = make_text_task(), [ConfusionPlotter(), AttentionPlotter(num_layers=1, num_heads=3)]
    trainer = make_trainer(3, default_root_dir=tmp_path, callbacks=callbacks)
    loader = DataLoader(text_rows(), batch_size=4)
    trainer.fit(task, loader, loader)
    assert {"confusion.png", "attention.png"} <= {path.name for path in tmp_path.iterdir()}
    read_size(tmp_path / "confusion.png")
    height, width = read_size(tmp_path / "attention.png")
    assert width > 2 * height  # a row of three panels
    ((layer_id, heads),) = callbacks[1]._shown
    assert layer_id == 0 and heads.shape == (3, 7, 7)  # without the padding
    assert set(task.model.mixins) == {"bert-type", "head"}  # the mixin is gone again
    assert int(task.confusion["val"].sum()) == 12  # looking once more counts nothing


def test_an_image_task_draws_what_it_took_for_what(tmp_path: Path) -> None:
    sizes = dict(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=1, image_size=[8, 8], patch_size=4)
    task = ImageClassificationTask(ViTModel(ViTModel.config_class(**sizes, in_channels=1, num_classes=3)))
    rows = [{"image": torch.rand(1, 8, 8), "target_ids": torch.tensor(number % 3)} for number in range(10)]
    grid = ImageGrid(num_images=6, file_name="test.png")
    trainer = make_trainer(default_root_dir=tmp_path, callbacks=[grid, ConfusionPlotter()])
    trainer.test(task, DataLoader(rows, batch_size=7), verbose=False)
    assert len(grid._shown[0]) == 6
    read_size(tmp_path / "test.png")
    assert int(task.confusion["test"].sum()) == 10
    with pytest.raises(ConfigError, match="num_images is 0. Set it to at least 1"):
        ImageGrid(num_images=0)


def test_without_matplotlib_there_is_a_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    trainer = make_trainer(3, default_root_dir=tmp_path, callbacks=[ConfusionPlotter(), AttentionPlotter()])
    with pytest.warns(
        UserWarning, match=r'ConfusionPlotter draws confusion.png .* pip install "sat_lightning\[plot\]"'
    ):
        trainer.fit(make_text_task(), DataLoader(text_rows(), batch_size=4), DataLoader(text_rows(), batch_size=4))
    assert not list(tmp_path.glob("*.png"))


def test_a_model_of_two_backbones_is_refused_before_the_first_step(tmp_path: Path) -> None:
    example = TASKS["pairs"]
    trainer = make_trainer(1, default_root_dir=tmp_path, callbacks=[AttentionPlotter()])
    with pytest.raises(ConfigError, match=r"AttentionPlotter draws a BaseModel, and the model is a T5Model\. Remove"):
        trainer.fit(example.make(), example.train_loader())
    assert trainer.global_step == 0


def test_many_classes_make_no_giant_picture(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for num_classes, is_named in ((5, True), (400, False)):
        task = make_text_task()
        task.confusion = {"val": torch.eye(num_classes, dtype=torch.int64)}
        figure = Figure(layout="constrained")
        assert ConfusionPlotter().draw(figure, task, "val")
        width, height = figure.get_size_inches()
        assert width < 26 and height < 26
        assert bool(figure.axes[0].get_xticklabels()[1].get_text() == "1") == is_named
        figure.savefig(tmp_path / "picture.png", dpi=20)


def test_a_model_that_attends_otherwise_has_no_maps(tmp_path: Path) -> None:
    class Mean(BaseMixin):
        def attention_forward(self, hidden_states, mask, **kw):
            return hidden_states.mean(1, keepdim=True).expand_as(hidden_states)

    task, plotter = make_text_task(), AttentionPlotter()
    task.model.add_mixin("mean", Mean())
    loader = DataLoader(text_rows(), batch_size=4)
    make_trainer(default_root_dir=tmp_path, callbacks=[plotter]).validate(task, loader, verbose=False)
    assert plotter._shown is None and not list(tmp_path.glob("*.png"))
