"""Model folders: what is saved comes back, what does not fit is refused, nothing is half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lightning import AutoModel, BaseMixin, TransformerConfig
from sat_lightning.checkpoint import files, load_checkpoint, save_pretrained
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.models import GPT2Model

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_sequence_length=16)
IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    model = GPT2Model(TINY.replace(is_rotary_emb=True)).eval()
    save_pretrained(model, tmp_path / "gpt")
    return model, tmp_path / "gpt"


def test_the_folder_gives_the_model_back(saved):
    model, folder = saved
    again = AutoModel.from_pretrained(folder)
    assert type(again) is GPT2Model
    assert not again.training
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    written = json.loads((folder / "model_config.json").read_text())
    assert written == again.config.to_dict(model_class="GPT2Model") | {
        "format_version": 1,
        "added_mixins": [],
        "removed_mixins": [],
    }
    assert AutoModel.from_pretrained(folder, attention_dropout=0.5).config.attention_dropout == 0.5
    assert AutoModel.from_pretrained(folder, overrides={"attention_dropout": 0.5}).config.attention_dropout == 0.5
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "model_config.json"]


def test_shared_tensors_are_written_for_each_name(tmp_path):
    model = GPT2Model(TINY)
    model.get_mixin("gpt2-final").lm_head.weight = model.transformer.word_embeddings.weight
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert torch.equal(tensors["mixins.gpt2-final.lm_head.weight"], model.transformer.word_embeddings.weight)


def test_names_that_only_one_side_has_are_an_error_and_change_nothing(saved):
    model, folder = saved

    class Scale(BaseMixin):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

    model.add_mixin("scale", Scale())
    with torch.no_grad():
        model.transformer.word_embeddings.weight.zero_()
    with pytest.raises(CheckpointError, match="does not fit GPT2Model: missing mixins.scale.scale, unexpected nothing"):
        load_checkpoint(model, folder)
    assert model.transformer.word_embeddings.weight.abs().sum() == 0
    report = load_checkpoint(model, folder / "model.safetensors", strict=False)
    assert report.missing == ("mixins.scale.scale",)
    assert model.transformer.word_embeddings.weight.abs().sum() > 0
    save_pretrained(model, folder)
    plain = GPT2Model(model.config)
    with pytest.raises(CheckpointError, match="unexpected mixins.scale.scale. Add the mixins it was saved with"):
        load_checkpoint(plain, folder)


def test_a_missing_tensor_and_a_wrong_shape_are_named(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing transformer.layers.1.mlp.dense_h_to_4h.bias"):
        AutoModel.from_pretrained(folder)
    save_pretrained(model, folder)
    with pytest.raises(CheckpointError, match=r"lm_head.weight' is \[50, 32\], the model has \[60, 32\]"):
        AutoModel.from_pretrained(folder, vocab_size=60)


def test_wrong_paths_and_files_say_what_is_there(saved):
    _, folder = saved
    with pytest.raises(
        CheckpointError, match=r"gtp: there is no such file or folder. .* holds gpt. Did you mean 'gpt'?"
    ):
        AutoModel.from_pretrained(folder.with_name("gtp"))
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="is no whole safetensors file"):
        AutoModel.from_pretrained(folder)
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(config | {"model_class": "GTP2Model"}))
    with pytest.raises(ConfigError, match="No model class is named 'GTP2Model'.* Did you mean 'GPT2Model'?"):
        AutoModel.from_pretrained(folder)
    del config["model_class"]
    (folder / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no model_class"):
        AutoModel.from_pretrained(folder)
    (folder / "model_config.json").write_text(json.dumps({"model_class": "GPT2Model", "num_layers": "two"}))
    with pytest.raises(CheckpointError, match="a value is of a wrong type"):
        AutoModel.from_pretrained(folder)
    (folder / "model_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, it must be an object"):
        AutoModel.from_pretrained(folder)
    (folder / "model_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        AutoModel.from_pretrained(folder)


def test_a_failed_save_leaves_the_earlier_files(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
