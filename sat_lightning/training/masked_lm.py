"""Tasks in which words of the input are hidden: guess them, or have a guessing model teach a smaller one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sat_lightning.data import IGNORED_TARGET
from sat_lightning.data.words import WordEdges
from sat_lightning.errors import ConfigError
from sat_lightning.training.masking import WordMasking
from sat_lightning.training.module import SATLightningModule
from sat_lightning.training.steps import Step
from sat_lightning.training.targets import hard_loss, hide_padding

Batch = dict[str, Tensor]


class MaskingTask(SATLightningModule):
    """A task that hides words, or with no `mask_token_id` leaves batches as they are.

    In training the device's own random numbers choose, which a resumed run continues. In evaluation a text decides what
    is hidden of it: the same words every time, in batches of any size, and on any number of ranks.

    Args:
        *args: of `SATLightningModule`.
        mask_token_id: what hidden words are shown as, most of the time; see `WordMasking`.
        mask_prob: share of the tokens that are to be guessed.
        special_token_ids: tokens that never are.
        whole_words: hide words as a whole, told apart by the tokenizer of the data module.
        **kwargs: of `SATLightningModule`.
    """

    #: That samples of rows are to come with a `token_mask`: an encoder would look at their padding.
    needs_token_mask: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        mask_token_id: int | None = None,
        mask_prob: float = 0.15,
        special_token_ids: Sequence[int] = (),
        whole_words: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._masking = None
        if mask_token_id is not None:
            self._masking = WordMasking(mask_token_id, mask_prob, special_token_ids)
        self._hides_whole_words = whole_words
        self._num_targets = torch.zeros(())

    def configure_model(self) -> None:
        """Build the model.

        Raises:
            ConfigError: the data let a token see only those before it.
        """
        super().configure_model()
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        samples = getattr(getattr(datamodule, "options", None), "samples", None)
        if self._masking is not None and samples is not None and samples.pack:
            raise ConfigError(
                f"{type(self).__name__}: samples.pack lets a token see only what is before it, and hidden words are "
                "guessed by what is around them. Remove samples.pack."
            )

    def count_targets(self, batch: Batch) -> Tensor:
        """Return how many words of the latest batch were to be guessed."""
        return self._num_targets

    def prepare(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        """Hide words, and count them.

        Args:
            batch: what the data module gives.

        Returns:
            Keywords of the model, and `target_ids` `[b, s]`.

        Raises:
            ConfigError: whole words are to be hidden, and no tokenizer tells them.
        """
        if self._masking is not None:
            if self._hides_whole_words and self._masking.edges is None and "word_ids" not in batch:
                self._masking.edges = self._find_edges()
            vocab_size = self._built_model().config.vocab_size
            batch = self._masking.hide(batch, vocab_size, is_fixed=not self.training)
        self._num_targets = (batch["target_ids"] != IGNORED_TARGET).sum()
        return {name: value for name, value in batch.items() if name != "target_ids"}, batch["target_ids"]

    def mean(self, total: Tensor) -> Tensor:
        """Divide a sum over the targets by their number; without a target it is 0."""
        return total / self._num_targets.clamp(min=1)

    def _find_edges(self) -> WordEdges:
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "text_tokenizer", None)
        if tokenizer is None:
            raise ConfigError("whole_words needs the tokenizer of a SATDataModule. Use one, or give batches word_ids.")
        return WordEdges(tokenizer, self._built_model().config.vocab_size)

    def summarise(self, stage: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the perplexity of the hidden words."""
        return {"perplexity": torch.exp(means.get("hard_loss", means["loss"]))}


class MaskedLanguageModelingTask(MaskingTask):
    """Guess hidden words: `{"input_ids": [b, s]}`, rows as for `LanguageModelingTask`, of which this hides some.

    Other entries of a batch (`attention_mask`, `token_type_ids`, ...) are keywords of the model; from an encoder is
    hidden what `token_mask` `[b, s]` leaves out; `word_ids` `[b, s]` let whole words be hidden. After validation and
    test it logs `<stage>_perplexity`, of the hidden words.

    Args:
        *args: of `SATLightningModule`.
        mask_token_id: of the mask, required.
        mask_prob: share of the tokens that are to be guessed.
        special_token_ids: tokens that never are.
        whole_words: see `MaskingTask`.
        **kwargs: of `SATLightningModule`.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        mask_token_id: int,
        mask_prob: float = 0.15,
        special_token_ids: Sequence[int] = (),
        whole_words: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(
            *args,
            mask_token_id=mask_token_id,
            mask_prob=mask_prob,
            special_token_ids=special_token_ids,
            whole_words=whole_words,
            **kwargs,
        )

    def forward_step(self, batch: Batch) -> Step:
        """Return the mean cross entropy over the hidden words.

        Args:
            batch: see the class.

        Returns:
            The loss, in nats per word.
        """
        model = self._built_model()
        inputs, target_ids = self.prepare(batch)
        inputs = hide_padding(model, inputs)
        if model.hooks.computes_loss:
            return self.mean(model(**inputs, target_ids=target_ids, loss_reduction="sum")[0])
        return self.mean(hard_loss(model(**inputs)[0], target_ids))
