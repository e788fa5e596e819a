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

#: What is drawn in narrow strips below the losses, where it was logged: a title, and how the names begin.
_STRIPS = {"learning rate": "lr-", "tokens/s, device": "train/device/items_per_sec"}


class CurvePlotter(L.Callback):
    """Draw training and validation curves beside the `metrics.csv` of a `CSVLogger` when a run ends or breaks off.

    Below follow learning rate and tokens per second, where `LearningRateMonitor` and `RunMonitor` logged them.

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
        table = Path(logger.log_dir) / "metrics.csv"
        curves = read_curves(table, self.metrics)
        if curves:
            curves |= read_curves(table, find_columns(table, tuple(_STRIPS.values())))
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


def find_columns(path: Path, beginnings: tuple[str, ...]) -> tuple[str, ...]:
    """Name the columns of a `metrics.csv` that begin in one of some ways.

    Args:
        path: the file; a missing one has none.
        beginnings: of names.
    """
    if not path.is_file():
        return ()
    with path.open(newline="") as file:
        return tuple(name for name in next(csv.reader(file), []) if name.startswith(beginnings))


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

    strips = {title: _distinct(curves, start) for title, start in _STRIPS.items()}
    strips = {title: found for title, found in strips.items() if found}
    losses = {name: curve for name, curve in curves.items() if not name.startswith(tuple(_STRIPS.values()))}
    figure = Figure(figsize=(8, 5 + 1.5 * len(strips)), layout="constrained")
    ratios = [5.0] + [1.5] * len(strips)
    panels = figure.subplots(1 + len(strips), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axes, (title, found) in zip(panels, {"loss": losses, **strips}.items(), strict=True):
        for name, (steps, values) in found.items():
            label = f"{name} (last {values[-1]:.3f})" if title == "loss" else name
            # A curve of few points shows where they are.
            axes.plot(steps, values, label=label, marker="o" if len(steps) <= 50 else None, ms=3)
        axes.set(ylabel=title)
        axes.grid(alpha=0.3)
        if title == "loss" or len(found) > 1:
            axes.legend(fontsize=None if title == "loss" else "x-small")
    panels[-1].set(xlabel="optimizer step")
    picture = io.BytesIO()
    figure.savefig(picture, format=file_format, dpi=120)
    return picture.getvalue()


def _distinct(curves: dict[str, Curve], start: str) -> dict[str, Curve]:
    """The curves of a strip: parameter groups that move alike are one, and of many the highest and the lowest."""
    found: dict[str, Curve] = {}
    for name, curve in curves.items():
        if name.startswith(start) and curve not in found.values():
            found[name] = curve
    if len(found) <= 4:
        return found
    ordered = sorted(found, key=lambda name: max(found[name][1]))
    return {name: found[name] for name in (ordered[-1], ordered[0])}
