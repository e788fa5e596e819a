from __future__ import annotations

import pytest

from sat_lightning.errors import ConfigError
from sat_lightning.training.freezing import freeze_parameters
from tests.families import FAMILIES
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


def test_what_two_parts_share_is_meant_by_either_name() -> None:
    model = FAMILIES["t5"].build()
    freeze_parameters(model, trainable=[r"^decoder\.transformer\.word_embeddings"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["encoder.transformer.word_embeddings.weight"]
    freeze_parameters(model, trainable=["word_embeddings", "final_layernorm"], frozen=[r"^decoder\..*embeddings"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{part}.transformer.final_layernorm.weight" for part in ("encoder", "decoder")]
