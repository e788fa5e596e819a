from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sat_lightning import BaseMixin, BaseModel, TransformerConfig, non_conflict
from sat_lightning.models import GPT2Model
from sat_lightning.training import OptimConfig
from sat_lightning.training.flops import count_flops
from tests.training_examples import SIZES, counting_loader, make_model, make_task, make_trainer

HIDDEN, LENGTH, NUM_ROWS = 32, 12, 3


class LowRankMixin(BaseMixin):
    """A product of two thin matrices beside every linear, as raw parameters, and a prefix nobody multiplies by."""

    def __init__(self, config: TransformerConfig, rank: int = 4) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, config.hidden_size))
        self.up = torch.nn.Parameter(torch.randn(config.hidden_size, rank))
        self.prefix = torch.nn.Parameter(torch.randn(2, 1, 3, 4))

    @non_conflict
    def mlp_forward(self, hidden_states: Any, old_impl: Any = None, **kw: Any) -> Any:
        return old_impl(hidden_states, **kw) + hidden_states @ self.down.T @ self.up.T


def make(model_class: type[BaseModel] = BaseModel, **changes: Any) -> BaseModel:
    # Written out, so that the counter sees every product; its own rule for fused attention counts a kernel's work.
    return model_class(TransformerConfig(**{**SIZES, "attention_backend": "eager", **changes}))


def counted(model: BaseModel, is_training: bool = True) -> int:
    """What torch counts while the batch runs, with the head's logits built."""
    input_ids = torch.randint(0, SIZES["vocab_size"], (NUM_ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(is_training):
        loss = model(input_ids)[0].float().logsumexp(-1).sum()
        if is_training:
            loss.backward()
    return counter.get_total_flops()


def ours(model: BaseModel, is_training: bool = True) -> int:
    return count_flops(model, NUM_ROWS, LENGTH, is_training=is_training)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_multi_query_heads=1, is_rotary_emb=True),
        dict(is_gated_mlp=True, inner_hidden_size=48, layernorm_order="sandwich"),
        dict(hidden_size_per_attention_head=24, use_bias=False),
        dict(num_experts=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_training", [True, False])
def test_equals_what_torch_counts(changes: dict, is_training: bool) -> None:
    """The plain model: full attention, and a head tied to the embedding."""
    model = make(**changes)
    assert ours(model, is_training) == counted(model, is_training)


def test_a_causal_family_is_credited_with_what_a_query_may_see() -> None:
    model = make(GPT2Model)
    unseen = LENGTH - (LENGTH + 1) / 2
    width = SIZES["num_layers"] * HIDDEN
    assert ours(model, False) == counted(model, False) - NUM_ROWS * LENGTH * 4 * width * unseen
    assert ours(model) == counted(model) - 3 * NUM_ROWS * LENGTH * 4 * width * unseen


@pytest.mark.parametrize(
    ("trained", "is_exact"),
    [
        (["transformer.layers", "final_layernorm", "mixins"], True),  # the embeddings are frozen
        (["lm_head"], True),
        (["final_layernorm", "lm_head"], True),
        (["layers.1.", "final_layernorm", "lm_head"], True),  # the first layer runs forwards only
        (["transformer", "embeddings"], True),  # a frozen head still passes gradients on
        (["mixins.low"], False),
        ([], True),
    ],
)
def test_what_is_frozen_has_no_gradient(trained: list[str], is_exact: bool) -> None:
    model = make(GPT2Model)
    model.default_mask = None  # type: ignore[misc]
    model.add_mixin("low", LowRankMixin(model.config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in trained))
    # The low-rank pair serves two layers, and is counted once: four thin products of one layer are lacking.
    shared = NUM_ROWS * LENGTH * 2 * 2 * 4 * HIDDEN
    number = counted(model, is_training=bool(trained))
    if is_exact:
        assert number - 3 * shared <= ours(model, is_training=bool(trained)) <= number - shared
    else:
        # Of the first layer only the part behind the mixin needs gradients, and it is counted whole.
        assert number < ours(model) < 1.4 * number


def test_the_module_counts_its_latest_batch() -> None:
    task = make_task(make_model(num_layers=1), optim=OptimConfig(learning_rate=0.01))
    trainer = make_trainer(1)
    trainer.fit(task, counting_loader(batch_size=4))
    length, vocabulary, num_tokens = 16, 17, 4 * 16
    forward = 2 * (12 * HIDDEN * HIDDEN + HIDDEN * vocabulary) + 4 * (length + 1) / 2 * HIDDEN
    trainer.training = True
    assert task.flops_per_batch == 3 * forward * num_tokens
    task.model.transformer.requires_grad_(False)
    assert task.flops_per_batch == 3 * forward * num_tokens  # told once an epoch, when callbacks freeze and unfreeze
    task.on_train_epoch_start()
    assert task.flops_per_batch == (forward + 2 * HIDDEN * vocabulary) * num_tokens
    trainer.validating = True
    assert task.flops_per_batch == forward * num_tokens
