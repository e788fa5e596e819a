"""Loss curves as a picture."""

import csv
import importlib.util
import io
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from sat_lightning.errors import ConfigError
from sat_lightning.training.runs import is_trial, write_whole

Curve = tuple[list[float], list[float]]


class CurvePlotter(L.Callback):
    """Draw training and validation curves beside the `metrics.csv` of a `CSVLogger` when a run ends or breaks off.

    Args:
        metrics: names of the logged curves.
        file_name: of the picture; its ending chooses the format.
    """

    def __init__(self, metrics: tuple[str, ...] = ("train_loss", "val_loss"), file_name: str = "curves.png") -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self.file_name = file_name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out before the first step, not after the last, that the picture cannot be drawn.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if stage == "fit" and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                'CurvePlotter needs matplotlib, which is not installed. Run: pip install "sat_lightning[plot]", or '
                "remove CurvePlotter from trainer.callbacks."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the finished run."""
        self._plot(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draw what there is; the run's own error is the one to be seen."""
        try:
            self._plot(trainer)
        except Exception as error:
            rank_zero_warn(f"CurvePlotter could not draw {self.file_name}: {error}")

    @rank_zero_only
    def _plot(self, trainer: L.Trainer) -> None:
        if is_trial(trainer) or trainer.state.fn != "fit":
            return
        logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if logger is None:
            rank_zero_warn("CurvePlotter draws what a CSVLogger wrote, and trainer.logger has none.")
            return
        logger.save()
        curves = read_curves(Path(logger.log_dir) / "metrics.csv", self.metrics)
        if curves:
            path = Path(logger.log_dir) / self.file_name
            write_whole(path, draw_curves(curves, path.suffix.removeprefix(".")))
            rank_zero_info(f"Curves: {path}")


def read_curves(path: Path, names: tuple[str, ...]) -> dict[str, Curve]:
    """Read curves from a `metrics.csv`.

    Args:
        path: the file; a missing one has no curves.
        names: columns.

    Returns:
        For each column that has values its steps and values.
    """
    curves: dict[str, Curve] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name in names:
                    if row.get(name):
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(float(row["step"]))
                        values.append(float(row[name]))
    return curves


def draw_curves(curves: dict[str, Curve], file_format: str = "png") -> bytes:
    """Draw curves over the optimizer steps.

    Args:
        curves: steps and values by name.
        file_format: `png`, `svg`, `pdf` or another that matplotlib writes.

    Returns:
        The picture's bytes.
    """
    # Not pyplot: it keeps global state, and may look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, (steps, values) in curves.items():
        # A curve of few points shows where they are.
        axes.plot(
            steps, values, label=f"{name} (last {values[-1]:.3f})", marker="o" if len(steps) <= 50 else None, ms=3
        )
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=file_format, dpi=120)
    return picture.getvalue()
