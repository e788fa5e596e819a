"""A teacher beside a student (Hinton et al. 2015, arXiv:1503.02531).

What differs from a plain model: there are two, and the teacher never learns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_lightning.model import BaseModel, ComposedModel, register_model


@register_model
class DistillModel(ComposedModel):
    """Run both: `teacher_logits, student_logits = model(teacher_kwargs, student_kwargs)`.

    Args:
        teacher: the model to learn from; it is frozen, and stays in evaluation mode.
        student: the model that learns.
    """

    teacher: BaseModel | ComposedModel
    student: BaseModel | ComposedModel

    def __init__(self, teacher: BaseModel | ComposedModel, student: BaseModel | ComposedModel) -> None:
        super().__init__(student.config)
        self.teacher, self.student = teacher.requires_grad_(False).eval(), student

    def train(self, mode: bool = True) -> DistillModel:
        """Set the student's mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, teacher_kwargs: dict[str, Any], student_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Call the teacher without gradients, and the student.

        Args:
            teacher_kwargs: keywords of the teacher's call.
            student_kwargs: keywords of the student's call.

        Returns:
            The first result of each, their logits.
        """
        with torch.no_grad():
            teacher_logits = self.teacher(**teacher_kwargs)[0]
        return teacher_logits, self.student(**student_kwargs)[0]
