"""One tiny example of every family, for matrices of families and whatever they must bear.

A row knows how to build its model with any option changed, and how to call it. Import `FAMILIES`; add a row, and every
matrix tests it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sat_lightning import models
from sat_lightning.model import AnyModel

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 60, "max_sequence_length": 24}
MODERN = {"use_bias": False, "inner_hidden_size": 40, "layernorm_epsilon": 1e-6}
NEW = {**MODERN, "is_rotary_emb": True, "is_gated_mlp": True}


def ids(batch: int = 2, length: int = 9, low: int = 5, high: int = 60, seed: int = 0) -> Tensor:
    """Return token ids `[batch, length]`, from 5 on so that special ones are placed on purpose only."""
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def embed(model: Any, input_ids: Tensor, **kw: Any) -> Tensor:
    """Return what the first layer of a model without position ids receives."""
    words = model.hooks.word_embedding_forward(input_ids, output_cross_layer={}, **kw)
    return model.transformer.add_positions(words, None, {}, model.hooks, **kw)


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    class_name: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[int], dict[str, Any]] = lambda seed: {"input_ids": ids(seed=seed)}
    """Seed -> keywords of a call."""
    result: Callable[[Any], Tensor] = lambda returned: returned[0]
    """What the model returned -> one tensor that depends on everything."""
    is_causal: bool = False
    """Whether no token's result depends on a later one, when only ids are given."""

    def build(self, **changes: Any) -> AnyModel:
        """Build the model with random weights, large enough that a fault shows."""
        torch.manual_seed(0)
        cls = getattr(models, self.class_name)
        model = cls(cls.config_class(**(SIZES | self.options | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def run(self, model: Any, seed: int = 0, **more: Any) -> Tensor:
        """Call the model and return its result."""
        return self.result(model(**self.inputs(seed), **more))


def _chat(seed: int) -> dict[str, Any]:
    """Two conversations, one padded on the left: 3 is padding, 1 a blank, 2 begins the answer."""
    input_ids = ids(seed=seed)
    input_ids[0, 4:6], input_ids[1, :2], input_ids[1, 5:7] = torch.tensor([1, 2]), 3, torch.tensor([1, 2])
    return {"input_ids": input_ids}


def _typed(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed=seed), "token_type_ids": ids(low=0, high=2, seed=seed)}


def _pair(seed: int) -> dict[str, Any]:
    return {"enc_input_ids": ids(seed=seed), "dec_input_ids": ids(length=7, seed=seed + 1)}


def _image(seed: int) -> dict[str, Any]:
    return {"image": torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(seed))}


def _noisy(seed: int) -> dict[str, Any]:
    return {**_image(seed), "noise": torch.rand(2, 6, generator=torch.Generator().manual_seed(seed))}


def _captioned(seed: int) -> dict[str, Any]:
    text = ids(3, 9, seed=seed)
    text[:, 6] = 7
    return {**_image(seed), "text_input_ids": text}


def _compared(returned: Any) -> Tensor:
    """Vectors and similarities: these can be near 0 where those are not, and are as exact as those."""
    return torch.cat([tensor.flatten() for tensor in returned[:3]])


def _found(returned: Any) -> Tensor:
    return torch.cat([returned[0]["pred_logits"], returned[0]["pred_boxes"]], dim=-1)


def _masked_image(seed: int) -> dict[str, Any]:
    """Three of six patches of each image are masked."""
    order = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return {**_image(seed), "bool_masked_pos": order < 3, "num_masked_pos": 6}


def _seen(seed: int) -> dict[str, Any]:
    """Two conversations with one image each, of one feature between its begin and its end."""
    mask = torch.zeros(2, 9, dtype=torch.long)
    mask[0, 1:4], mask[1, 4:7] = 1, 1
    return {"input_ids": ids(seed=seed), "image_embed_mask": mask, "vision_image": _image(seed)["image"]}


def _all_scores(returned: Any) -> Tensor:
    return torch.cat([scores.flatten() for scores in returned[0]])


CHAT = {"bos_token_id": 2, "mask_token_id": 4, "gmask_token_id": 1, "pad_token_id": 3}
CHAT2 = {**MODERN, "use_qkv_bias": True, "num_multi_query_heads": 2}
IMAGE = {"vocab_size": 2, "image_size": [12, 8], "patch_size": 4}
TWO_IMAGES = {"layout": [1, 5, 9], "new_sequence_length": 29, "kernel_size": 2, "kernel_size2": 1}
CLIP = {
    "vocab_size": 1, "projection_dim": 10, "text_num_layers": 1, "text_hidden_size": 24, "text_num_attention_heads": 3,
    "text_vocab_size": 60, "text_max_sequence_length": 12, "logit_scale_init_value": 0.0,
}  # fmt: skip
MAE = {"vocab_size": 1, "dec_num_layers": 1, "dec_hidden_size": 24, "dec_num_attention_heads": 3}
YOLOS = {"num_det_tokens": 3, "num_det_classes": 5}
EVA = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "vocab_size": 1}
SECOND = {"inputs": _pair, "result": lambda returned: returned[1]}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2Model", is_causal=True),
    "gptneo": Family("GPTNeoModel", {"window_size": 3}, is_causal=True),
    "bert": Family("BertModel", {"num_types": 3}, _typed),
    "roberta": Family("RobertaModel"),
    "dpr-question": Family("DPRQuestionEncoder", inputs=_typed),
    "dpr-context": Family("DPRContextEncoder", inputs=_typed),
    "dpr-reader": Family("DPRReader", inputs=_typed, result=_all_scores),
    "glm": Family("GLMModel"),
    "glm-blank": Family("GLMModel", {"sop_token_id": 2, "mask_token_ids": (1,)}, _chat),
    "glm130b": Family("GLM130B", {"inner_hidden_size": 40}, is_causal=True),
    "glm130b-2d": Family("GLM130B", {"position_encoding_2d": True, "no_glu": True}, is_causal=True),
    "chatglm": Family("ChatGLMModel", CHAT, _chat),
    "chatglm2": Family("ChatGLM2Model", CHAT2, is_causal=True),
    "chatglm3": Family("ChatGLM3Model", {**CHAT2, "base_scale": 3.0}, is_causal=True),
    "chatglm4": Family("ChatGLM4Model", {**CHAT2, "is_gated_mlp": True}, is_causal=True),
    "llama-old": Family("LLaMAModel", MODERN, is_causal=True),
    "llama": Family("LLaMAModel", {**NEW, "num_multi_query_heads": 2}, is_causal=True),
    "llama3": Family(
        "LLaMAModel",
        {
            **NEW,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
        },
        is_causal=True,
    ),
    "mistral": Family("LLaMAModel", {**NEW, "num_multi_query_heads": 2, "sliding_window": 4}, is_causal=True),
    "qwen2": Family("LLaMAModel", {**NEW, "use_qkv_bias": True, "num_multi_query_heads": 2}, is_causal=True),
    "qwen3": Family(
        "LLaMAModel",
        {
            **NEW,
            "has_qk_norm": True,
            "hidden_size_per_attention_head": 12,
            "rotary_dim": 12,
            "num_multi_query_heads": 1,
        },
        is_causal=True,
    ),
    "mixtral": Family(
        "MixtralModel",
        {**MODERN, "is_gated_mlp": True, "num_experts": 4, "num_experts_per_tok": 2, "num_multi_query_heads": 2},
        is_causal=True,
    ),
    "cuda2d": Family("Cuda2dModel", {**TWO_IMAGES, "layernorm_order": "sandwich"}, is_causal=True),
    "encoder-decoder": Family("EncoderDecoderModel", {"dec_num_layers": 1}, **SECOND),
    "t5": Family("T5Model", {"relative_attention_num_buckets": 8, "inner_hidden_size": 40}, **SECOND),
    "t5-gated": Family(
        "T5Model",
        {
            "relative_attention_num_buckets": 8,
            "gated_gelu_mlp": True,
            "no_share_embeddings": True,
            "hidden_size_per_attention_head": 6,
            "cross_hidden_size_per_attention_head": 6,
        },
        **SECOND,
    ),
    "vit": Family("ViTModel", {**IMAGE, "num_classes": 5}, _image),
    "deit": Family("ViTModel", {**IMAGE, "num_classes": 5, "pre_len": 2}, _image),
    "yolos": Family("YOLOS", {**IMAGE, **YOLOS}, _image, _found),
    "clip": Family("CLIP", {**IMAGE, **CLIP}, _captioned, _compared),
    "clip-ends": Family(
        "CLIP",
        {**IMAGE, **CLIP, "text_end_token_id": 7, "hidden_act": "gelu", "text_num_layers": 2},
        _captioned,
        _compared,
    ),
    "mae": Family("MAE", {**IMAGE, **MAE}, _noisy, lambda returned: returned[1]),
    "mae-exact": Family(
        "MAE", {**IMAGE, **MAE, "dec_hidden_act": "gelu", "mask_ratio": 0.3}, _noisy, lambda returned: returned[1]
    ),
    "yolos-mid": Family("YOLOS", {**IMAGE, **YOLOS, "has_mid_positions": True}, _image, _found),
    "eva2": Family("EVA2Model", {**IMAGE, "vocab_size": 1, "predict_feature_dim": 7}, _masked_image),
    "eva2clip": Family("EVA2CLIPModel", {**IMAGE, "use_final_layernorm": False}, _image),
    "cait": Family(
        "CaiT",
        {**IMAGE, "num_classes": 5, "dec_num_layers": 1, "init_scale": 0.5},
        _image,
        lambda returned: returned[1],
    ),
    "glm4v": Family(
        "GLM4VModel",
        {
            **CHAT2,
            "is_gated_mlp": True,
            "proj_hidden_size": 20,
            "eva_args": {**EVA, "image_size": [12, 8], "patch_size": 4, "use_final_layernorm": False},
        },
        _seen,
        is_causal=True,
    ),
}
