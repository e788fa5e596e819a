"""What `predict` found, a line of JSON for each row of the data."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sat_lightning.training.runs import is_trial, run_folder, write_whole
from sat_lightning.training.throughput import count_rows


class PredictionWriter(BasePredictionWriter):
    """Write what `predict_step` returns to `predictions.jsonl` of the run's folder: `{"row": 0, "loss": 2.31, ...}`.

    A dict of tensors with an entry for each row of the batch becomes a line for each row, and so does a list with as
    many entries; what has no entry for each row becomes one line for the batch. Each rank writes a file of its own as
    it goes; at the end rank 0 puts their lines into the order of the data, each row once, though a sampler may have
    repeated some to fill up. Several sets are told apart by `set`. NaN and infinity, which JSON lacks, become null.

    It works for any Lightning module. `sat-lightning predict` adds it where no other prediction writer is named.

    Args:
        file_name: of the file.
    """

    def __init__(self, file_name: str = "predictions.jsonl") -> None:
        super().__init__("batch")
        self.file_name = file_name
        self._folder = Path()
        self._file: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin this rank's file; every rank has to call this."""
        self._folder = run_folder(trainer)
        if not is_trial(trainer):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._part(trainer.global_rank).open("w", encoding="utf-8", errors="backslashreplace")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the lines of a batch, each behind what it is sorted by."""
        if self._file is None or prediction is None:
            return
        rows = [int(index) for index in batch_indices or ()]
        is_by_row, lines = read_prediction(prediction, len(rows) or count_rows(batch))
        for place, values in enumerate(lines):
            row = rows[place] if is_by_row and rows else None
            if row is not None and row < 0:
                continue  # an empty one, with which the loaders of `SATDataModule` fill ranks up
            key = [dataloader_idx, batch_idx if row is None else row, trainer.global_rank if row is None else 0, place]
            named = {"row": row} if row is not None else {"batch": batch_idx}
            line = {**named, **({"set": self._set_name(trainer, dataloader_idx)}), **values}
            line = {name: value for name, value in line.items() if name != "set" or value is not None}
            is_unique = row is not None
            self._file.write(json.dumps([key, is_unique, line], ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the lines of all ranks together; every rank has to call this."""
        if self._file is None:
            return
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            self._merge(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave what was written so far as this rank's file."""
        self._close()

    def _merge(self, trainer: L.Trainer) -> None:
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        there = [path for path in parts if path.is_file()]
        if len(there) < len(parts):
            rank_zero_warn(f"PredictionWriter: of {len(parts)} ranks only {len(there)} wrote to {self._folder}.")
        found: dict[tuple[int, ...], Any] = {}
        for path in there:
            for entry in path.read_text(encoding="utf-8").split("\n")[:-1]:
                (loader, number, rank, place), is_unique, line = json.loads(entry)
                found.setdefault((loader, number) if is_unique else (loader, number, rank, place), line)
        target = self._folder / self.file_name
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for _, line in sorted(found.items()))
        write_whole(target, "".join(lines).encode("utf-8", errors="backslashreplace"))
        for path in there:
            path.unlink()
        rank_zero_info(f"Predictions: {target} ({len(found)} lines)")

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _part(self, rank: int) -> Path:
        return self._folder / f".{self.file_name}.rank{rank}"

    @staticmethod
    def _set_name(trainer: L.Trainer, index: int) -> str | int | None:
        """Return the name of a set where there are several."""
        if (trainer.predict_loop.num_dataloaders or 1) < 2:
            return None
        datamodule: Any = getattr(trainer, "datamodule", None)
        for split in ("test", "validation") if hasattr(datamodule, "set_names") else ():
            names = datamodule.set_names(split)
            if index < len(names):
                return str(names[index])
        return index


def read_prediction(prediction: Any, num_rows: int) -> tuple[bool, list[dict[str, Any]]]:  # noqa: ANN401
    """Take a batch's prediction apart, row by row where it has an entry for each row.

    Args:
        prediction: what a step returned.
        num_rows: of the batch.

    Returns:
        Whether there is a line for each row, and the lines.
    """
    if isinstance(prediction, Mapping):
        values = {str(name): value for name, value in prediction.items()}
        by_row = {name for name, value in values.items() if _has_rows(value, num_rows)}
        if not by_row:
            return False, [{name: to_plain(value) for name, value in values.items()}]
        plain = {name: to_plain(value) for name, value in values.items()}
        return True, [{n: v[row] if n in by_row else v for n, v in plain.items()} for row in range(num_rows)]
    if _has_rows(prediction, num_rows):
        return True, list(_rows(to_plain(prediction)))
    return False, list(_rows([to_plain(prediction)]))


def _rows(values: list[Any]) -> Iterator[dict[str, Any]]:
    for value in values:
        yield value if isinstance(value, dict) else {"prediction": value}


def _has_rows(value: Any, num_rows: int) -> bool:  # noqa: ANN401
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and value.shape[0] == num_rows
    return isinstance(value, list | tuple) and len(value) == num_rows


def to_plain(value: Any) -> Any:  # noqa: ANN401
    """Return a value as JSON has it: lists, dicts, texts and finite numbers; anything else as text.

    Args:
        value: tensors and nested containers too.
    """
    if isinstance(value, Tensor):
        return to_plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        plain = value.tolist()
        return str(value) if isinstance(plain, np.generic) else to_plain(plain)
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)
