"""A look at what the model writes."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sat_lightning.errors import ConfigError, InputError
from sat_lightning.generation import BaseStrategy, DecodingState, generate, sample_continuation, sample_token
from sat_lightning.generation.runner import longest_of
from sat_lightning.generation.shared_prompt import can_share
from sat_lightning.model import BaseModel
from sat_lightning.training.runs import is_trial, run_folder, write_whole


class SampleText(L.Callback):
    """Continue a prompt at the end of training, print the text, and keep it in `samples.txt` of the run's folder.

    The tokenizer is the data module's `text_tokenizer`. It works for any Lightning module whose `forward(input_ids)`
    returns logits `[b, s, v]`, or a list that begins with them. A `SATLightningModule` with a causal model that is
    neither compiled nor split remembers what it has read, as long as the text fits the context; the text is the same.

    Args:
        prompt: text to continue; if empty, a document is begun.
        num_tokens: how many to write.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens; None for all.
        context_length: how many of the latest tokens the model sees. Default: the data module's `sequence_length`.
        seed: of the draws, which are apart from the training's.
        every_validation: write after each validation too.
    """

    def __init__(
        self,
        prompt: str = "",
        num_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = 40,
        context_length: int | None = None,
        seed: int = 0,
        every_validation: bool = False,
    ) -> None:
        super().__init__()
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.context_length = context_length
        self.seed = seed
        self.every_validation = every_validation
        self._samples: dict[int, str] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out before the first step that there is no tokenizer or no context length.

        Raises:
            ConfigError: the data module has none.
        """
        if stage == "fit":
            self._tokenizer(trainer)
            self._context_length(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a sample of the training as it stands."""
        if self.every_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a sample of the trained model, unless the last validation did."""
        if trainer.global_step not in self._samples:
            self._write(trainer, pl_module)

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """Return the prompt and its continuation.

        Args:
            trainer: gives the tokenizer.
            pl_module: the model; it is left in the mode it was in.
        """
        tokenizer = self._tokenizer(trainer)
        prompt_ids = list(tokenizer.encode(self.prompt)) or [tokenizer.end_of_document_id]
        was_training = pl_module.training
        pl_module.eval()
        try:
            # Every rank draws the same, for a sharded model answers only to all.
            with trainer.precision_plugin.forward_context():
                ids = self._continue(
                    pl_module,
                    prompt_ids,
                    2 if is_trial(trainer) else self.num_tokens,
                    context_length=self._context_length(trainer),
                )
        finally:
            pl_module.train(was_training)
        return str(tokenizer.decode(ids[0].cpu()))

    def _continue(
        self, pl_module: L.LightningModule, ids: list[int], num_tokens: int, *, context_length: int
    ) -> Tensor:
        """Return the prompt and what follows it, `[1, n]`: from a cache while all of it is seen."""
        chance = torch.Generator(pl_module.device).manual_seed(self.seed)
        settings: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "generator": chance}
        model, written = _plain_model(pl_module), list[int]()
        if model is not None:
            room = min(context_length, longest_of(model) or context_length) - len(ids)
            try:
                written = _write(model, ids, min(num_tokens, room), settings)
            except InputError:  # a layer without a cache: read anew for each token
                chance.manual_seed(self.seed)
        return sample_continuation(
            _scorer(pl_module),
            torch.tensor([[*ids, *written]], device=pl_module.device),
            num_tokens - len(written),
            context_length=context_length,
            **settings,
        )

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sample = f"--- step {trainer.global_step} ---\n{self.sample(trainer, pl_module)}\n"
        self._samples[trainer.global_step] = sample
        folder = run_folder(trainer)
        trainer.print(f"\n{sample}")
        if trainer.is_global_zero and not is_trial(trainer):
            # A lone surrogate has no UTF-8 form, and must not stop the run at its end.
            write_whole(folder / "samples.txt", "\n".join(self._samples.values()).encode("utf-8", errors="replace"))

    @staticmethod
    def _tokenizer(trainer: L.Trainer) -> Any:  # noqa: ANN401 - anything with encode, decode and end_of_document_id
        tokenizer = getattr(getattr(trainer, "datamodule", None), "text_tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                "SampleText turns ids into text with the data module's text_tokenizer, and there is none. Use "
                "SATDataModule, or give your data module that property."
            )
        return tokenizer

    def _context_length(self, trainer: L.Trainer) -> int:
        length = self.context_length or getattr(getattr(trainer, "datamodule", None), "sequence_length", None)
        if length is None:
            raise ConfigError("SampleText: set context_length, for the data module has no sequence_length.")
        return int(length)


class _Drawing(BaseStrategy):
    """Draws as `sample_continuation` does, so that the text is the same with a cache and without."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(top_k=1)  # it needs no numbers prepared
        self.settings = settings

    def step(self, logits: Tensor, state: DecodingState) -> tuple[Tensor, DecodingState]:
        """Draw a token of each row."""
        return sample_token(logits, **self.settings), state


def _write(model: BaseModel, ids: list[int], num_tokens: int, settings: dict[str, Any]) -> list[int]:
    if num_tokens < 1:
        return []
    strategy = _Drawing(settings)
    return generate(model, [ids], strategy=strategy, max_new_tokens=num_tokens, pack_weights=False)[0].tokens


def _plain_model(pl_module: L.LightningModule) -> BaseModel | None:
    """Return the module's model where a cache can serve it, and adding one disturbs no compiler and no sharding."""
    from sat_lightning.training.module import SATLightningModule  # which brings callbacks along

    if not isinstance(pl_module, SATLightningModule) or type(pl_module).forward is not SATLightningModule.forward:
        return None
    model = pl_module.model
    if not isinstance(model, BaseModel) or not can_share(model):
        return None
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return None
    is_whole = all(type(parameter) is torch.nn.Parameter and parameter.numel() for parameter in model.parameters())
    return model if is_whole else None


def _scorer(pl_module: L.LightningModule) -> Callable[[Tensor], Tensor]:
    def score(input_ids: Tensor) -> Tensor:
        outputs = pl_module(input_ids)
        return outputs[0] if isinstance(outputs, list | tuple) else outputs

    return score
