"""A large model teaches a small one (Hinton et al. 2015, arXiv:1503.02531).

Legend: b batch, s length, v vocabulary.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.data import IGNORED_TARGET
from sat_lightning.errors import ConfigError
from sat_lightning.model import BaseModel
from sat_lightning.models import DistillModel
from sat_lightning.training.hidden_loss import HiddenLoss, HiddenLossConfig
from sat_lightning.training.masked_lm import Batch, MaskingTask
from sat_lightning.training.steps import Step
from sat_lightning.training.targets import hard_loss, hide_padding


class DistillationTask(MaskingTask):
    """Train the student of a `DistillModel` to answer as its teacher does, and right.

        loss = soft_weight * T^2 * KL(teacher / T, student / T) + (1 - soft_weight) * cross entropy
               + hidden.weight * what their layers differ

    The first two are means over the targets, the third one over all tokens. A batch is as for `LanguageModelingTask`,
    its entries keywords of both models; with `mask_token_id` it is as for `MaskedLanguageModelingTask`. Logged are
    `<stage>_soft_loss` and `<stage>_hard_loss` too, and with `hidden` `<stage>_hidden_loss`. The teacher never learns;
    with the callback `TrainableOnly` it is in no checkpoint either.

    Args:
        *args: of `SATLightningModule`; the model is a `DistillModel`.
        teacher_path: a model folder with the teacher's weights. Default: those that it was built with.
        temperature: T, above 0.
        soft_weight: 0 to 1.
        hidden: how layers of the student are to be like layers of the teacher. Default: they are left alone.
        **kwargs: of `MaskingTask` and `SATLightningModule`.

    Raises:
        ConfigError: a number is outside its range.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        teacher_path: str | None = None,
        temperature: float = 2.0,
        soft_weight: float = 0.5,
        hidden: HiddenLossConfig | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if temperature <= 0 or not 0 <= soft_weight <= 1:
            raise ConfigError(
                f"temperature is {temperature} and soft_weight {soft_weight}. Set temperature above 0, and soft_weight "
                "from 0 to 1."
            )
        self._teacher_path = teacher_path
        self._hidden = HiddenLossConfig(**hidden) if isinstance(hidden, dict) else hidden
        if self._hidden is not None:
            hidden = asdict(self._hidden)  # type: ignore[assignment]  # plain, as a checkpoint keeps arguments
        super().__init__(*args, **kwargs)
        self.temperature, self.soft_weight = temperature, soft_weight
        self.hidden_loss: HiddenLoss | None = None

    def configure_model(self) -> None:
        """Build both, and read the teacher's weights.

        Raises:
            ConfigError: the model is no `DistillModel`, or the two do not go together.
            CheckpointError: the weights do not fit.
        """
        super().configure_model()
        model: Any = self._built_model()
        if not isinstance(model, DistillModel):
            raise ConfigError(f"DistillationTask: the model is a {type(model).__name__}. Build a DistillModel.")
        for name, part in (("teacher", model.teacher), ("student", model.student)):
            if not isinstance(part, BaseModel):
                raise ConfigError(
                    f"DistillationTask: the {name} is a {type(part).__name__}, which is made of several models. Build "
                    "one that turns input_ids into logits, such as a BertModel or a GPT2Model."
                )
        sizes = model.teacher.config.vocab_size, model.student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"DistillationTask: vocab_size is {sizes[0]} of the teacher and {sizes[1]} of the student. Give both "
                "one vocabulary."
            )
        if self._teacher_path is not None:
            path, self._teacher_path = self._teacher_path, None
            load_checkpoint(model.teacher, path)
        model.teacher.requires_grad_(False)  # whatever `trainable` says
        if self._hidden is not None and self.hidden_loss is None:
            self.hidden_loss = HiddenLoss(self._hidden, model.teacher, model.student)

    def forward_step(self, batch: Batch) -> Step:
        """Return the weighted loss.

        Args:
            batch: see the class.

        Returns:
            The loss, and its parts: `soft_loss` and `hard_loss` in nats per target, and `hidden_loss` if there is one.
        """
        model: Any = self._built_model()
        inputs, target_ids = self.prepare(batch)
        more = {} if self.hidden_loss is None else {"output_hidden_states": True}
        calls = [hide_padding(part, inputs) | more for part in (model.teacher, model.student)]
        teacher_logits, student_logits, *layers = model(*calls)
        soft = self.mean(soft_loss(teacher_logits, student_logits, target_ids, self.temperature))
        hard = self.mean(hard_loss(student_logits, target_ids))
        loss = self.soft_weight * soft + (1 - self.soft_weight) * hard
        parts = {"soft_loss": soft.detach(), "hard_loss": hard.detach()}
        if self.hidden_loss is not None:
            hidden = self.hidden_loss(*layers, inputs.get("token_mask"))
            loss = loss + self.hidden_loss.weight * hidden
            parts["hidden_loss"] = hidden.detach()
        return loss, parts


def soft_loss(teacher_logits: Tensor, student_logits: Tensor, target_ids: Tensor, temperature: float) -> Tensor:
    """Return `T^2 * KL(teacher / T, student / T)`, summed over the targets.

    Args:
        teacher_logits: `[b, s, v]`.
        student_logits: the same.
        target_ids: `[b, s]`, -100 where nothing counts.
        temperature: T.
    """
    expected, given = ((x.float() / temperature).log_softmax(-1) for x in (teacher_logits, student_logits))
    divergence = F.kl_div(given, expected, reduction="none", log_target=True).sum(-1)
    return temperature**2 * torch.where(target_ids != IGNORED_TARGET, divergence, 0.0).sum()
