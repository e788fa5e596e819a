"""Tasks of choosing a class: of a text, of each of its tokens, of an image, or one of several answers."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.errors import ConfigError
from sat_lightning.training.confusion import ConfusionCounts, rate
from sat_lightning.training.module import SATLightningModule
from sat_lightning.training.steps import Step
from sat_lightning.training.targets import hard_loss, hide_padding, mean_over_targets


class ClassificationTask(SATLightningModule):
    """Choose a class: what the tasks of this file share. A batch holds `target_ids`, -100 where none counts.

    Logged are `<stage>_loss` and `<stage>_accuracy`, and after validation and test `<stage>_macro_f1`: exact over all
    targets of all ranks. The counts they come from stay in `confusion` until the next ones.

    An encoder's batch needs no `attention_mask`: without one, what `token_mask` `[b, s]` leaves out is hidden.
    """

    #: Dimensions of the scores, for the message that says which head fits.
    num_dimensions: ClassVar[int] = 2
    cure: ClassVar[str] = "Give MLPHeadMixin pooling: first, last or mean"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.confusion: dict[str, Tensor] = {}
        self._counts: dict[int, ConfusionCounts] = {}

    def forward_step(self, batch: dict[str, Tensor]) -> Step:
        """Return the mean cross entropy over the targets, and the accuracy.

        Args:
            batch: see the class.

        Returns:
            The loss in nats, and `accuracy`.
        """
        scores, target_ids = self.score(batch), batch["target_ids"]
        counted = target_ids != IGNORED_TARGET
        loss = mean_over_targets(hard_loss(scores, target_ids), counted)
        predicted = scores.detach().argmax(-1)
        if self.evaluated_loader is not None:
            self._count(self.evaluated_loader, scores.shape[-1], predicted, target_ids)
        return loss, {"accuracy": mean_over_targets((predicted == target_ids).sum(), counted)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Classify.

        Args:
            batch: see the class.
            batch_idx: unused.
            dataloader_idx: unused.

        Returns:
            For each row `label`, the number of the class, `probabilities`, and `name` where the data name the labels.
        """
        probabilities = self.score(batch).float().softmax(-1)
        label = probabilities.argmax(-1)
        found: dict[str, Any] = {"label": label, "probabilities": probabilities}
        names = self.label_names
        return found if names is None else found | {"name": _name(label.tolist(), names)}

    def score(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the score of each class, `[b, classes]`.

        Args:
            batch: see the class.

        Raises:
            ConfigError: the head gives something else.
        """
        scores = self._run_model({name: value for name, value in batch.items() if name != "target_ids"})
        self._check(scores)
        return scores

    @property
    def label_names(self) -> list[str] | None:
        """The labels in the order of their numbers, where the data name them."""
        return getattr(getattr(self._trainer, "datamodule", None), "label_names", None)

    def summarise(self, stage: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add macro-F1, and keep the confusion matrix as `confusion`, by stage and set."""
        index = self.evaluated_loader or 0
        if index >= 0:
            counts = self._counts[index].compute()
        else:
            counts = torch.stack([self._counts[loader].compute() for loader in sorted(self._counts)]).sum(0)
        self.confusion[stage if self.evaluated_set is None else f"{stage}/{self.evaluated_set}"] = counts
        return {"macro_f1": rate(counts)["macro_f1"]}

    def _log_epoch_means(self, stage: str) -> None:
        super()._log_epoch_means(stage)
        self._counts = {}

    def _count(self, loader: int, num_classes: int, predicted: Tensor, target_ids: Tensor) -> None:
        if loader not in self._counts:
            self._counts[loader] = ConfusionCounts(num_classes).to(predicted.device)
        self._counts[loader].update(predicted, target_ids)

    def _run_model(self, inputs: dict[str, Tensor]) -> Tensor:
        model = self._built_model()
        return model(**hide_padding(model, inputs))[0]

    def _check(self, scores: Tensor) -> None:
        kind = type(self).__name__
        if scores.dim() != self.num_dimensions:
            raise ConfigError(
                f"{kind}: the model gives {list(scores.shape)}, it must give {self.num_dimensions} dimensions, the "
                f"last one classes. {self.cure}, and remove the model's own head with NoMixin."
            )
        if (names := self.label_names) is not None and scores.shape[-1] != len(names):
            raise ConfigError(
                f"{kind}: the head gives {scores.shape[-1]} scores and the data have {len(names)} labels "
                f"({', '.join(names[:8])}). Set the head's last size to {len(names)}, or mend samples.labels."
            )


class SequenceClassificationTask(ClassificationTask):
    """Choose the class of a text: `{"input_ids": [b, s], "token_mask": [b, s], "target_ids": [b]}`.

    Other entries of a batch (`token_type_ids`, `attention_mask`, ...) are keywords of the model, and so is
    `token_mask`, 1 for a token and 0 for padding, by which a head pools. The model's first output is `[b, classes]`:
    that of `MLPHeadMixin` with `pooling`. See `ClassificationTask` for what is logged.
    """


class TokenClassificationTask(ClassificationTask):
    """Choose the class of each token: `{"input_ids": [b, s], "token_mask": [b, s], "target_ids": [b, s]}`.

    The model's first output is `[b, s, classes]`: that of `MLPHeadMixin` without `pooling`. The rest is as in
    `SequenceClassificationTask`.
    """

    num_dimensions = 3
    cure = "Give MLPHeadMixin no pooling"

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Classify each word.

        Args:
            batch: see the class.
            batch_idx: unused.
            dataloader_idx: unused.

        Returns:
            As the other tasks do, of each row a list with what was found for its targets: for each word, its first
            token's. What frames the words and what pads them is left out.
        """
        found = super().predict_step(batch, batch_idx, dataloader_idx)
        is_target = (batch["target_ids"] != IGNORED_TARGET).tolist()
        rows = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in found.items()}
        return {
            name: [
                [one for one, counts in zip(*pair, strict=True) if counts] for pair in zip(row, is_target, strict=True)
            ]
            for name, row in rows.items()
        }


class MultipleChoiceTask(ClassificationTask):
    """Choose the right one of several texts: `{"input_ids": [b, c, s], "token_mask": [b, c, s], "target_ids": [b]}`.

    The model reads every choice as a row of its own, other entries `[b, c, s]` beside it, and gives it one score,
    `[b * c, 1]`: that of `MLPHeadMixin` with `sizes: [1]` and `pooling`. The scores of a row compete.
    """

    cure = "Give MLPHeadMixin sizes: [1] and pooling: first, last or mean"

    def score(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the score of each choice, `[b, c]`.

        Raises:
            ConfigError: the head gives more than one score.
        """
        num_rows, num_choices, _ = batch["input_ids"].shape
        inputs = {
            name: value.flatten(0, 1) if value.dim() > 1 else value  # token_indices count through all rows as it is
            for name, value in batch.items()
            if name != "target_ids"
        }
        scores = self._run_model(inputs)
        if scores.shape[1:] != (1,):
            raise ConfigError(
                f"MultipleChoiceTask: the model gives {list(scores.shape)} for {num_rows} rows of {num_choices} "
                f"choices, it must give one score for each choice. {self.cure}."
            )
        scores = scores.view(num_rows, num_choices)
        self._check(scores)
        return scores


class ImageClassificationTask(ClassificationTask):
    """Choose the class of an image: `{"image": [b, channels, h, w], "target_ids": [b]}`.

    The model's first output is `[b, classes]`: that of `ViTModel` with `num_classes`, or of `MLPHeadMixin` with
    `pooling`. See `ClassificationTask` for what is logged.
    """


def _name(labels: Any, names: list[str]) -> Any:  # noqa: ANN401 - nested lists
    return [_name(label, names) for label in labels] if isinstance(labels, list) else names[labels]
