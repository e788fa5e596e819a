"""What a run trains, and how much of it a step is: a table before the first step, on the screen and in a file."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from sat_lightning.training.flops import bytes_of, size_of
from sat_lightning.training.runs import is_trial, steps_per_epoch, total_steps, write_whole

FILE_NAME = "summary.txt"


def report_run(trainer: L.Trainer, model: nn.Module) -> None:
    """Print the table, and write it to `summary.txt` in the folder where the logger writes; every rank calls this.

    Args:
        trainer: about to train; its training data is loaded, if need be.
        model: whole or sharded.
    """
    text = f"{describe_parameters(model)}\n{describe_steps(trainer)}"
    rank_zero_info(text)
    folder = trainer.log_dir if trainer.loggers else None  # every rank asks; a logger may have no folder
    if folder is not None and trainer.is_global_zero and not is_trial(trainer):
        write_whole(Path(folder) / FILE_NAME, f"{text}\n".encode())


def describe_parameters(model: nn.Module) -> str:
    """Return a table of how many parameters train and how many are frozen, by block and by mixin.

    Args:
        model: any module, also sharded by ZeRO-3. A block is a part of a transformer, or a mixin. What several blocks
            share is counted once, in the transformer if that is one of them.

    Returns:
        The table, ending in the sums.
    """
    blocks: dict[str, tuple[int, int, int]] = {}
    seen: set[int] = set()
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in sorted(named, key=lambda item: "mixins." in item[0]):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        trains, frozen, num_bytes = blocks.get(_block_of(name), (0, 0, 0))
        size = size_of(parameter)
        trains, frozen = (trains + size, frozen) if parameter.requires_grad else (trains, frozen + size)
        blocks[_block_of(name)] = (trains, frozen, num_bytes + bytes_of(parameter))
    blocks["total"] = tuple(map(sum, zip(*blocks.values(), strict=True))) or (0, 0, 0)  # type: ignore[assignment]
    width = max(len("parameters"), *map(len, blocks))
    lines = [f"{'parameters':<{width}}  {'trainable':>15}  {'frozen':>15}  {'MiB':>10}"]
    for name, (trains, frozen, num_bytes) in blocks.items():
        lines.append(f"{name:<{width}}  {trains:>15,}  {frozen:>15,}  {num_bytes / 2**20:>10,.1f}")
    return "\n".join(lines)


def describe_steps(trainer: L.Trainer) -> str:
    """Return what a step and the run hold, in three lines.

    Args:
        trainer: about to train; what its data does not tell is left out.

    Returns:
        Rows and tokens of a step over all ranks, steps of an epoch, steps and tokens of the run.
    """
    each, num_steps = steps_per_epoch(trainer), total_steps(trainer)
    run = "unknown" if num_steps is None else f"{num_steps:,} steps"
    parts = [f"{trainer.accumulate_grad_batches} accumulated", f"{trainer.world_size} ranks"]
    num_rows, length = _batch_size(trainer), getattr(_datamodule(trainer), "sequence_length", None)
    if num_rows is None:
        step = "batches x " + " x ".join(parts)
    else:
        rows = num_rows * trainer.accumulate_grad_batches * trainer.world_size
        step = " x ".join([f"{num_rows} rows", *parts]) + f" = {rows:,} rows"
        if length is not None:
            step += f" x {length:,} tokens = {rows * length:,} tokens"
            run += "" if num_steps is None else f", {num_steps * rows * length:,} tokens"
    return f"step   {step}\nepoch  {'unknown' if each is None else f'{each:,} steps'}\nrun    {run}"


def _block_of(name: str) -> str:
    """`transformer.layers` of `transformer.layers.0.mlp...`, also inside an encoder or a decoder."""
    words = name.split(".")
    place = next((index for index, word in enumerate(words) if word in ("transformer", "mixins")), 0)
    return ".".join(words[: place + 2])


def _datamodule(trainer: L.Trainer) -> object:
    return getattr(trainer, "datamodule", None)


def _batch_size(trainer: L.Trainer) -> int | None:
    loader = trainer.train_dataloader
    for owner in (_datamodule(trainer), loader, getattr(loader, "batch_sampler", None)):
        if isinstance(size := getattr(owner, "batch_size", None), int):
            return size
    return None
