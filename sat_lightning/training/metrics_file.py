"""`metrics.csv` of a resumed run goes on where the checkpoint was taken, in one file."""

import csv
import io
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from sat_lightning.training.runs import write_whole


class ContinuedWriter(ExperimentWriter):
    """Go on writing a `metrics.csv` that is there, where Lightning would delete it.

    Args:
        log_dir: its folder.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self.metrics_keys = _read(Path(self.metrics_file_path))[0]

    def _check_log_dir_exists(self) -> None:
        """Let everything stay."""

    def keep_rows(self, num_rows: int) -> None:
        """Drop what was logged after a checkpoint: it will be logged again.

        Args:
            num_rows: how many to keep.
        """
        keys, rows = _read(Path(self.metrics_file_path))
        if len(rows) > num_rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, keys)
            writer.writeheader()
            writer.writerows(rows[:num_rows])
            write_whole(Path(self.metrics_file_path), text.getvalue().encode())


def continue_files(trainer: L.Trainer) -> None:
    """Make the CSV loggers of a trainer append to the files that they find.

    Args:
        trainer: before it fits.
    """
    for logger in _csv_loggers(trainer):
        logger._experiment = ContinuedWriter(log_dir=logger.log_dir)


def num_rows(trainer: L.Trainer) -> list[int]:
    """Count the rows that the CSV loggers have written, in the order of the loggers.

    Args:
        trainer: its loggers have saved.
    """
    if not trainer.is_global_zero:
        return []
    return [len(_read(Path(logger.experiment.metrics_file_path))[1]) for logger in _csv_loggers(trainer)]


def kept_rows(trainer: L.Trainer, counts: list[int]) -> None:
    """Keep of the files that are continued what a checkpoint knows.

    Args:
        trainer: its rank 0 writes.
        counts: what `num_rows` returned.
    """
    if trainer.is_global_zero:
        for logger, count in zip(_csv_loggers(trainer), counts, strict=False):
            if isinstance(logger._experiment, ContinuedWriter):
                logger._experiment.keep_rows(count)


def _csv_loggers(trainer: L.Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _read(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not file.is_file():
        return [], []
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        rows = list(reader)
        return list(reader.fieldnames or []), rows
