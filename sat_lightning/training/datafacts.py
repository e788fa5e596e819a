"""What the data say of themselves, so that a model that does not fit is refused before the first step."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

from sat_lightning.data import Labels, Tokenizer, WeightedPath
from sat_lightning.data.corpus import mean_bytes_per_token
from sat_lightning.data.mixed import Rows, mean_tokens
from sat_lightning.data.mixture import Mixture
from sat_lightning.data.store import TokenStore
from sat_lightning.errors import DataError
from sat_lightning.training.dataoptions import DataOptions


class DataFacts:
    """Sizes, names and limits of the opened splits of a data module."""

    path: object
    tokenizer: str
    sequence_length: int
    sources: Sequence[WeightedPath]
    options: DataOptions

    @property
    @abstractmethod
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer."""

    @property
    @abstractmethod
    def mixture(self) -> Mixture:
        """The stream of training samples."""

    @abstractmethod
    def _opened(self) -> dict[str, dict[str, Rows]]: ...

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
        """The largest id in any split, or for samples the tokenizer may give; 0 for datasets, which do not tell."""
        if self.options.samples is not None:
            return 0 if self.options.samples.image else self.text_tokenizer.vocab_size - 1
        return max((store.meta.max_token_id for split in self._opened() for store in self._stores(split)), default=0)

    @property
    def num_train_tokens(self) -> int:
        """Tokens in the rows of one training epoch, padding left out; of 1000 rows if epochs never end."""
        mixture, sources = self.mixture, self._opened()["train"].values()
        counts = mixture.counts(mixture.epoch_size or 1000)
        return round(sum(count * mean_tokens(rows) for count, rows in zip(counts, sources, strict=True)))

    @cached_property
    def label_names(self) -> list[str] | None:
        """The labels in the order of their numbers; None where rows have none."""
        samples = self.options.samples
        return None if samples is None or samples.label is None else Labels(samples.label, samples.labels).names

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
        samples = self.options.samples
        is_bound = not samples.image if samples is not None else self._stores("train")
        if self.sequence_length > max_sequence_length and is_bound:
            raise DataError(
                f"data: sequence_length={self.sequence_length} is longer than the model's "
                f"max_sequence_length={max_sequence_length}. Set data.sequence_length to at most "
                f"{max_sequence_length}, or the model's max_sequence_length to at least {self.sequence_length}."
            )

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
