"""Methods of fine-tuning by configuration: what a YAML says is what trains."""

import sys

import pytest
import torch

from sat_lightning.cli import main
from tests.test_cli import RECIPE

METHODS = """
    mixins:
      gpt2-final: sat_lightning.mixins.NoMixin  # the family's head gives way to
      head: {class_path: sat_lightning.mixins.MLPHeadMixin, init_args: {sizes: [8, 257], activation: tanh}}
      prefix: {class_path: sat_lightning.mixins.PrefixTuningMixin, init_args: {prefix_len: 2}}
      adapter: {class_path: sat_lightning.mixins.AdapterMixin, init_args: {adapter_hidden: 3, places: [mlp]}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("\ndata:", METHODS + "data:"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_recipe_adds_removes_and_freezes(folder):
    main(["fit", "--config", "tiny.yaml", "--model.mixins.adapter.init_args.adapter_hidden", "5"])
    run = folder / "runs" / "tiny" / "version_0"
    weights = torch.load(run / "checkpoints" / "epoch=0-step=2.ckpt", weights_only=True)["state_dict"]
    mixins = {name.split(".")[2] for name in weights if ".mixins." in name}
    assert mixins == {"head", "prefix", "adapter"}
    assert weights["model.mixins.adapter.ff3.0.weight"].shape[0] == 5
    summary = (run / "summary.txt").read_text()
    frozen = [line for line in summary.splitlines() if line.startswith("transformer.")]
    assert frozen and all(line.split()[1] == "0" for line in frozen), summary
    main(
        [
            "validate",
            "--config",
            str(run / "config.yaml"),
            "--ckpt_path",
            str(run / "checkpoints" / "epoch=0-step=2.ckpt"),
        ]
    )


def test_a_run_is_read_by_its_folder_and_a_recipes_bar_may_be_left_out(folder, capsys):
    no_bar = ["--trainer.callbacks+=TrainingProgressBar", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", "tiny.yaml", *no_bar])
    run = folder / "runs" / "tiny" / "version_0"
    assert "TrainingProgressBar" not in (run / "config.yaml").read_text()
    capsys.readouterr()
    main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run)])
    assert "val_loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run)])
    assert "--ckpt_path names one checkpoint, and " in (said := capsys.readouterr().err) and "--resume" in said
