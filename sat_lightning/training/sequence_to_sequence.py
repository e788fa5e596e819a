"""Read one text and write another.

Legend: b batch, s length of what is read, t of what is written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sat_lightning.checkpoint.split import is_split
from sat_lightning.data import IGNORED_TARGET
from sat_lightning.errors import ConfigError
from sat_lightning.generation import generate
from sat_lightning.model import EncoderDecoderModel
from sat_lightning.training.finite import read_highest, sum_over_ranks
from sat_lightning.training.module import SATLightningModule
from sat_lightning.training.steps import Step
from sat_lightning.training.targets import hard_loss, mean_over_targets

Batch = dict[str, Tensor]


class SequenceToSequenceTask(SATLightningModule):
    """Teach an `EncoderDecoderModel`: `{"input_ids": [b, s], "attention_mask": [b, s], "target_ids": [b, t]}`.

    The targets are not shifted, and -100 where there is none; the decoder reads `decoder_start_id` and all targets but
    the last. In validation and test the model also writes answers to the first batches, token by token the most likely
    one: `<stage>_exact_match` is the share of rows in which every target is met, `<stage>_rouge_l` the mean F1 of the
    longest common subsequence of tokens (Lin 2004), the end left out, and what is longer than the targets cut off.

    Args:
        *args: of `SATLightningModule`.
        decoder_start_id: what the decoder reads first; T5's is 0.
        end_token_id: what ends an answer; T5's is 1.
        num_written_batches: batches of each evaluation, and on each rank, that are answered; 0 for none. Under ZeRO-3
            every rank takes as many steps as the one with the longest targets, and gathers the weights in each.
        **kwargs: of `SATLightningModule`.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        decoder_start_id: int = 0,
        end_token_id: int = 1,
        num_written_batches: int = 2,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self.decoder_start_id, self.end_token_id = decoder_start_id, end_token_id
        self.num_written_batches = num_written_batches
        self._scores = [0.0, 0.0, 0.0]  # exact matches, sum of ROUGE-L, rows

    def configure_model(self) -> None:
        """Build the model.

        Raises:
            ConfigError: it has no encoder and decoder.
        """
        super().configure_model()
        if not isinstance(model := self._built_model(), EncoderDecoderModel):
            raise ConfigError(
                f"SequenceToSequenceTask: the model is a {type(model).__name__}. Build a T5Model or another "
                "EncoderDecoderModel, or take LanguageModelingTask."
            )

    def forward_step(self, batch: Batch) -> Step:
        """Return the mean cross entropy over the targets.

        Args:
            batch: see the class.

        Returns:
            The loss, in nats per token.
        """
        target_ids = batch["target_ids"]
        start = torch.full_like(target_ids[:, :1], self.decoder_start_id)
        dec_input_ids = torch.cat([start, target_ids[:, :-1].clamp(min=0)], 1)  # what follows a -100 is none either
        inputs = {
            "enc_input_ids": batch["input_ids"],
            "dec_input_ids": dec_input_ids,
            "enc_attention_mask": batch.get("attention_mask"),
            "enc_token_indices": batch.get("enc_token_indices"),
            "dec_token_indices": batch.get("dec_token_indices"),
        }
        logits = self._built_model()(**inputs)[1]
        return mean_over_targets(hard_loss(logits, target_ids), target_ids != IGNORED_TARGET)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the means of the epoch, and write answers to the first ones."""
        super().validation_step(batch, batch_idx, dataloader_idx)
        self._score(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        super().test_step(batch, batch_idx, dataloader_idx)
        self._score(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Write answers.

        Args:
            batch: see the class.
            batch_idx: unused.
            dataloader_idx: unused.

        Returns:
            `token_ids`, `[b, t]`, -100 behind the end of each.
        """
        rows = self.write(batch)
        return {"token_ids": torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=IGNORED_TARGET
        )}  # fmt: skip

    def write(self, batch: Batch) -> list[list[int]]:
        """Answer each row by the most likely tokens, no more than its targets have room for.

        Args:
            batch: see the class.

        Returns:
            Ids without the end.
        """
        model, most = self._built_model(), batch["target_ids"].shape[1]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        length, ends = most, [self.end_token_id]
        if are_together := any(is_split(parameter) for parameter in model.parameters()):
            # Ranks that hold pieces of one model take each step together, and none ends before the others.
            (length,), ends = read_highest([torch.full((1,), most, dtype=torch.int32, device=self.device)]), []
        written = generate(
            model,
            [row[seen] for row, seen in zip(batch["input_ids"], mask, strict=True)],
            decoder_start=(self.decoder_start_id,),
            max_new_tokens=length,
            end_tokens=ends,
            pack_weights=False if are_together else None,
        )
        return [self._without_end(row.tokens[:most]) for row in written]

    def on_validation_epoch_end(self) -> None:
        """Log the means of the epoch, and how the answers were."""
        super().on_validation_epoch_end()
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        super().on_test_epoch_end()
        self._log_scores("test")

    def _score(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx >= self.num_written_batches:
            return
        expected = [self._without_end([token for token in row if token >= 0]) for row in batch["target_ids"].tolist()]
        num_targets = (batch["target_ids"] != IGNORED_TARGET).sum(1).tolist()
        for written, right, room in zip(self.write(batch), expected, num_targets, strict=True):
            if room:
                own = written[:room]  # what other rows of the batch have room for is no matter
                values = (float(own == right), rouge_l(own, right), 1.0)
                self._scores = [total + value for total, value in zip(self._scores, values, strict=True)]

    def _log_scores(self, stage: str) -> None:
        numbers, self._scores = torch.tensor(self._scores, device=self.device), [0.0, 0.0, 0.0]
        exact, overlap, rows = sum_over_ranks(numbers, self.trainer.strategy).unbind()
        if self.num_written_batches and rows > 0:
            scores = {f"{stage}_exact_match": exact / rows, f"{stage}_rouge_l": overlap / rows}
            self.log_dict(scores, prog_bar=True, batch_size=1)

    def _without_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.end_token_id)] if self.end_token_id in tokens else tokens


def rouge_l(written: Sequence[int], expected: Sequence[int]) -> float:
    """Return F1 of the longest common subsequence: 1 for equal texts, 0 where nothing is common.

    Args:
        written: tokens.
        expected: the right ones.
    """
    if not written or not expected:
        return float(not written and not expected)
    lengths = [0] * (len(expected) + 1)
    for token in written:
        diagonal = 0
        for column, other in enumerate(expected, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if token == other else max(above, lengths[column - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(written) + len(expected))
