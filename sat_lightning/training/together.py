"""Ranks that succeed or fail together, so that none is left waiting for another."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

from sat_lightning.errors import CheckpointError


class Together:
    """Do something on the ranks, and raise on all of them if one could not.

    Args:
        strategy: of the run.
    """

    def __init__(self, strategy: Any) -> None:  # noqa: ANN401
        self._strategy = strategy

    def do(self, work: Callable[[], object], what: str, on_rank: int | None = None) -> None:
        """Call `work` on one rank or on all, and wait for everybody.

        Args:
            work: takes no part in collective operations.
            what: did not succeed then.
            on_rank: the only one that does it. Default: all do.

        Raises:
            CheckpointError: a rank could not; on every rank.
        """
        strategy, failure = self._strategy, ""
        if on_rank in (None, strategy.global_rank):
            try:
                work()
            except (OSError, RuntimeError, CheckpointError) as error:
                failure = f"rank {strategy.global_rank}: {error}"
        failures: list[str] = [failure] * strategy.world_size
        if strategy.world_size > 1:
            torch.distributed.all_gather_object(failures, failure)
        if found := [failure for failure in failures if failure]:
            raise CheckpointError(f"{what}: {'; '.join(found)}. Earlier checkpoints stay.")


def save_together(strategy: Strategy) -> None:
    """Let all ranks of DDP know whether rank 0, which alone writes, could save a checkpoint.

    Lightning's strategy leaves the others waiting at a barrier that a failed rank 0 never reaches. Where the first rank
    does not write alone, or there is no other, nothing changes.

    Args:
        strategy: of the run; a second call changes nothing.
    """
    is_alone = not isinstance(strategy, DDPStrategy) or strategy.world_size == 1
    if is_alone or isinstance(strategy, DeepSpeedStrategy) or isinstance(strategy.save_checkpoint, partial):
        return
    strategy.save_checkpoint = partial(_save_and_tell, strategy, strategy.save_checkpoint)  # type: ignore


def _save_and_tell(
    strategy: Any,  # noqa: ANN401
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: str | os.PathLike[str],
    storage_options: Any = None,  # noqa: ANN401
) -> None:
    failure: Exception | None = None
    try:
        save(checkpoint, filepath, storage_options=storage_options)
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear of it
        failure = error
    words = None if failure is None else str(failure) or type(failure).__name__
    failures: list[str | None] = [None] * strategy.world_size
    torch.distributed.all_gather_object(failures, words)
    if failure is not None:
        raise failure
    if found := [f"Rank {rank} has not saved the checkpoint: {words}" for rank, words in enumerate(failures) if words]:
        raise CheckpointError("; ".join(found))
