"""The text families equal Hugging Face's on random weights, and come back byte for byte."""

import pytest
import torch

from tests.hf_parity import check_parity

transformers = pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def padded(side):
    """Return a padding mask `[b, s]`, the same under the causal mask `[b, 1, s, s]`, and positions."""
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[1, slice(7, None) if side == "right" else slice(None, 4)] = 0
    mask = padding[:, None, None, :].bool() & torch.ones(11, 11, dtype=torch.bool).tril()
    return padding, mask, (padding.cumsum(-1) - 1).clamp(min=0)


def check_decoder(build, **options):
    """Compare without padding, and with it on either side; a model once in bf16 keeps rounded frequencies."""
    check_parity(build(), {"input_ids": IDS}, lambda out: out.logits, **options)
    for side in ("right", "left"):
        padding, mask, positions = padded(side)
        check_parity(
            build(),
            {"input_ids": IDS, "attention_mask": padding, "position_ids": positions},
            lambda out: out.logits,
            our_kwargs={"input_ids": IDS, "attention_mask": mask, "position_ids": positions},
            visible=padding.bool(),
            bf16_atol=None,
            **options,
        )


LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
DECODERS = {
    "llama": ("Llama", {}),
    "llama tied, grouped": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "llama odd heads": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("Mistral", {"sliding_window": 4, "num_key_value_heads": 2}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 8, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "num_key_value_heads": 4},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_llama_and_its_relatives(name):
    family, options = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**(DECODER | options))
    check_decoder(lambda: getattr(transformers, f"{family}ForCausalLM")(config))
