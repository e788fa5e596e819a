"""The steps of every stage, and the means that they log; what a model is they do not know."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.training.averages import WeightedMeans
from sat_lightning.training.runs import is_logging_step
from sat_lightning.training.throughput import count_rows, shape_of_ids

Step = Tensor | tuple[Tensor, dict[str, Tensor]]


class StepModule(L.LightningModule):
    """A loss for each batch in, means out: since they were last logged in training, over the epoch in evaluation.

    A step adds to sums on the device and waits for nothing; ranks meet only where a mean is logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._train_means = WeightedMeans()
        self._epoch_means: dict[int, WeightedMeans] = {}
        self.evaluated_set: str | None = None
        self.evaluated_loader: int | None = None
        """Number of the loader that is evaluated, or summarised; -1 for all together, None in training."""
        self._batch_shape = (0, 0)
        self.step_values: dict[str, Tensor] = {}
        self._step_weight = torch.zeros(())
        self.counts_before_backward = True
        """Whether a batch is known to be good before its backward pass; else `count_batch` is called when it is."""

    def forward_step(self, batch: Any) -> Step:  # noqa: ANN401
        """Compute the loss of one batch; a task overrides this.

        Args:
            batch: what the data module gives.

        Returns:
            The loss, or the loss and other scalars to log by name: means over the targets of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward_step(self, batch), returning the loss.")

    def count_targets(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Return how much a batch counts in a mean; override it where a batch has no `target_ids`.

        Args:
            batch: what the data module gives.

        Returns:
            A scalar: the number of `target_ids` that are not -100, or without them the number of rows.
        """
        if isinstance(batch, Mapping) and "target_ids" in batch:
            return (batch["target_ids"] != IGNORED_TARGET).sum()
        return torch.tensor(count_rows(batch))

    def summarise(self, stage: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Derive further metrics from the means of a whole epoch; a task may override this.

        Args:
            stage: `val` or `test`.
            means: `loss` and whatever `forward_step` returned.

        Returns:
            More to log, by name, without the stage.
        """
        return {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Return the loss of a batch, and hold what is to be logged as `step_values`."""
        loss, self.step_values = self._run(batch)
        self._step_weight = self.count_targets(batch)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Count the batch, now that it is trained on."""
        if self.counts_before_backward:
            self.count_batch()

    def count_batch(self) -> None:
        """Add the latest batch to the means, and log them when it is time."""
        values, self.step_values = self.step_values, {}
        if values:
            self._train_means.add(values, self._step_weight)
        if self._train_means and is_logging_step(self.trainer):
            self._log_train_means()

    def on_train_epoch_end(self) -> None:
        """Log what no step has logged, so that no step is lost and short runs have a loss too."""
        if self._train_means:
            self._log_train_means()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Add a batch to the means of the epoch."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Add a batch to the means of the epoch."""
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        """Return the loss and the other scalars of a batch, by name."""
        return self._run(batch)[1]

    def on_validation_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self._log_epoch_means("val")

    def on_test_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self._log_epoch_means("test")

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what this rank has not logged yet, for `ExactResume`."""
        return {"train_means": self._train_means.state_dict()}

    def load_rank_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from what was not logged yet.

        Args:
            states: of the ranks that this one takes over from: one, if there are as many as before.
        """
        parts = []
        for state in states:
            parts.append(WeightedMeans())
            parts[-1].load_state_dict(state["train_means"])
        self._train_means = WeightedMeans.union(parts)

    def _run(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ANN401
        self._batch_shape = shape_of_ids(batch)
        step = self.forward_step(batch)
        loss, metrics = step if isinstance(step, tuple) else (step, {})
        return loss, {"loss": loss.detach()} | {name: torch.as_tensor(value) for name, value in metrics.items()}

    def _log_train_means(self) -> None:
        means = self._train_means.pop(self.trainer.strategy)
        named = {f"train_{name}": mean for name, mean in means.items()}
        self.log_dict(named, batch_size=1)
        # With prog_bar=True Lightning would read these from the device, and wait for it, after every later batch too.
        shown = self.trainer._logger_connector._progress_bar_metrics
        shown |= dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True)) if named else {}

    def _evaluate(self, batch: Any, dataloader_idx: int) -> None:  # noqa: ANN401
        self.evaluated_loader = dataloader_idx
        values = self._run(batch)[1]
        self.evaluated_loader = None
        self._epoch_means.setdefault(dataloader_idx, WeightedMeans()).add(values, self.count_targets(batch))

    def _log_epoch_means(self, stage: str) -> None:
        epoch_means, self._epoch_means = self._epoch_means, {}
        names = self._set_names(stage)
        if len(epoch_means) > 1 and len(names) == len(epoch_means):
            epoch_means[-1] = WeightedMeans.union(epoch_means.values())
        for index, weighted in sorted(epoch_means.items()):
            means = weighted.pop(self.trainer.strategy)
            self.evaluated_set = names[index] if index >= 0 and -1 in epoch_means else None
            self.evaluated_loader = index
            is_whole = index < 0 or len(epoch_means) == 1
            suffix = "" if is_whole else f"/{self.evaluated_set or f'dataloader_idx_{index}'}"
            named = {f"{stage}_{name}{suffix}": value for name, value in (means | self.summarise(stage, means)).items()}
            self.log_dict(named, prog_bar=True, batch_size=1, add_dataloader_idx=False)
        self.evaluated_loader = None

    def _set_names(self, stage: str) -> list[str]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        is_named = hasattr(datamodule, "set_names")
        return datamodule.set_names("validation" if stage == "val" else stage) if is_named else []
