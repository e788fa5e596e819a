"""Settings of `SATDataModule` that most runs leave alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sat_lightning.data.mixture import Stop
from sat_lightning.data.sources import SourceOptions


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """The less common settings of `SATDataModule`."""

    seed: int = 0
    """Chooses the order of the training rows; a new order comes with every epoch by itself."""
    split_seed: int = 0
    """Chooses what is held out, apart from `seed`, so that runs with other seeds stay comparable."""
    cache_dir: str | None = None
    """Where prepared tokens are kept; default `$SAT_HOME/data`, else the user's cache folder."""
    end_of_document_token: str | None = None
    """The token between documents, for a `tokenizers` file that calls it by no usual name."""
    split: str | None = None
    """Train, validation and test in SAT's notation, as "95,5,0"; takes the place of the two fractions."""
    stop: Stop | None = None
    """Where an epoch of a mixture ends, see `Mixture`."""
    batch_from_same_source: bool = False
    """Each rank's batch is of one source."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples, for datasets of one's own, for instance `PadCollate`; default PyTorch's."""
    drop_last: bool = False
    """Leave out the shorter last step of a training epoch, for batches that are all of one shape."""
