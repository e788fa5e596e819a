"""Pictures of what a task finds: a confusion matrix, a grid of classified images, maps of attention."""

import importlib.util
import io
from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sat_lightning.errors import ConfigError
from sat_lightning.mixins.attention_maps import AttentionMapsMixin
from sat_lightning.model import BaseModel
from sat_lightning.training.runs import is_trial, run_folder, write_whole

_MIXIN = "attention_maps_of_callback"
#: Inches of a confusion matrix, and how many classes are named on its axes, and counted in its cells.
_LARGEST, _MOST_NAMED, _MOST_COUNTED = 24.0, 60, 30


class _Picture(L.Callback):
    """A picture drawn anew after every validation and test, by rank 0; without matplotlib there is a warning and none.

    What it shows is gathered at the first batch of the first set, by all ranks, as a forward may need them all; rank 0
    draws its own part.
    """

    def __init__(self, file_name: str) -> None:
        super().__init__()
        self.file_name = file_name
        self._is_off = False
        self._shown: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out before the first step whether a picture can be drawn."""
        if not self._is_off and importlib.util.find_spec("matplotlib") is None:
            self._is_off = True
            rank_zero_warn(
                f"{type(self).__name__} draws {self.file_name} with matplotlib, which is not installed: there will be "
                'no picture. Run: pip install "sat_lightning[plot]"'
            )

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Gather what is shown."""
        self._see(trainer, pl_module, batch, batch_idx, *args)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Gather what is shown."""
        self._see(trainer, pl_module, batch, batch_idx, *args)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._finish(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._finish(trainer, pl_module, "test")

    @abstractmethod
    def draw(self, figure: Any, pl_module: Any, stage: str) -> bool:  # noqa: ANN401 - matplotlib's, and a task
        """Draw into a figure, and tell whether there was anything to draw."""

    def gather(self, pl_module: Any, batch: Any) -> Any:  # noqa: ANN401
        """Return what is to be shown of a batch."""

    def _see(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        if (
            batch_idx == 0
            and dataloader_idx == 0
            and not (self._is_off or is_trial(trainer) or trainer.sanity_checking)
        ):
            with torch.no_grad():
                self._shown = self.gather(pl_module, batch)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._is_off or is_trial(trainer) or trainer.sanity_checking:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        from matplotlib.figure import Figure  # not pyplot: it keeps global state, and may look for a display

        figure = Figure(layout="constrained")
        if self.draw(figure, pl_module, stage):
            path, picture = folder / self.file_name, io.BytesIO()
            figure.savefig(picture, format=path.suffix.removeprefix(".") or "png", dpi=120)
            write_whole(path, picture.getvalue())
            rank_zero_info(f"{type(self).__name__}: {path}")


class ConfusionPlotter(_Picture):
    """Draw the confusion matrix of a classification task: all rows of all ranks, each counted once.

    Args:
        file_name: of the picture; its ending chooses the format.
    """

    def __init__(self, file_name: str = "confusion.png") -> None:
        super().__init__(file_name)

    def draw(self, figure: Any, pl_module: Any, stage: str) -> bool:  # noqa: ANN401
        """Draw the counts, each row shaded by its shares."""
        counts = getattr(pl_module, "confusion", {}).get(stage)
        if counts is None:
            return False
        counts = counts.cpu()
        names = pl_module.label_names or [str(number) for number in range(len(counts))]
        size = min(max(3.0, 0.5 * len(names) + 1.5), _LARGEST)
        figure.set_size_inches(size + 0.8, size)
        axes = figure.subplots()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
        axes.set(xlabel="predicted", ylabel="true")
        if len(names) <= _MOST_NAMED:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        for row, line in enumerate(counts.tolist() if len(names) <= _MOST_COUNTED else []):
            for column, count in enumerate(line):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize="x-small")
        return True


class ImageGrid(_Picture):
    """Draw the first images of a set with what was predicted, in red beside the truth where it is wrong.

    Of several ranks they are those of rank 0.

    Args:
        num_images: at most; a batch may hold less.
        file_name: of the picture; its ending chooses the format.

    Raises:
        ConfigError: there is to be none.
    """

    def __init__(self, num_images: int = 25, file_name: str = "images.png") -> None:
        super().__init__(file_name)
        if num_images < 1:
            raise ConfigError(f"ImageGrid: num_images is {num_images}. Set it to at least 1.")
        self.num_images = num_images

    def gather(self, pl_module: Any, batch: Any) -> Any:  # noqa: ANN401
        """Classify the images once more, all of the batch: its shape is known to a compiled model."""
        labels = pl_module.predict_step(batch, 0)["label"]
        kept = (batch["image"], labels, batch["target_ids"])
        return [part[: self.num_images].float().cpu() for part in kept]

    def draw(self, figure: Any, pl_module: Any, stage: str) -> bool:  # noqa: ANN401
        """Draw a square of images."""
        if self._shown is None:
            return False
        images, labels, target_ids = self._shown
        name_of = str if pl_module.label_names is None else pl_module.label_names.__getitem__
        side = max(1, int((len(images) - 1) ** 0.5) + 1) if len(images) > 1 else 1
        figure.set_size_inches(1.3 * side, 1.5 * side)
        panels = figure.subplots(side, side, squeeze=False).flatten()
        for axes in panels:
            axes.axis("off")
        for axes, image, label, target in zip(panels, images, labels.int().tolist(), target_ids.int().tolist()):  # noqa: B905
            axes.imshow(_to_picture(image), cmap="gray")
            is_wrong = target >= 0 and label != target
            title = f"{name_of(label)} ({name_of(target)})" if is_wrong else name_of(label)
            axes.set_title(title, fontsize="small", color="red" if is_wrong else "black")
        return True


class AttentionPlotter(_Picture):
    """Draw what the tokens of the first row of a set attend to, a panel for each layer and head.

    Of several ranks it is the first row of rank 0.

    Args:
        num_layers: at most, evenly spread.
        num_heads: at most, the first ones.
        file_name: of the picture; its ending chooses the format.
    """

    def __init__(self, num_layers: int = 6, num_heads: int = 8, file_name: str = "attention.png") -> None:
        super().__init__(file_name)
        self.num_layers, self.num_heads = num_layers, num_heads

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out before the first step that nothing can be drawn.

        Raises:
            ConfigError: the model is not one backbone.
        """
        _model_of(pl_module)

    def gather(self, pl_module: Any, batch: Any) -> Any:  # noqa: ANN401
        """Run the batch once more, with a mixin that gives the weights."""
        model = _model_of(pl_module)
        maps: list[Tensor] = []

        def keep(model: Any, args: Any, output: Any) -> None:  # noqa: ANN401
            maps.extend(layer["attention_map"][0] for layer in output[1:] if "attention_map" in layer)

        handle = model.register_forward_hook(keep)
        model.add_mixin(_MIXIN, AttentionMapsMixin())
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would not call the hook
                pl_module.forward_step(batch)
        finally:
            model.del_mixin(_MIXIN)
            handle.remove()
        if not maps:
            return None  # what attends by no attention_fn has no maps
        places = torch.linspace(0, len(maps) - 1, min(len(maps), self.num_layers)).round().int().tolist()
        mask = batch.get("token_mask")
        length = maps[0].shape[-1] if mask is None or mask.dim() != 2 else max(1, int(mask[0].sum()))
        return [(place, maps[place][: self.num_heads, :length, :length].float().cpu()) for place in places]

    def draw(self, figure: Any, pl_module: Any, stage: str) -> bool:  # noqa: ANN401
        """Draw a row for each layer."""
        if not self._shown:
            return False
        num_heads = len(self._shown[0][1])
        figure.set_size_inches(1.6 * num_heads + 0.4, 1.7 * len(self._shown))
        panels = figure.subplots(len(self._shown), num_heads, squeeze=False)
        for row, (layer_id, heads) in zip(panels, self._shown, strict=True):
            for head, (axes, weights) in enumerate(zip(row, heads, strict=True)):
                axes.imshow(weights.numpy(), cmap="viridis", vmin=0)
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"layer {layer_id}, head {head}", fontsize="x-small")
        return True


def _model_of(pl_module: Any) -> BaseModel:  # noqa: ANN401
    model = pl_module.model
    if not isinstance(model, BaseModel):
        raise ConfigError(f"AttentionPlotter draws a BaseModel, and the model is a {type(model).__name__}. Remove it.")
    return model


def _to_picture(image: Tensor) -> Any:  # noqa: ANN401 - an array
    """Turn `[channels, h, w]` of any range into what is drawn, 0 to 1."""
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0)
    return (pixels if pixels.shape[2] == 3 else pixels[..., 0]).numpy()
