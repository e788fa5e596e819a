"""A large model teaches a small one (Hinton et al. 2015, arXiv:1503.02531).

Legend: b batch, s length, v vocabulary.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.data import IGNORED_TARGET
from sat_lightning.errors import ConfigError
from sat_lightning.models import DistillModel
from sat_lightning.training.masked_lm import Batch, MaskingTask, hard_loss
from sat_lightning.training.steps import Step


class DistillationTask(MaskingTask):
    """Train the student of a `DistillModel` to answer as its teacher does, and right.

        loss = soft_weight * T^2 * KL(teacher / T, student / T) + (1 - soft_weight) * cross entropy

    Both are means over the targets. A batch is as for `LanguageModelingTask`, its entries keywords of both models; with
    `mask_token_id` it is as for `MaskedLanguageModelingTask`. Logged are `<stage>_soft_loss` and `<stage>_hard_loss`
    too. The teacher never learns; with the callback `TrainableOnly` it is in no checkpoint either.

    Args:
        *args: of `SATLightningModule`; the model is a `DistillModel`.
        teacher_path: a model folder with the teacher's weights. Default: those that it was built with.
        temperature: T, above 0.
        soft_weight: 0 to 1.
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
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if temperature <= 0 or not 0 <= soft_weight <= 1:
            raise ConfigError(
                f"temperature is {temperature} and soft_weight {soft_weight}. Set temperature above 0, and soft_weight "
                "from 0 to 1."
            )
        self._teacher_path = teacher_path
        super().__init__(*args, **kwargs)
        self.temperature, self.soft_weight = temperature, soft_weight

    def configure_model(self) -> None:
        """Build both, and read the teacher's weights.

        Raises:
            ConfigError: the model is no `DistillModel`, or the two have different vocabularies.
            CheckpointError: the weights do not fit.
        """
        super().configure_model()
        model: Any = self._built_model()
        if not isinstance(model, DistillModel):
            raise ConfigError(f"DistillationTask: the model is a {type(model).__name__}. Build a DistillModel.")
        sizes = model.teacher.config.vocab_size, model.student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"DistillationTask: vocab_size is {sizes[0]} of the teacher and {sizes[1]} of the student. Give both "
                "one vocabulary."
            )
        if self._teacher_path is not None:
            path, self._teacher_path = self._teacher_path, None
            load_checkpoint(model.teacher, path)
            model.teacher.requires_grad_(False)

    def forward_step(self, batch: Batch) -> Step:
        """Return the weighted loss.

        Args:
            batch: see the class.

        Returns:
            The loss, and its two parts as `soft_loss` and `hard_loss`, in nats per target.
        """
        inputs, target_ids = self.prepare(batch)
        teacher_logits, student_logits = self._built_model()(dict(inputs), dict(inputs))
        soft = self.mean(soft_loss(teacher_logits, student_logits, target_ids, self.temperature))
        hard = self.mean(hard_loss(student_logits, target_ids))
        loss = self.soft_weight * soft + (1 - self.soft_weight) * hard
        return loss, {"soft_loss": soft.detach(), "hard_loss": hard.detach()}


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
    return temperature**2 * (divergence * (target_ids != IGNORED_TARGET)).sum()
