"""Hugging Face both ways: equal outputs, and every byte comes back."""

import pytest
import torch

from tests.hf_parity import check_parity

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("is_tied", [False, True])
def test_gpt2_equals_hugging_face_and_comes_back(is_tied):
    config = transformers.GPT2Config(
        n_layer=2, n_embd=36, n_head=3, n_inner=50, vocab_size=97, n_positions=24, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=is_tied, attn_implementation="eager",
    )  # fmt: skip
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    check_parity(transformers.GPT2LMHeadModel(config), {"input_ids": ids}, lambda out: out.logits)
