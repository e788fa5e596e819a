"""What a mixture really gave, against what was asked for."""

import csv
import io
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from sat_lightning.data.batches import Place
from sat_lightning.data.lengths import tells_lengths
from sat_lightning.data.mixed import MixedRows, count_tokens, estimate_tokens
from sat_lightning.data.mixture import Mixture
from sat_lightning.errors import ConfigError
from sat_lightning.training.runs import is_logging_step, is_trial, run_folder, write_whole

COLUMNS = (
    *("source", "samples", "tokens", "epochs"),
    *(f"{which}_{what}_share" for what in ("sample", "token") for which in ("requested", "achieved")),
)


class MixtureMonitor(L.Callback):
    """Count the samples and tokens of every source that were trained on; log their shares and write them at the end.

    Logged are `mixture_samples/<source>`, `mixture_tokens/<source>` (shares so far, over all ranks) and
    `mixture_epochs/<source>`, every `log_every_n_steps`; written is `mixture.csv` in the run's folder. The counts go on
    in a resumed run. Tokens are left out if a source does not tell them, or only by reading all of its samples, which
    is not done for this alone: a share by `tokens`, `bucket_size` or `max_tokens` has them counted.

    Args:
        file_name: of the table.
    """

    def __init__(self, file_name: str = "mixture.csv") -> None:
        super().__init__()
        self.file_name = file_name
        self._counts = np.zeros((2, 0), dtype=np.int64)  # samples and tokens of each source
        self._pending = self._counts
        self._place = Place()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out before the first step that the data module mixes nothing.

        Raises:
            ConfigError: it is no `SATDataModule`.
        """
        if stage != "fit":
            return
        if not hasattr(getattr(trainer, "datamodule", None), "mixture"):
            raise ConfigError("MixtureMonitor needs a SATDataModule. Use one, or remove it from trainer.callbacks.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look the mixture up, and go on counting where the checkpoint stopped."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._rows: MixedRows = datamodule.mixed_rows
        self._mixture: Mixture = datamodule.mixture
        if self._counts.shape[1] != len(self._rows.sources):
            self._counts = np.zeros((2, len(self._rows.sources)), dtype=np.int64)
        self._pending = np.zeros_like(self._counts)
        self._place = datamodule.progress.now()
        # Samples that nobody has counted yet would all have to be read for this.
        is_known = all(tells_lengths(source) for source in self._rows.sources)
        exact = self._mixture.mean_tokens
        self._means = exact or ([estimate_tokens(source) for source in self._rows.sources] if is_known else None)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Count a step of all ranks, and log when it is time."""
        progress = trainer.datamodule.progress  # type: ignore[attr-defined]
        before = progress.before(1)
        if before is None:
            return
        place, batches = before
        owners, rows = self._mixture(batches.positions(place))
        self._pending[0] += np.bincount(owners, minlength=self._pending.shape[1])
        if self._means is not None:
            for owner, row in zip(owners.tolist(), rows.tolist(), strict=True):
                self._pending[1, owner] += count_tokens(self._rows.sources[owner], row)
        # A window of accumulated batches that was begun is begun anew in a resumed run, and must not count twice.
        if (now := progress.now()) != self._place:
            self._place = now
            self._counts = self._counts + self._pending
            self._pending = np.zeros_like(self._counts)
            if is_logging_step(trainer):
                self._log(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the table of what was trained on."""
        if self._counts.any():
            self._write(trainer)

    def table(self) -> list[dict[str, Any]]:
        """Return requested and achieved shares.

        Returns:
            For each source the values of `COLUMNS`; those of tokens are None if a source does not tell them.
        """
        samples, tokens = self._counts
        wanted = [float(share) for share in self._mixture.requested]
        has_tokens = self._means is not None
        wanted_tokens = np.multiply(wanted, self._means if self._means is not None else 0.0)
        rows = []
        for number, name in enumerate(self._mixture.names):
            values = [name, int(samples[number]), int(tokens[number]) if has_tokens else None]
            values += [float(samples[number] / self._mixture.sizes[number])]
            values += [wanted[number], float(samples[number] / max(1, samples.sum()))]
            if has_tokens:
                values += [float(wanted_tokens[number] / wanted_tokens.sum())]
                values += [float(tokens[number] / max(1, tokens.sum()))]
            else:
                values += [None, None]
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"counts": self._counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting.

        Args:
            state_dict: what `state_dict` gave.
        """
        self._counts = np.array(state_dict["counts"], dtype=np.int64).reshape(2, -1)

    def _log(self, pl_module: L.LightningModule) -> None:
        for row in self.table():
            for what, key in (
                ("samples", "achieved_sample_share"),
                ("tokens", "achieved_token_share"),
                ("epochs",) * 2,
            ):
                if row[key] is not None:
                    pl_module.log(f"mixture_{what}/{row['source']}", row[key], batch_size=1)

    def _write(self, trainer: L.Trainer) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and not is_trial(trainer):
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.table())
            write_whole(folder / self.file_name, text.getvalue().encode())
            rank_zero_info(f"Mixture: {folder / self.file_name}")
