"""Prompt tuning: embeddings of words that do not exist, in front of every sequence.

Legend: b batch, n prompt length, s sequence length, c hidden size, k key/value heads, d head size.

    prompt [n, c] ─┐
    input_ids [b, s] ─ words [b, s, c] ─┴─ [prompt | words] ─ layers ─ the n hidden states cut off ─ head [b, s, ..]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, HookError, InputError
from sat_lightning.hooks import non_conflict, passes_mask
from sat_lightning.mixins.local_attention import LocalAttentionMixin
from sat_lightning.mixins.prefix_tuning import PrefixTuningMixin
from sat_lightning.mixins.relative_bias import RelativeBiasMixin
from sat_lightning.mixins.tuning import TuningMixin
from sat_lightning.model import BaseMixin
from sat_lightning.nn.linear import normal_init

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel

_MEMORIES = ("cache", "mems", "past_key_values")


class PromptTuningMixin(TuningMixin):
    """Put `prompt_len` learned embeddings in front of the words (Lester et al. 2021, arXiv:2104.08691).

    The words' positions follow those of the prompt, masks make room, and what the prompt became is cut off before the
    head: a model returns as much as without it. Tables that are added whole (image models) give a prompt no positions
    (VPT-shallow, Jia et al. 2022, arXiv:2203.12119). It has no `scale`.

    A memory of earlier tokens cannot be given beside it, for then the prompt would be there again at every step: a
    causal model takes `folded(model)`, the same prompt as keys and values, and writes with any cache.

    Args:
        config: gives the width.
        prompt_len: n.
        init_token_ids: words with whose embeddings the prompt starts, over and over up to n, read when training
            begins (`reinit`). Default: random.
        keeps_prompt: whether it stays in what the model returns: for an encoder whose decoder is to read it.

    Raises:
        ConfigError: for a length below 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        prompt_len: int = 20,
        *,
        init_token_ids: Sequence[int] | None = None,
        keeps_prompt: bool = False,
    ) -> None:
        super().__init__()
        if prompt_len < 1:
            raise ConfigError(f"prompt_len is {prompt_len}, it must be at least 1.")
        if init_token_ids is not None and not len(init_token_ids):
            raise ConfigError("init_token_ids is empty: name words to start as, or leave it out to start at random.")
        self.config, self.prompt_len, self.keeps_prompt = config, prompt_len, keeps_prompt
        self.init_token_ids, self.num_kept_in_front = init_token_ids, prompt_len if keeps_prompt else 0
        self.prompt = nn.Parameter(torch.empty(prompt_len, config.hidden_size))
        normal_init(config.init_method_std)(self.prompt)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Start as words, if told which.

        Raises:
            ConfigError: if ZeRO-3 has split the words over the ranks.
        """
        if self.init_token_ids is not None:
            if hasattr(self.transformer.word_embeddings.weight, "ds_tensor"):
                raise ConfigError(
                    "init_token_ids: under ZeRO-3 no rank has the words whole. Start at random, or under zero_2."
                )
            ids = list(self.init_token_ids) * -(-self.prompt_len // len(self.init_token_ids))
            table = self.transformer.word_embeddings.weight
            with torch.no_grad():
                self.prompt.copy_(table[torch.tensor(ids[: self.prompt_len], device=table.device)])

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Tensor, output_cross_layer: dict[str, Any], *, old_impl: Callable[..., Tensor], **kw: Any
    ) -> Tensor:
        """Return `[b, n + s, c]`.

        Raises:
            InputError: if the call brings a memory of earlier tokens.
        """
        if given := [name for name in _MEMORIES if kw.get(name) is not None]:
            raise InputError(
                f"{given[0]} holds earlier tokens, and PromptTuningMixin would put its prompt between them and these. "
                "In a causal model put model.get_mixin(name).folded(model) in its place; others take no memory."
            )
        words = old_impl(input_ids, output_cross_layer=output_cross_layer, **kw)
        output_cross_layer["front_length"] = output_cross_layer.get("front_length", 0) + self.prompt_len
        if self.keeps_prompt:
            output_cross_layer["keeps_front"] = True
        return torch.cat([self.prompt.to(words.dtype).expand(words.shape[0], -1, -1), words], dim=1)

    @property
    def scale(self) -> float:
        """Always 1: half a word is none."""
        return 1.0

    @scale.setter
    def scale(self, value: float) -> None:
        raise HookError("PromptTuningMixin has no scale: an embedding times a number is another word. Disable it.")

    def folded(self, model: BaseModel) -> PrefixTuningMixin:
        """Return a prefix of the keys and values that this prompt has in every layer: put it in the place of this.

        In a causal model no word changes what the prompt is, so the two give the same logits.

        Args:
            model: the causal model that holds this mixin, and no other prompt.

        Raises:
            HookError: if it is not causal, so that the prompt reads the words, or its attention counts distances; or
                if it has another prompt, or this one is disabled.
        """
        if model.default_mask not in ("causal", -1):
            raise HookError(
                f"{type(model).__name__} is not causal: its prompt reads the words, and is no prefix. Keep the prompt."
            )
        prompts = [one for one in model.mixins.values() if isinstance(one, PromptTuningMixin) and one.enabled]
        if prompts != [self]:
            state = "is another prompt too, so that it stands elsewhere" if self in prompts else "is no such prompt"
            raise HookError(f"In this model there {state}. Enable this one in the model it belongs to, and no other.")
        for name, mixin in model.mixins.items():
            if isinstance(mixin, (LocalAttentionMixin, RelativeBiasMixin)):
                raise HookError(
                    f"'{name}', a {type(mixin).__name__}, asks how far behind a prompt is; a prefix is nowhere. "
                    "Keep the prompt."
                )
        result = PrefixTuningMixin(self.config, self.prompt_len, first_position=self.prompt_len)
        recorder, was_training = _Recorder(), model.training
        model.add_mixin("prompt-tuning-recorder", recorder)
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 1, dtype=torch.long, device=self.prompt.device))
        finally:
            model.train(was_training)
            model.del_mixin("prompt-tuning-recorder")
        with torch.no_grad():
            for prefix, (key, value) in zip(result.prefix, recorder.found, strict=True):
                prefix.copy_(torch.stack([key, value])[:, 0, :, : self.prompt_len])
        return result.to(self.prompt.device)


class _Recorder(BaseMixin):
    """Keep keys and values of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    @non_conflict
    @passes_mask
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        old_impl: Callable[..., Tensor],
        **kw: Any,
    ) -> Tensor:
        """Note and pass on."""
        if not kw.get("cross_attention"):
            self.found.append((key, value))
        return old_impl(query, key, value, *args, **kw)
