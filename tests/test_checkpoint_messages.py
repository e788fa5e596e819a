"""What a user is told who gives the wrong path, class, file or option."""

import json
import os
import re
import shutil

import pytest

from sat_lightning import AutoModel, TransformerConfig
from sat_lightning.checkpoint import load_checkpoint, save_huggingface
from sat_lightning.cli import main
from sat_lightning.errors import CheckpointError, ConfigError
from sat_lightning.models import BertModel, GPT2Model
from tests.golden_cases import GOLDEN

SPLIT = GOLDEN / "mp2_gpt2" / "checkpoint"
SIZES = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=10, max_sequence_length=4)


@pytest.fixture
def theirs(tmp_path):
    save_huggingface(GPT2Model(SIZES), tmp_path / "hf")
    return tmp_path / "hf"


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"args": object()}, r"takes no args: .* returns the model alone \(its configuration is model.config\)"),
        ({"num_layer": 2}, "neither an argument of from_pretrained nor a field .* Did you mean 'num_layers'"),
        ({"stricts": False}, "Did you mean 'strict'"),
        ({"of_line": True}, "Did you mean 'offline'"),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(options, words):
    with pytest.raises(ConfigError, match=words):
        AutoModel.from_pretrained(SPLIT, **options)


@pytest.mark.parametrize("name", ["model_config.json", "latest"])
def test_a_part_of_a_sat_folder_points_to_the_folder(name):
    with pytest.raises(CheckpointError, match=re.escape(f"is a part of a model folder. Pass the folder: {SPLIT}.")):
        AutoModel.from_pretrained(SPLIT / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_part_of_a_hugging_face_folder_points_to_the_folder(theirs, name):
    for load in (AutoModel.from_pretrained, lambda file: load_checkpoint(GPT2Model(SIZES), file)):
        with pytest.raises(CheckpointError, match=re.escape(f"Pass the folder: {theirs}.")):
            load(theirs / name)
    assert AutoModel.from_pretrained(theirs).config.num_layers == 1


def test_another_class_is_told_whose_weights_these_are(theirs):
    with pytest.raises(CheckpointError, match=r"\(a GPT2Model\) does not fit BertModel: missing mixins.bert-final"):
        BertModel.from_pretrained(SPLIT)
    with pytest.raises(
        CheckpointError, match=r"'gpt2', GPT2LMHeadModel; the types .* here are bert. .*AutoModel finds"
    ):
        BertModel.from_pretrained(theirs)
    change_json(theirs / "config.json", architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(CheckpointError, match="of this type the known classes are GPT2LMHeadModel"):
        AutoModel.from_pretrained(theirs)


def test_a_missing_partition_is_found_by_its_number(tmp_path):
    shutil.copytree(SPLIT, tmp_path / "run")
    os.remove(tmp_path / "run" / "1" / "mp_rank_01_model_states.pt")
    for path in (tmp_path / "run", tmp_path / "run" / "1", tmp_path / "run" / "1" / "mp_rank_00_model_states.pt"):
        with pytest.raises(CheckpointError, match="says model_parallel_size 2, and .* holds 1 of the partitions"):
            AutoModel.from_pretrained(path)


def test_convert_refuses_a_target_it_cannot_write_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for target, words in (("file", "is a file. Name a new folder"), ("file/new", "was not written: ")):
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(SPLIT), str(tmp_path / target), "--to", "native"])
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.count("\n") == 1 and words in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_many_models_names_the_first_few():
    with pytest.raises(CheckpointError, match=r"Folders in it that are: [\w, ]+ and \d+ more\.$"):
        AutoModel.from_pretrained(GOLDEN)
