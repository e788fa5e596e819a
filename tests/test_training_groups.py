from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from sat_lightning.cli import main
from sat_lightning.errors import ConfigError
from sat_lightning.training import OptimConfig, ParameterRule
from sat_lightning.training.groups import freeze_by_rules, group_parameters
from tests.training_examples import (
    ScaleMixin,
    changed_names,
    counting_loader,
    make_model,
    make_task,
    make_trainer,
    parameters_of,
)

TABLE = json.loads((Path(__file__).parent / "data" / "tables" / "weight_decay_groups.json").read_text())["models"]


def stand_in(groups: list[dict]) -> nn.Module:
    """Modules of the kinds and names of a table, for families and for what their users set by hand."""
    root = nn.Module()
    for name in (name for group in groups for name in group["params"]):
        *path, last = name.split(".")
        parent = root
        for word in path[:-1]:
            if word not in dict(parent.named_children()):
                parent.add_module(word, nn.Module())
            parent = getattr(parent, word)
        if path[-1] not in dict(parent.named_children()):
            is_norm = "norm" in path[-1] or "_ln." in f"{name}."
            parent.add_module(path[-1], nn.LayerNorm(2) if is_norm else nn.Linear(2, 2))
        if last not in dict(getattr(parent, path[-1]).named_parameters()):
            getattr(parent, path[-1]).register_parameter(last, nn.Parameter(torch.zeros(1, 1, 2)))
    listed = {name for group in groups for name in group["params"]}
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in listed)
    return root


def named_groups(model: nn.Module, **settings) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: {names[id(parameter)] for parameter in group["params"]}
        for group in group_parameters(model, **settings)
    }


@pytest.mark.parametrize("family", [name for name in TABLE if name != "BertModel_frozen_lr_scale"])
def test_families_decay_what_sat_decays(family: str) -> None:
    decayed, undecayed = (set(group["params"]) for group in TABLE[family])
    model = make_model() if family == "GPT2Model" else stand_in(TABLE[family])
    assert named_groups(model) == {"decay": decayed, "no_decay": undecayed}


def test_attributes_that_sat_reads_from_parameters() -> None:
    table = TABLE["BertModel_frozen_lr_scale"]
    model = stand_in(table)
    scales = {name: group["lr"] for group in table for name in group["params"]}
    for name, parameter in model.named_parameters():
        parameter.lr_scale = scales.get(name, 1.0)
        parameter.no_weight_decay = name == "mixins.bert-type.type_embeddings.weight"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [
        {
            "lr": group["lr_scale"],
            "weight_decay": group.get("weight_decay"),
            "params": {names[id(p)] for p in group["params"]},
        }
        for group in group_parameters(model)
    ]
    theirs = [{**group, "params": set(group["params"])} for group in table]
    assert sorted(ours, key=str) == sorted(theirs, key=str)
    assert {group["name"] for group in group_parameters(model)} == {"scale_10/decay", "no_decay", "scale_10/no_decay"}


def model_with_scale(**changes) -> nn.Module:
    model = make_model(**changes)
    model.add_mixin("scale", ScaleMixin(model.config))
    return model


def test_rules_by_name_and_by_type_and_the_first_that_fits_counts() -> None:
    rules = [
        ParameterRule(match=r"^mixins\.scale", lr_scale=10.0),
        ParameterRule(module_type="BaseMixin", name="added", lr_scale=5.0, weight_decay=0.01),
        ParameterRule(module_type="Embedding", match="position", weight_decay=0.0),
    ]
    model = model_with_scale(num_layers=1)
    groups = {group["name"]: group for group in group_parameters(model, rules)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_name = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert by_name["mixins.scale/no_decay"] == {"mixins.scale.scale"}
    assert by_name["added/decay"] == {"mixins.gpt2-final.lm_head.weight"}
    assert by_name["position/no_decay"] == {"transformer.position_embeddings.weight"}
    assert "transformer.word_embeddings.weight" in by_name["decay"] and set(by_name) == {
        "decay",
        "no_decay",
        "mixins.scale/no_decay",
        "added/decay",
        "position/no_decay",
    }
    assert [groups[name]["lr_scale"] for name in ("mixins.scale/no_decay", "added/decay", "decay")] == [10, 5, 1]
    assert groups["added/decay"]["weight_decay"] == 0.01 and "weight_decay" not in groups["decay"]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_a_weight_decay_of_a_rule_is_that_of_norms_and_biases_too() -> None:
    groups = group_parameters(
        nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), [ParameterRule(match="", weight_decay=0.3)]
    )
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(4, 0.3)]


