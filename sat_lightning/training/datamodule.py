"""`SATDataModule`: paths of text or tokens, or datasets, in; batches out, exactly once, on any number of ranks."""

from dataclasses import fields
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from sat_lightning.data import ShardedOrder, SourceOptions, Tokenizer, load_tokenizer
from sat_lightning.data.batches import ShardedBatches
from sat_lightning.data.corpus import Reading, list_sources, mean_bytes_per_token, mix, named_paths
from sat_lightning.data.mixed import MixedRows, OrderedRows, Rows, mean_tokens
from sat_lightning.data.mixture import Mixture
from sat_lightning.data.split import parse_split
from sat_lightning.data.store import TokenStore
from sat_lightning.errors import DataError
from sat_lightning.training.dataoptions import DataOptions
from sat_lightning.training.progress import DataProgress, TrainingLoader

Batches = DataLoader[Any]


_DEFAULT_OPTIONS = DataOptions()


class SATDataModule(L.LightningDataModule):
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
        validation: fraction held out of each source, which in a mixture gives one set for each, or a path of its own,
            or several by name; 0 for none.
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
        validation: float | str | dict[str, str] = 0.05,
        test: float | str | dict[str, str] | None = None,
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
        reading = self._reading()
        held_out = [path for value in (self.validation, self.test) for path in named_paths(value).values()]
        for path in [*(source.where for source in self.sources), *held_out]:
            if not isinstance(path, Dataset):
                reading.open_store(path)

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
        own = {name: named_paths(value) for name, value in held_out.items()}
        self._splits = self._reading().open_all(self.sources, own, fractions, self.options.split_seed)

    def _reading(self) -> Reading:
        # Seeds and the like are no part of how files are read, nor of the fingerprint that prepared tokens go by.
        options = SourceOptions(**{field.name: getattr(self.options, field.name) for field in fields(SourceOptions)})
        return Reading(self.text_tokenizer, self.sequence_length, options, self.options.cache_dir)

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded at first use."""
        return load_tokenizer(self.tokenizer, self.options.end_of_document_token)

    @property
    def vocab_size(self) -> int:
        """The `vocab_size` a model needs: the tokenizer's, or for token files what the ids and a named one ask for."""
        stores = self._stores("train")
        if not stores or any(store.meta.text_bytes is not None for store in stores):
            return max(self.text_tokenizer.vocab_size, self.max_token_id + 1)
        named = 0 if self.tokenizer == "bytes" else self.text_tokenizer.vocab_size
        return max(self.max_token_id + 1, named)

    @property
    def max_token_id(self) -> int:
        """The largest id in any split; 0 if only datasets were given, which do not tell."""
        return max((store.meta.max_token_id for split in self._opened() for store in self._stores(split)), default=0)

    @property
    def num_train_tokens(self) -> int:
        """Targets in the rows of one training epoch; of 1000 rows if epochs never end."""
        mixture, sources = self.mixture, self._opened()["train"].values()
        counts = mixture.counts(mixture.epoch_size or 1000)
        return round(sum(count * mean_tokens(rows) for count, rows in zip(counts, sources, strict=True)))

    @cached_property
    def mixture(self) -> Mixture:
        """The stream of training samples; one source is a mixture too."""
        block_size = self.batch_size if self.options.batch_from_same_source else 1
        return mix(self.sources, self.mixed_rows, self.options.stop, self.options.seed, block_size)

    @cached_property
    def mixed_rows(self) -> MixedRows:
        """The training samples of all sources."""
        return MixedRows(list(self._opened()["train"].values()))

    def set_names(self, split: str) -> list[str]:
        """Name the sets of a split.

        Args:
            split: `train`, `validation` or `test`.

        Returns:
            Names of its sources or sets, in the order of their loaders.
        """
        return list(self._opened().get(split, {}))

    def bytes_per_token(self, split: str = "validation", name: str | None = None) -> float | None:
        """Divide by this to turn bits per token into bits per byte.

        Args:
            split: `train`, `validation` or `test`.
            name: one of several sources or sets of it; default all together.

        Returns:
            UTF-8 bytes of text per token of the corpus the split was taken from, end-of-document ids counted as tokens
            (hence just below 1 for bytes); None for token files and datasets, which do not tell.
        """
        return mean_bytes_per_token(self._named_rows(split), name)

    def check_model(self, vocab_size: int, max_sequence_length: int) -> None:
        """Refuse a model that the data does not fit, before the first step.

        Args:
            vocab_size: the model's.
            max_sequence_length: the model's.

        Raises:
            DataError: an id is outside the vocabulary, or rows are longer than the model reads.
        """
        if self.max_token_id >= vocab_size:
            raise DataError(
                f"data: token id {self.max_token_id} is outside the model's vocabulary of {vocab_size} (path "
                f"{self.path!r}, tokenizer {self.tokenizer!r}). Set the model's vocab_size to {self.vocab_size}."
            )
        if self.sequence_length > max_sequence_length and self._stores("train"):
            raise DataError(
                f"data: sequence_length={self.sequence_length} is longer than the model's "
                f"max_sequence_length={max_sequence_length}. Set data.sequence_length to at most "
                f"{max_sequence_length}, or the model's max_sequence_length to at least {self.sequence_length}."
            )

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
            return DataLoader(ordered, batch_size=self.batch_size, **self._settings())
        rank, num_ranks = self._rank_and_size()
        drop_last = self.options.drop_last
        batches = ShardedBatches(mixture, self.batch_size, num_replicas=num_ranks, rank=rank, drop_last=drop_last)
        return TrainingLoader(rows, batches, self.progress, **self._settings())

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
            loaders.append(DataLoader(MixedRows([rows]), batch_size=self.batch_size, sampler=order, **self._settings()))
        return loaders[0] if len(loaders) == 1 else loaders

    def _settings(self) -> dict[str, Any]:
        is_on_cuda = self.trainer.strategy.root_device.type == "cuda" if self.trainer else torch.cuda.is_available()
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": is_on_cuda, "collate_fn": self.options.collate}

    def _opened(self) -> dict[str, dict[str, Rows]]:
        self.setup()
        return self._splits

    def _named_rows(self, split: str) -> dict[str, Rows]:
        splits = self._opened()
        if split not in splits:
            raise DataError(
                f"data: there is no {split} split, only {', '.join(splits)}. Set data.{split} to a fraction of "
                "the tokens or to a path."
            )
        return splits[split]

    def _stores(self, split: str) -> list[TokenStore]:
        stores = (getattr(rows, "store", None) for rows in self._named_rows(split).values())
        return [store for store in stores if isinstance(store, TokenStore)]

    def _rank_and_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
