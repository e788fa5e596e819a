"""Settings of `SATDataModule` that most runs leave alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sat_lightning.data.mixture import Stop
from sat_lightning.data.rowsamples import SampleOptions
from sat_lightning.data.sources import SourceOptions
from sat_lightning.errors import DataError


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """The less common settings of `SATDataModule`."""

    seed: int = 0
    """Chooses the order of the training rows; a new order comes with every epoch by itself."""
    split_seed: int = 0
    """Chooses what is held out, apart from `seed`, so that runs with other seeds stay comparable."""
    end_of_document_token: str | None = None
    """The token between documents, for a `tokenizers` file that calls it by no usual name."""
    split: str | None = None
    """Train, validation and test in SAT's notation, as "95,5,0"; takes the place of the two fractions."""
    stop: Stop | None = None
    """Where an epoch of a mixture ends, see `Mixture`."""
    batch_from_same_source: bool = False
    """Each rank's batch is of one source."""
    samples: SampleOptions | None = None
    """Every row of a file is a sample of its own, made like this; by default text runs together into rows."""
    bucket_size: int = 0
    """So many samples that follow each other are ordered by length, so that batches hold alike ones; 0 for none."""
    max_tokens: int | None = None
    """A rank's training batch is as many samples as fit this many tokens, padding counted, instead of `batch_size`."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples; default PyTorch's, for `samples` `PadCollate()`, packed `DocumentCollate()`."""
    unpad: bool = False
    """Leave padding out of what layers compute: same results, less work where samples differ in length. For `samples`
    that are padded, or a `collate` that adds `token_mask`."""
    drop_last: bool = False
    """Leave out the shorter last step of a training epoch, for batches that are all of one shape."""

    def __post_init__(self) -> None:
        for name, value in (("bucket_size", self.bucket_size), ("max_tokens", self.max_tokens)):
            if value is not None and value < (name == "max_tokens"):
                raise DataError(f"data: {name} is {value}. Set it to at least {int(name == 'max_tokens')}.")
        if self.unpad and self.samples is not None and (self.samples.pack or self.samples.image):
            raise DataError("data: unpad is for padded samples, and samples are packed or images. Remove unpad.")
        if self.max_tokens is not None and self.drop_last:
            raise DataError(
                "data: drop_last leaves out a shorter last step, and with max_tokens steps are of any size. Set one."
            )
