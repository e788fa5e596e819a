from __future__ import annotations

import pytest

from sat_lightning.errors import ConfigError
from sat_lightning.training.freezing import describe_trainable, freeze_parameters
from tests.training_examples import (
    ScaleMixin,
    changed_names,
    counting_loader,
    make_model,
    make_task,
    make_trainer,
    parameters_of,
)


def train_one_step(**arguments) -> tuple[set[str], set[str]]:
    """Return the names that trained, and all names."""
    task = make_task(make_model(), mixins={"scale": ScaleMixin}, **arguments)
    before = parameters_of(task.model)
    make_trainer(1).fit(task, counting_loader())
    return changed_names(before, task.model), set(before)


def test_all_trains_by_default() -> None:
    changed, names = train_one_step()
    assert changed == names


def test_only_the_trainable_change() -> None:
    changed, _ = train_one_step(trainable=[r"^mixins\.scale", r"layers\.1\.mlp\..*bias"])
    layer = "transformer.layers.1.mlp."
    assert changed == {"mixins.scale.scale", f"{layer}dense_h_to_4h.bias", f"{layer}dense_4h_to_h.bias"}


def test_the_frozen_do_not_change() -> None:
    changed, names = train_one_step(frozen=["embeddings", r"layers\.0\."])
    assert names - changed == {name for name in names if "embeddings" in name or "layers.0." in name}


def test_frozen_wins_inside_trainable() -> None:
    changed, _ = train_one_step(trainable=["final_layernorm"], frozen=["bias$"])
    assert changed == {"transformer.final_layernorm.weight"}


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (
            dict(trainable=["mixins.gpt2-fnal"]),
            r"trainable: 'mixins.gpt2-fnal' matches no parameter. Did you mean 'mixins.gpt2-final'\? The blocks are "
            r"mixins.gpt2-final, transformer.final_layernorm, transformer.layers, ",
        ),
        (
            dict(frozen=["transformer.layer.0"]),
            r"frozen: 'transformer.layer.0' .* Did you mean 'transformer.layers.0'\?",
        ),
        (dict(frozen=["layers.(0"]), r"frozen: 'layers.\(0' is no regular expression: missing \)"),
        (dict(frozen="layers"), r"frozen is the text 'layers', it must be a list of patterns: \['layers'\]"),
        (dict(frozen=["."]), r"trainable \[\] and frozen \['.'\] leave nothing to train"),
        (dict(trainable=[]), r"trainable \[\] and frozen \[\] leave nothing to train"),
    ],
)
def test_patterns_are_checked(patterns: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        freeze_parameters(make_model(), **patterns)


def test_table_counts_block_by_block() -> None:
    model = make_model()
    freeze_parameters(model, frozen=[r"layers\.0", "word"])
    rows = {line.split()[0]: line.split()[1:] for line in describe_trainable(model).splitlines()}
    num_layer = sum(p.numel() for p in model.transformer.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    num_frozen = num_layer + 17 * 32
    assert rows["parameters"] == ["trainable", "frozen"]
    assert rows["transformer.layers"] == [f"{num_layer:,}", f"{num_layer:,}"]
    assert rows["transformer.word_embeddings"] == ["0", f"{17 * 32:,}"]
    assert rows["total"] == [f"{total - num_frozen:,}", f"{num_frozen:,}"]


def test_table_is_said_when_a_run_starts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        make_trainer(1).fit(make_task(frozen=["embeddings"]), counting_loader())
    assert describe_trainable(make_frozen()) in caplog.text


def make_frozen():
    model = make_model()
    freeze_parameters(model, frozen=["embeddings"])
    return model
