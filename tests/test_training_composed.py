"""Models made of models train like any other: mixins by part, frozen parts, one optimizer step, a checkpoint."""

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sat_lightning import AutoModel
from sat_lightning.mixins import LMHeadMixin
from sat_lightning.training import ExportModel, SATLightningModule
from sat_lightning.training.flops import count_flops
from tests.families import FAMILIES, ids
from tests.training_examples import make_trainer, parameters_of


class CopyTask(SATLightningModule):
    """Write what was read."""

    def forward_step(self, batch):
        logits = self.model(batch["ids"], dec_input_ids=batch["ids"])[1]
        return F.cross_entropy(logits.flatten(0, 1), batch["ids"].flatten())


def test_an_encoder_decoder_trains_with_mixins_by_part():
    model = FAMILIES["t5"].build()
    model.decoder.del_mixin("t5-final")
    task = CopyTask(lambda: model, mixins={"decoder.head": LMHeadMixin}, frozen=[r"^encoder\.mixins"])
    before = parameters_of(model)
    rows = [{"ids": row} for row in ids(16, 7)]
    trainer: L.Trainer = make_trainer(max_steps=3)
    trainer.fit(task, DataLoader(rows, batch_size=4))
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "decoder.mixins.head.lm_head.weight" in dict(model.named_parameters())
    after = dict(task.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    frozen = {name for name in before if name.startswith("encoder.mixins")}
    assert frozen and not frozen & changed
    assert changed == before.keys() - frozen


def test_operations_of_the_parts_add_up():
    model = FAMILIES["encoder-decoder"].build()
    parts = [count_flops(part, 2, 9, is_training=True) for part in model.parts.values()]
    assert count_flops(model, 2, 9, is_training=True) == sum(parts) > 0


def test_what_a_run_exports_is_a_model_folder(tmp_path):
    task = CopyTask(FAMILIES["t5"].build)
    trainer: L.Trainer = make_trainer(max_steps=2, callbacks=[ExportModel()], default_root_dir=tmp_path)
    trainer.fit(task, DataLoader([{"ids": row} for row in ids(8, 7)], batch_size=4))
    read = AutoModel.from_pretrained(tmp_path / "model")
    assert type(read) is type(task.model)
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
