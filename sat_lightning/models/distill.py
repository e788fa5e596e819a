"""A teacher beside a student (Hinton et al. 2015, arXiv:1503.02531).

What differs from a plain model: there are two, and the teacher never learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sat_lightning import models
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.model import AnyModel, ComposedModel, find_model, register_model


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TransformerConfig):
    """Both models; the other fields are the student's."""

    teacher: Mapping[str, Any] | None = None
    """The teacher's `model_config.json`, its `model_class` among it."""
    student: Mapping[str, Any] | None = None
    """The student's."""


@register_model
class DistillModel(ComposedModel):
    """Run both: `teacher_logits, student_logits = model(teacher_kwargs, student_kwargs)`.

    Args:
        teacher: the model to learn from; it is frozen, and stays in evaluation mode. Or a `DistillConfig`, from which
            both are built.
        student: the model that learns.

    Raises:
        ConfigError: if one of the two is missing.
    """

    config_class: ClassVar[type[TransformerConfig]] = DistillConfig
    teacher: AnyModel
    student: AnyModel

    def __init__(self, teacher: AnyModel | DistillConfig, student: AnyModel | None = None) -> None:
        if isinstance(teacher, TransformerConfig):
            config = teacher
            teacher, student = _build(config, "teacher"), _build(config, "student")
        if student is None:
            raise ConfigError("DistillModel needs a student beside its teacher: DistillModel(teacher, student).")
        parts = {"teacher": _describe(teacher), "student": _describe(student)}
        sizes = {name: parts["student"][name] for name in TransformerConfig.__dataclass_fields__ if name != "extra"}
        super().__init__(DistillConfig.from_dict(sizes | parts))
        self.teacher, self.student = teacher.requires_grad_(False).eval(), student

    def train(self, mode: bool = True) -> DistillModel:
        """Set the student's mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, teacher_kwargs: dict[str, Any], student_kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Call the teacher without gradients, and the student.

        Args:
            teacher_kwargs: keywords of the teacher's call.
            student_kwargs: keywords of the student's call. With `output_hidden_states` in both, more is returned.

        Returns:
            The first result of each, their logits; and if asked for, of each a list of what its layers gave,
            `[b, s, c]`, as what follows sees it: in post order behind the norm.
        """
        with torch.no_grad():
            teacher_logits, *teacher_layers = self.teacher(**teacher_kwargs)
            if is_whole := bool(teacher_kwargs.get("output_hidden_states")):
                teacher_layers = _layers_of(self.teacher, teacher_layers)
        student_logits, *student_layers = self.student(**student_kwargs)
        if not is_whole:
            return teacher_logits, student_logits
        return teacher_logits, student_logits, teacher_layers, _layers_of(self.student, student_layers)


def _layers_of(model: AnyModel, outputs_per_layer: list[dict[str, Any]]) -> list[Tensor]:
    """Return what each layer gives: in post order its norm stands in the next one, see `sat_lightning.nn.layer`."""
    hidden_states = [outputs["hidden_states"] for outputs in outputs_per_layer]
    transformer: Any = getattr(model, "transformer", None)
    if transformer is None or model.config.layernorm_order != "post":
        return hidden_states
    norms = [layer.input_layernorm for layer in transformer.layers][1:]
    norms.append(getattr(transformer, "final_layernorm", nn.Identity()))
    return [norm(states) for norm, states in zip(norms, hidden_states, strict=True)]


def _describe(model: AnyModel) -> dict[str, Any]:
    return model.config.to_dict(model_class=type(model).__name__, everything=True)


def _build(config: TransformerConfig, name: str) -> AnyModel:
    values = getattr(config, name, None) or config.extra.get(name)
    if not values or "model_class" not in values:
        raise ConfigError(f"DistillModel: the configuration has no '{name}' with a model_class. Give both models.")
    models.import_families()
    model_class = find_model(values["model_class"])
    model: AnyModel = model_class(model_class.config_class.from_dict(values))
    return model