def test_shape_of_an_empty_shell_is_the_one_beside_it() -> None:
    shells = nn.ParameterDict({name: nn.Parameter(torch.empty(0)) for name in ("matrix", "vector")})
    shells["matrix"].ds_shape, shells["vector"].ds_shape = torch.Size([4, 4]), torch.Size([4])
    assert named_groups(shells) == {"decay": {"matrix"}, "no_decay": {"vector"}}


def test_layer_decay_follows_beit() -> None:
    model = model_with_scale(num_layers=3)
    scales = {
        name: group["lr_scale"]
        for group in group_parameters(model, layer_decay=0.5)
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert {scales[name] for name in scales if "_embeddings" in name} == {0.5**4}
    for layer, expected in enumerate([0.125, 0.25, 0.5]):
        assert {scales[name] for name in scales if name.startswith(f"transformer.layers.{layer}.")} == {expected}
    assert {scales[name] for name in scales if name.startswith(("mixins.", "transformer.final"))} == {1.0}
    names = [group["name"] for group in group_parameters(model, layer_decay=0.5)]
    layers = [f"layer_0{layer}/{kind}" for layer in range(3) for kind in ("decay", "no_decay")]
    assert sorted(names) == ["embeddings/decay", *layers, "top/decay", "top/no_decay"]


def test_layer_decay_counts_two_stacks_each_by_itself_and_a_tied_head_as_embedding() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2, bias=False)
            self.embed = nn.Embedding(2, 2)
            self.head.weight = self.embed.weight
            self.encoder = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))})
            self.decoder = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))})

    scales = {group["name"]: group["lr_scale"] for group in group_parameters(Pair(), layer_decay=0.5)}
    assert scales == {
        "embeddings/decay": 0.5**4,
        "encoder.layer_00/decay": 0.25,
        "encoder.layer_01/decay": 0.5,
        "decoder.layer_00/decay": 0.125,
        "decoder.layer_01/decay": 0.25,
        "decoder.layer_02/decay": 0.5,
    }


def test_rule_finds_a_tied_parameter_under_each_of_its_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 3), "head": nn.Linear(3, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    for pattern in ("embed", "head"):
        assert named_groups(model, rules=[ParameterRule(match=pattern)]) == {f"{pattern}/decay": {"embed.weight"}}


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (
            [dict(match="transformer.layer.0")],
            r"'transformer.layer.0' matches no parameter. Did you mean 'transf",
        ),
        ([dict(match=r"^mixin\.")], r"matches no parameter. Did you mean 'mixins'\?"),
        ([dict(module_type="LayerNrm")], r"rule 'LayerNrm' matches no parameter. Did you mean 'LayerNorm'\?"),
        (
            [dict(match="mlp"), dict(match="mlp.dense")],
            "rule 'mlp.dense' comes too late: earlier rules .* up.",
        ),
        (
            [dict(match=r"layers\.0", name="a"), dict(match=r"layers\.1", name="a")],
            "two groups are called 'a/decay'",
        ),
    ],
)
def test_rules_without_effect_are_refused(rules: list[dict], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        group_parameters(make_model(), [ParameterRule(**rule) for rule in rules])


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (dict(), "a rule needs match, a pattern of names, or module_type, a class name."),
        (dict(match="(x"), r"'\(x' is no regular expression: missing \)"),
        (dict(match="x", lr_scale=0), "lr_scale is 0, it must be above 0; frozen: true trains nothing."),
        (dict(match="x", weight_decay=-1), "weight_decay is -1, it cannot be negative."),
        (
            dict(match="x", frozen=True, lr_scale=2.0),
            "rule 'x' is frozen, so lr_scale and weight_decay have no eff",
        ),
    ],
)
def test_rules_are_checked(rule: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ParameterRule(**rule)


def test_layer_decay_without_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay is 0.5, and no parameter is in a layer .* Set it to 1."):
        group_parameters(nn.Linear(2, 2), layer_decay=0.5)


def test_frozen_rules_freeze_and_an_earlier_rule_keeps_its_own() -> None:
    model = model_with_scale(num_layers=2)
    rules = [ParameterRule(match=r"layers\.1"), ParameterRule(match=r"^transformer\.", frozen=True)]
    freeze_by_rules(model, rules)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name in parameters_of(model) if "layers.1" in name or name.startswith("mixins.")}
    with pytest.raises(ConfigError, match="rule 'layers.0' fits only parameters that do not train. Drop it or loosen"):
        group_parameters(model, [ParameterRule(match="layers.0")])
    with pytest.raises(ConfigError, match="the frozen rules leave nothing to train."):
        freeze_by_rules(model, [ParameterRule(match="", frozen=True)])


