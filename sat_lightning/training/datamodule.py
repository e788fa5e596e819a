"""`SATDataModule`: paths of text or tokens, or datasets, in; batches out, exactly once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from sat_lightning.data import (
    DocumentCollate,
    LabelCollate,
    PadCollate,
    PairCollate,
    ShardedOrder,
    SourceOptions,
    Tokenizer,
    UnpadCollate,
    WeightedPath,
    load_tokenizer,
)
from sat_lightning.data.batches import ShardedBatches
from sat_lightning.data.buckets import BucketedBatches, Buckets, BudgetBatches
from sat_lightning.data.corpus import Reading, mix
from sat_lightning.data.entries import held_out_sources, list_sources
from sat_lightning.data.mixed import MixedRows, OrderedRows, Rows
from sat_lightning.data.mixture import Mixture
from sat_lightning.data.rowsamples import is_of_samples
from sat_lightning.data.split import parse_split
from sat_lightning.errors import DataError
from sat_lightning.training.datafacts import DataFacts
from sat_lightning.training.dataoptions import DataOptions
from sat_lightning.training.progress import DataProgress, TrainingLoader

Batches = DataLoader[Any]


_DEFAULT_OPTIONS = DataOptions()


class SATDataModule(DataFacts, L.LightningDataModule):
    """Text or token files, tokenized once, memory-mapped, split, packed, mixed, and sharded over the ranks.

    A batch of packed rows is `{"input_ids": [b, s], "target_ids": [b, s]}`, int64; targets are already shifted by one.
    In an epoch no row is lost and none repeated, in training, validation and test, on any number of ranks. In
    evaluation, targets that do not count are -100, on some ranks in a whole row, so a mean has to be weighted by
    `(target_ids != -100).sum()`, which may be 0.

    A checkpoint holds the place in the data as two integers; a run that is resumed continues with the very next
    sample, also on another number of ranks or workers.

    The loaders shard by themselves; their samplers are `DistributedSampler`s, which tells Lightning, with its default
    flags, to leave them in place.

    Args:
        path: training text or tokens: a file, folder, glob, `stdlib://`, another registered scheme, or a list of them.
            A mixture is a list with a `WeightedPath` in it, or its fields: then every entry is a source of its own.
        sequence_length: tokens per row.
        batch_size: rows per rank and step.
        tokenizer: `bytes`, or the path of a `tokenizers` JSON file; token files (.bin, .npy) need none.
        validation: fraction held out of each source, which in a mixture gives one set for each; or a path of its own,
            read as that of training is, or with fields of a `WeightedPath`; or several of these by name; 0 for none.
        test: the same for the test set; none by default.
        num_workers: processes per loader; 0 loads in the training process, which is fast enough for memory-mapped rows.
        options: seeds, cache folder, how files are read, and how they are mixed.

    Raises:
        DataError: a size is not positive.
    """

    def __init__(
        self,
        path: str | list[Any],
        sequence_length: int = 256,
        batch_size: int = 8,
        tokenizer: str = "bytes",
        validation: float | str | dict[str, Any] = 0.05,
        test: float | str | dict[str, Any] | None = None,
        num_workers: int = 0,
        options: DataOptions = _DEFAULT_OPTIONS,
    ) -> None:
        super().__init__()
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"data: {name} is {value}. Set it to at least 1.")
        self.path, self.validation, self.test = path, validation, test
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.tokenizer, self.num_workers, self.options = tokenizer, num_workers, options
        self.sources = list_sources(path)
        self._splits: dict[str, dict[str, Rows]] = {}
        self.progress = DataProgress()

    def prepare_data(self) -> None:
        """Tokenize what is not in the cache yet; Lightning calls it in one process per node."""
        reading, options = self._reading(), self.options
        held_out = [one for value in (self.validation, self.test) for one in self._held_out(value).values()]
        for source in held_out:
            reading.prepare(source)
        by_tokens = all(source.tokens is not None for source in self.sources)
        for source in self.sources:
            reading.prepare(source, by_tokens or options.bucket_size > 1 or options.max_tokens is not None)

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared tokens and cut them into splits.

        Args:
            stage: with `fit` a run begins; every split costs nothing until it is read.

        Raises:
            DataError: the data is missing, empty, or too short for a row.
        """
        if stage == "fit" and self.trainer is not None:
            self.progress.attach(self.trainer)
        if self._splits:
            return
        held_out = {"validation": self.validation, "test": self.test}
        if self.options.split is not None:
            fractions = parse_split(self.options.split)
        else:
            fractions = {name: v if isinstance(v, (int, float)) else 0.0 for name, v in held_out.items()}
        own = {name: self._held_out(value) for name, value in held_out.items()}
        self._splits = self._reading().open_all(self.sources, own, fractions, self.options.split_seed)

    def _held_out(self, value: Any) -> dict[str, WeightedPath]:  # noqa: ANN401 - as it was given
        return held_out_sources(value, self.sources)

    def _reading(self) -> Reading:
        # Seeds and the like are no part of how files are read, nor of the fingerprint that prepared tokens go by.
        options = SourceOptions(**{field.name: getattr(self.options, field.name) for field in fields(SourceOptions)})
        of_all = (self.text_tokenizer, self.sequence_length)
        return Reading(*of_all, options, self.options.cache_dir, self.options.samples)

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use."""
        return load_tokenizer(self.tokenizer, self.options.end_of_document_token)

    @cached_property
    def mixture(self) -> Mixture:
        """The stream of training samples; one source is a mixture too."""
        block_size = self.batch_size if self.options.batch_from_same_source else 1
        return mix(self.sources, self.mixed_rows, self.options.stop, self.options.seed, block_size)

    @cached_property
    def mixed_rows(self) -> MixedRows:
        """The training samples of all sources."""
        return MixedRows(list(self._opened()["train"].values()))

    def rows(self, split: str) -> Any:  # noqa: ANN401 - the user's own dataset, if one was given
        """The dataset of a split.

        Args:
            split: `train`, `validation` or `test`.

        Returns:
            Its rows: `PackedTokens` for one path, `MixedRows` for several sources or sets.

        Raises:
            DataError: there is no such split.
        """
        named = list(self._named_rows(split).values())
        return named[0] if len(named) == 1 else MixedRows(named)

    def state_dict(self) -> dict[str, int]:
        """The place in the training data, in a few integers."""
        return self.progress.state_dict(self.mixture)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a place.

        Args:
            state_dict: what `state_dict` gave.
        """
        self.progress.load_state_dict(state_dict, self.mixture)

    def train_dataloader(self) -> Batches:
        """Batches of the mixture, in an order of their own in every epoch.

        Returns:
            The loader of this rank; it starts where the run stands.

        Raises:
            DataError: there are fewer rows than one step takes.
        """
        rows, mixture = self.mixed_rows, self.mixture
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            # Lightning turns shuffling off by reading rows in their order: let that be the order of training.
            ordered = OrderedRows(rows, mixture, length=1000 * self.batch_size)
            return DataLoader(ordered, batch_size=self._num_rows, **self._settings())
        return TrainingLoader(rows, self._batches(), self.progress, **self._settings())

    def val_dataloader(self) -> Batches | list[Batches]:
        """Every validation row once.

        Returns:
            The loader of this rank, or one for each validation set; none with `validation: 0`.
        """
        return self._loaders("validation") if "validation" in self._opened() else []

    def test_dataloader(self) -> Batches | list[Batches]:
        """Every test row once.

        Returns:
            The loader of this rank, or one for each test set.
        """
        return self._loaders("test")

    def predict_dataloader(self) -> Batches | list[Batches]:
        """The rows of the test split, or of the validation split if there is no other.

        Returns:
            The loader of this rank, or one for each set.
        """
        return self.test_dataloader() if "test" in self._opened() else self.val_dataloader()

    def _loaders(self, split: str) -> Batches | list[Batches]:
        rank, num_ranks = self._rank_and_size()
        loaders: list[Batches] = []
        for rows in self._named_rows(split).values():
            order = ShardedOrder(len(rows), num_replicas=num_ranks, rank=rank)
            loaders.append(DataLoader(MixedRows([rows]), batch_size=self._num_rows, sampler=order, **self._settings()))
        return loaders[0] if len(loaders) == 1 else loaders

    def _batches(self) -> ShardedBatches:
        """Who takes which samples in training."""
        options, mixture, collate = self.options, self.mixture, self._collate
        rank, num_ranks = self._rank_and_size()
        ranks = {"num_replicas": num_ranks, "rank": rank}
        if options.bucket_size <= 1 and options.max_tokens is None:
            return ShardedBatches(mixture, self.batch_size, drop_last=options.drop_last, **ranks)
        length, rows = getattr(collate, "length", 0), self.mixed_rows
        least = length if isinstance(length, int) else 0  # what everything is padded to
        buckets = Buckets(mixture, lambda ids: np.maximum(rows.lengths_of(ids), least), options.bucket_size)
        if options.max_tokens is None:
            return BucketedBatches(buckets, self.batch_size, drop_last=options.drop_last, **ranks)
        multiple: int = getattr(collate, "multiple_of", 1)
        return BudgetBatches(buckets, options.max_tokens, batch_size=self.batch_size, multiple_of=multiple, **ranks)

    @property
    def _num_rows(self) -> int:
        """Rows of a batch in evaluation, where they are not counted by their tokens."""
        most = self.options.max_tokens
        return self.batch_size if most is None else max(1, most // self.sequence_length)

    @property
    def _collate(self) -> Callable[[list[Any]], Any] | None:
        collate = self._padding_collate
        if self.options.unpad and collate is None:
            raise DataError("data: unpad is for padded samples, and rows of running text have none. Remove unpad.")
        return UnpadCollate(collate) if self.options.unpad and collate is not None else collate

    @property
    def _padding_collate(self) -> Callable[[list[Any]], Any] | None:
        samples = self.options.samples
        if self.options.collate is not None or not is_of_samples(self.sources, samples):
            return self.options.collate
        if samples is not None and samples.label is not None:
            return LabelCollate()
        if samples is not None and samples.read is not None:
            return PairCollate()
        if samples is not None and samples.pack:
            return DocumentCollate()
        task = getattr(self.trainer, "lightning_module", None)
        return PadCollate(token_mask=self.options.unpad or getattr(task, "needs_token_mask", False))

    def _settings(self) -> dict[str, Any]:
        is_on_cuda = self.trainer.strategy.root_device.type == "cuda" if self.trainer else torch.cuda.is_available()
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": is_on_cuda, "collate_fn": self._collate}

    def _opened(self) -> dict[str, dict[str, Rows]]:
        self.setup()
        return self._splits

    def _rank_and_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
