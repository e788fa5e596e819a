"""The contestants of the training step: one architecture, one set of weights, four implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of its batch."""

    num_layers: int = 6
    hidden_size: int = 384
    num_attention_heads: int = 6
    vocab_size: int = 8192
    length: int = 256
    batch_size: int = 8

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward: the linears, and the visible half of causal attention."""
        weights = self.num_layers * 12 * self.hidden_size**2 + self.vocab_size * self.hidden_size
        scores = self.num_layers * self.batch_size * self.length**2 * self.hidden_size
        return 6.0 * self.num_tokens * weights + 6.0 * scores


class PlainLayer(nn.Module):
    """A layer of plain PyTorch: fused GELU, fused attention, no options."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv, self.out = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 in the manner of nanoGPT; its head is untied, as ours is, so that all compute the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.length, shape.hidden_size)
        self.layers = nn.ModuleList(
            PlainLayer(shape.hidden_size, shape.num_attention_heads) for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), target_ids.flatten())


#: Module of `PlainGPT` -> the same module of the others; `{}` is the layer.
SAT_NAMES = {
    "words": "transformer.word_embeddings",
    "positions": "transformer.position_embeddings",
    "norm": "transformer.final_layernorm",
    "head": "mixins.gpt2-final.lm_head",
    "layers.{}.norm_1": "transformer.layers.{}.input_layernorm",
    "layers.{}.norm_2": "transformer.layers.{}.post_attention_layernorm",
    "layers.{}.qkv": "transformer.layers.{}.attention.query_key_value",
    "layers.{}.out": "transformer.layers.{}.attention.dense",
    "layers.{}.up": "transformer.layers.{}.mlp.dense_h_to_4h",
    "layers.{}.down": "transformer.layers.{}.mlp.dense_4h_to_h",
}
HUGGING_FACE_NAMES = {
    "words": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "layers.{}.norm_1": "transformer.h.{}.ln_1",
    "layers.{}.norm_2": "transformer.h.{}.ln_2",
    "layers.{}.qkv": "transformer.h.{}.attn.c_attn",
    "layers.{}.out": "transformer.h.{}.attn.c_proj",
    "layers.{}.up": "transformer.h.{}.mlp.c_fc",
    "layers.{}.down": "transformer.h.{}.mlp.c_proj",
}


def plain(shape: Shape) -> tuple[nn.Module, Loss]:
    model = PlainGPT(shape)
    return model, model


def sat_lightning(shape: Shape) -> tuple[nn.Module, Loss]:
    from sat_lightning import TransformerConfig
    from sat_lightning.models import GPT2Model

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.length,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model = GPT2Model(config)
    _copy_weights(shape, model, SAT_NAMES)
    return model, lambda input_ids, target_ids: model(input_ids, target_ids=target_ids)[0]


def hugging_face(shape: Shape) -> tuple[nn.Module, Loss]:
    """The library's defaults: GELU written out, its own loss, a key/value cache kept."""
    model = _hugging_face_model(shape, "gelu_new")

    def loss(input_ids: Tensor, target_ids: Tensor) -> Tensor:
        return model(input_ids, labels=target_ids, shift_labels=target_ids).loss

    return model, loss


def hugging_face_tuned(shape: Shape) -> tuple[nn.Module, Loss]:
    """The same with the fused GELU, PyTorch's loss and no cache."""
    model = _hugging_face_model(shape, "gelu_pytorch_tanh")

    def loss(input_ids: Tensor, target_ids: Tensor) -> Tensor:
        logits = model(input_ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())

    return model, loss


PEERS: dict[str, Callable[[Shape], tuple[nn.Module, Loss]]] = {
    "sat_lightning": sat_lightning,
    "plain PyTorch (nanoGPT style)": plain,
    "transformers, tuned": hugging_face_tuned,
    "transformers, default": hugging_face,
}
#: Short names for the command line.
ALIASES = dict(zip(("ours", "plain", "hf-tuned", "hf"), PEERS, strict=True))


def _hugging_face_model(shape: Shape, activation: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape.num_layers, n_embd=shape.hidden_size, n_head=shape.num_attention_heads,
        vocab_size=shape.vocab_size, n_positions=shape.length, activation_function=activation,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    _copy_weights(shape, model, HUGGING_FACE_NAMES)
    return model


def _copy_weights(shape: Shape, model: nn.Module, names: dict[str, str]) -> None:
    """Give `model` the weights of a `PlainGPT` of the same seed, so that every contestant has the same loss."""
    torch.manual_seed(0)
    source = PlainGPT(shape)
    with torch.no_grad():
        for name, other in names.items():
            for layer_id in range(shape.num_layers) if "{}" in name else [0]:
                theirs = dict(model.get_submodule(other.format(layer_id)).named_parameters())
                for key, value in source.get_submodule(name.format(layer_id)).named_parameters():
                    # transformers keeps the weights of its linears transposed.
                    is_transposed = (
                        key == "weight" and type(model.get_submodule(other.format(layer_id))).__name__ == "Conv1D"
                    )
                    theirs[key].copy_(value.t() if is_transposed else value)