def test_task_trains_with_rules_and_logs_readable_names(tmp_path) -> None:
    rules = (
        ParameterRule(match=r"^mixins\.scale", lr_scale=10.0),
        ParameterRule(match="word_embeddings", frozen=True),
    )
    optim = OptimConfig(learning_rate=0.01, schedule="linear", warmup_steps=2, layer_decay=0.5, groups=rules)
    task = make_task(mixins={"scale": ScaleMixin}, optim=optim)
    task.configure_model()
    before = parameters_of(task.model)
    logger = CSVLogger(tmp_path, name=None, version="")
    trainer = make_trainer(3, logger=logger, callbacks=LearningRateMonitor(), log_every_n_steps=1)
    trainer.fit(task, counting_loader())
    logger.save()
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    first = {
        name.removeprefix("lr-AdamW/"): float(rows[0][column])
        for column, name in enumerate(header)
        if name.startswith("lr-")
    }
    expected = {"embeddings/decay": 0.125, "layer_00/decay": 0.25, "layer_01/decay": 0.5, "top/decay": 1.0}
    expected |= {"layer_00/no_decay": 0.25, "layer_01/no_decay": 0.5, "top/no_decay": 1.0}
    assert first == pytest.approx(
        {name: 0.005 * scale for name, scale in expected.items()} | {"mixins.scale/top/no_decay": 0.05}
    )
    assert "transformer.word_embeddings.weight" not in changed_names(before, task.model)
    assert len(changed_names(before, task.model)) == len(before) - 1


def test_own_optimizer_takes_scales_too_and_a_checkpoint_keeps_the_rules(tmp_path) -> None:
    optim = OptimConfig(schedule="constant", groups=(ParameterRule(match="position", lr_scale=0.5),))
    task = make_task(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.4), optim=optim)
    trainer = make_trainer(1)
    trainer.fit(task, counting_loader())
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"position/decay": 0.2, "decay": 0.4, "no_decay": 0.4}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["optim"]
    assert OptimConfig.from_dict(stored) == optim == OptimConfig.from_dict(asdict(optim))


def test_rules_and_optimizer_come_from_yaml(tmp_path, monkeypatch) -> None:
    (tmp_path / "run.yaml").write_text(
        """
model:
  class_path: LanguageModelingTask
  init_args:
    model:
      class_path: GPT2Model
      init_args:
        config: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, vocab_size: 17, max_sequence_length: 16}
    optimizer: {class_path: torch.optim.RMSprop, init_args: {lr: 0.01}}
    optim:
      schedule: wsd
      layer_decay: 0.5
      groups:
        - {match: '^mixins\\.', lr_scale: 2.0, name: added}
        - {module_type: LayerNorm, frozen: true}
data: {class_path: tests.training_examples.CountingData}
trainer:
  max_steps: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_checkpointing: false
  enable_model_summary: false
  log_every_n_steps: 1
  limit_val_batches: 0
  callbacks: [{class_path: LearningRateMonitor}]
"""
    )
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "run.yaml"])
    (metrics,) = tmp_path.glob("runs/run/version_0/metrics.csv")
    columns = {name for name in metrics.read_text().splitlines()[0].split(",") if name.startswith("lr-")}
    layers = {f"lr-RMSprop/layer_0{layer}/{kind}" for layer in (0, 1) for kind in ("decay", "no_decay")}
    assert columns == layers | {"lr-RMSprop/embeddings/decay", "lr-RMSprop/added/top/decay"}
