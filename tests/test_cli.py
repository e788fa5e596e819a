from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from sat_lightning import __version__
from sat_lightning.cli import VERBS, main
from sat_lightning.training import LanguageModelingTask
from sat_lightning.training.refusals import explain_refusal

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
model:
  class_path: LanguageModelingTask
  init_args:
    model:
      class_path: GPT2Model
      init_args:
        config: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, vocab_size: 257, max_sequence_length: 16}
    optim: {learning_rate: 0.01}
data:
  class_path: SATDataModule
  init_args: {path: text.txt, sequence_length: 16, batch_size: 4, validation: 0.2}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  val_check_interval: 2
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""
MY_MIXINS = """
import torch
from sat_lightning import BaseMixin, non_conflict


class ScaleMLP(BaseMixin):
    def __init__(self, config, start: float = 1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((config.hidden_size,), start))

    @non_conflict
    def mlp_forward(self, hidden_states, old_impl=None, **kw):
        return old_impl(hidden_states, **kw) * self.scale
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a text, a recipe and a mixin, and nothing on the path."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "my_mixins.py").write_text(MY_MIXINS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_mixins", raising=False)
    return tmp_path


def fit(*words: str) -> None:
    main(["fit", "--config", "tiny.yaml", *words])


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(*words, "--print_config")
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Run a command that fails; return the one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"sat-lightning {__version__}\n"


def test_fit_leaves_everything_in_one_folder_and_can_be_run_again(folder: Path) -> None:
    for version in (0, 1):
        fit()
        run = folder / "runs" / "tiny" / f"version_{version}"
        assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "summary.txt"}
        assert "val_bits_per_byte" in (run / "metrics.csv").read_text().splitlines()[0]
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch=0-step=2.ckpt"]


def test_saved_config_is_a_recipe_and_checkpoint_rebuilds_its_task(folder: Path) -> None:
    fit("--model.mixins.scale", "my_mixins.ScaleMLP", "--model.mixins.scale.start", "2.0")
    run = folder / "runs" / "tiny" / "version_0"
    checkpoint = run / "checkpoints" / "epoch=0-step=2.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    task = LanguageModelingTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.model.hook_origins["mlp_forward"] == "scale -> default"
    assert task.optim.learning_rate == 0.01
    assert all(torch.equal(value, weights[name]) for name, value in task.state_dict().items())
    main(["fit", "--config", str(run / "config.yaml")])
    again = folder / "runs" / "tiny" / "version_1"
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_resume_validate_test_and_predict_read_a_checkpoint(folder: Path) -> None:
    fit()
    checkpoint = str(folder / "runs" / "tiny" / "version_0" / "checkpoints" / "epoch=0-step=2.ckpt")
    fit("--ckpt_path", checkpoint, "--trainer.max_steps", "4", "--model.optim.weight_decay", "0.2")
    rows = (folder / "runs" / "tiny" / "version_1" / "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert {row.split(",")[step] for row in rows[1:]} == {"2", "3"}
    saved = yaml.safe_load((folder / "runs" / "tiny" / "version_1" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["optim"]["weight_decay"] == 0.2 and saved["weights_only"] is True
    for verb in ("validate", "test", "predict"):
        main([verb, "--config", "tiny.yaml", "--data.test", "0.2", "--ckpt_path", checkpoint])


def test_evaluating_random_weights_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match="validate: neither --ckpt_path nor --init_from is given, so the weights are"):
        main(["validate", "--config", "tiny.yaml"])


def test_later_words_and_later_configs_win(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more.yaml").write_text("trainer: {max_steps: 7}\nmodel: {init_args: {optim: {weight_decay: 0.5}}}\n")
    config = printed_config(
        capsys, "--config", "more.yaml", "--data.path", "x.txt", "--model.init_args.optim.learning_rate", "1e-3"
    )
    assert config["trainer"]["max_steps"] == 7
    assert config["data"]["init_args"]["path"] == "x.txt"
    optim = config["model"]["init_args"]["optim"]
    assert (optim["learning_rate"], optim["weight_decay"]) == (1e-3, 0.5)
    assert config["seed_everything"] == 0
    assert config["trainer"]["logger"]["init_args"]["name"] == "tiny"


def test_printed_config_reads_back_as_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.frozen", "[embeddings]"]
    config = printed_config(capsys, *words, "--trainer.callbacks", "CurvePlotter")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert printed_config(capsys) == config


def test_a_class_name_that_two_libraries_have_is_refused_with_both(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = type("Rprop", (torch.optim.Rprop,), {"__module__": __name__})
    with pytest.raises(SystemExit, match="2"):
        fit("--model.optimizer", "Rprop", "--print_config")
    error = capsys.readouterr().err
    assert "model.optimizer: Multiple subclasses with name Rprop. Give the full class path" in error
    assert "torch.optim.Rprop" in error and f"{twin.__module__}.Rprop" in error


def test_waiting_threads_give_way_unless_the_user_says_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    fit("--trainer.fast_dev_run", "true")
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    fit("--trainer.fast_dev_run", "true")
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_other_classes_than_ours(folder: Path) -> None:
    (folder / "mine.py").write_text(
        textwrap.dedent("""
        import lightning as L, torch

        class Line(L.LightningModule):
            def __init__(self, width: int = 1):
                super().__init__()
                self.layer = torch.nn.Linear(width, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        class Points(L.LightningDataModule):
            def train_dataloader(self):
                return torch.utils.data.DataLoader(torch.ones(8, 1))
        """)
    )
    words = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--model", "mine.Line", "--data", "mine.Points", *words])
    assert (folder / "runs" / "run" / "version_0" / "config.yaml").is_file()


REFUSED = {
    "--trainer.max_step 3": "there is no option 'trainer.max_step'. Did you mean 'trainer.max_steps'?",
    "--trainer.max_steps three": "trainer.max_steps: Expected a <class 'int'>. Got value: three",
    "--model.optim.learning_rte 1": "there is no option 'optim.learning_rte'. Did you mean 'learning_rate'?",
    "--model.optim.schedule cosin": "model.optim.schedule: unknown value 'cosin', known are cosine, linear, "
    "exponential, constant, wsd, inverse_sqrt, sat_linear, sat_cosine. Did you mean 'cosine'?",
    "--model LanguageModelTask": "there is no class 'LanguageModelTask'. Did you mean 'LanguageModelingTask'?",
    "--model.model GPTModel": "model.model: there is no class 'GPTModel'. Did you mean 'GPT2Model'?",
    "--model.model.config.num_layer 2": "there is no option 'config.num_layer'. Did you mean 'config.num_layers'?",
    "--model.mixins.head LMHeadMxin": "model.mixins: there is no class 'LMHeadMxin'. Did you mean 'LMHeadMixin'?",
    "--model.mixins.scale my_mixin.ScaleMLP": "there is no module 'my_mixin' in the current folder, nor installed. "
    "Did you mean 'my_mixins'?",
    "--model.mixins.scale my_mixins.ScaleMPL": "module 'my_mixins' has no 'ScaleMPL'. Did you mean 'ScaleMLP'?",
    "--model.mixins.scale my_mixins.ScaleMLP --model.mixins.scale.strt 2": "no option 'strt'. Did you mean 'start'?",
    "--data.pth x.txt": "data: there is no option 'pth'. Did you mean 'path'?",
    "--trainer.callbacks CurvePloter": "there is no class 'CurvePloter'. Did you mean 'CurvePlotter'?",
    "--trainer.logger CSVLoger": "trainer.logger: there is no class 'CSVLoger'. Did you mean 'CSVLogger'?",
    "--config none.yaml": "config: File does not exist:",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_fit_on_a_line_and_name_what_was_meant(
    words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "fit", "--config", "tiny.yaml", *words.split())
    assert line.startswith("sat-lightning fit: error: ") and REFUSED[words] in line


def test_a_refusal_is_the_same_whatever_was_warned_of_before(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jsonargparse import _deprecated

    words = "--model.model.config.num_layer 2"
    for shown in (set(), set(_deprecated.shown_deprecation_warnings), {"abbreviation"}):
        monkeypatch.setattr(_deprecated, "shown_deprecation_warnings", shown)
        for _ in range(2):
            assert REFUSED[words] in refusal(capsys, "fit", "--config", "tiny.yaml", *words.split())


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("max_steps", "max_stps", "there is no option 'trainer.max_stps'. Did you mean 'trainer.max_steps'?"),
        ("learning_rate", "learning_rte", "there is no option 'optim.learning_rte'. Did you mean 'learning_rate'?"),
        ("num_layers", "num_layer", "there is no option 'config.num_layer'. Did you mean 'num_layers'?"),
        ("trainer:", "trainr:", "there is no option 'trainr"),
        ("SATDataModule", "SATDatModule", "data: there is no class 'SATDatModule'. Did you mean 'SATDataModule'?"),
        ("optim:", "mixins: {a: {class_path: LMHeadMxin}}\n    optim:", "Did you mean 'LMHeadMixin'?"),
    ],
)
def test_misspelt_recipes(old: str, new: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny.yaml").write_text(RECIPE.replace(old, new))
    assert text in refusal(capsys, "fit", "--config", "tiny.yaml")


def test_verbs_and_missing_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there is no verb 'fitt', only {', '.join(VERBS)}. Did you mean 'fit'?" in refusal(capsys, "fitt")
    assert "the following arguments are required: fit.data, fit.model" in refusal(capsys, "fit")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--data.path none.txt", "none.txt"),
        ("--model.model.config.vocab_size 90", "token id 256 is outside the model's vocabulary of 90"),
        ("--model.model.config.hidden_size 15", "hidden_size 15 is not divisible by num_attention_heads 2"),
        ("--model.frozen [embedings]", "frozen: 'embedings' matches no parameter."),
        ("--model.optim.warmup_steps 9", "warmup_steps is 9, longer than the run of 2 steps."),
        ("--model.mixins.head LMHeadMixin", "'head' cannot take the seam, 'gpt2-final' holds it."),
        ("--model.optim.weight_decay=-1", "weight_decay is -1.0, it cannot be negative."),
    ],
)
def test_a_run_that_cannot_start_says_why(
    words: str, text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refusal(capsys, "fit", "--config", "tiny.yaml", *words.split(), code=1)


def test_refusal_that_is_not_known_is_passed_on() -> None:
    assert explain_refusal("something\n  quite new") == "something"


@pytest.mark.parametrize(
    "start", ["import sys; from sat_lightning.cli import main; main()", "-m"], ids=["script", "-m"]
)
def test_both_commands_find_classes_in_the_current_folder(start: str, folder: Path) -> None:
    words = ["-m", "sat_lightning"] if start == "-m" else ["-c", f"import sys; sys.path[0] = {str(ROOT)!r}; {start}"]
    words += [
        "fit",
        "--config",
        "tiny.yaml",
        "--model.mixins.scale",
        "my_mixins.ScaleMLP",
        "--trainer.fast_dev_run",
        "1",
    ]
    environment = {"PYTHONPATH": str(ROOT), "SAT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "mixins.scale" in done.stdout + done.stderr
