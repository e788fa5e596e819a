"""Named sizes of the families, as data: architectures only, no weights.

from sat_lightning.models import LLaMAModel, preset

model = LLaMAModel(preset("llama-2-7b", num_layers=4))
"""

from __future__ import annotations

from typing import Any

from sat_lightning import models
from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError, nearest

Options = dict[str, Any]


def _sizes(num_layers: int, hidden_size: int, num_attention_heads: int, **more: Any) -> Options:
    shape = {"num_layers": num_layers, "hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
    return {**shape, **more}


def _inner(size: int, groups: int = 0) -> Options:
    return {"inner_hidden_size": size, "num_multi_query_heads": groups}


_GPT2: Options = {"vocab_size": 50257, "max_sequence_length": 1024}
_NEO: Options = {"vocab_size": 50257, "max_sequence_length": 2048, "window_size": 256}
_BERT: Options = {"vocab_size": 30522, "max_sequence_length": 512, "layernorm_epsilon": 1e-12, "num_types": 2}
_ROBERTA: Options = {"vocab_size": 50265, "max_sequence_length": 514, "layernorm_epsilon": 1e-5}
_LLAMA: Options = {
    "vocab_size": 32000,
    "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-6,
    "use_bias": False,
    "is_rotary_emb": True,
    "is_gated_mlp": True,
}
_LLAMA2: Options = {**_LLAMA, "max_sequence_length": 4096, "layernorm_epsilon": 1e-5}
_LLAMA3: Options = {**_LLAMA2, "vocab_size": 128256, "max_sequence_length": 8192, "rotary_base": 500000.0}
_QWEN2: Options = {**_LLAMA, "vocab_size": 151936, "rotary_base": 1e6, "use_qkv_bias": True}
_QWEN3: Options = {
    **_LLAMA,
    "vocab_size": 151936,
    "rotary_base": 1e6,
    "max_sequence_length": 40960,
    "has_qk_norm": True,
    "hidden_size_per_attention_head": 128,
    "rotary_dim": 128,
}
_VIT: Options = {"image_size": [224, 224], "patch_size": 16, "layernorm_epsilon": 1e-12}
_YOLOS: Options = {**_VIT, "num_det_tokens": 100, "num_det_classes": 92}
_CLIP: Options = {
    "projection_dim": 512, "text_num_layers": 12, "text_hidden_size": 512, "text_num_attention_heads": 8,
    "text_vocab_size": 49408, "text_max_sequence_length": 77, "text_end_token_id": "largest",
}  # fmt: skip
_CLIP_LARGE: Options = {
    **_CLIP, "projection_dim": 768, "text_hidden_size": 768, "text_num_attention_heads": 12, "patch_size": 14,
}  # fmt: skip
_MAE: Options = {**_VIT, "dec_num_layers": 8, "dec_hidden_size": 512, "dec_num_attention_heads": 16}
_T5: Options = {"vocab_size": 32128, "relative_attention_num_buckets": 32}
_CHATGLM2: Options = {
    "use_bias": False,
    "use_qkv_bias": True,
    "num_multi_query_heads": 2,
    "inner_hidden_size": 13696,
    "vocab_size": 65024,
    "max_sequence_length": 32768,
}
_GLM4: Options = {**_CHATGLM2, "vocab_size": 151552, "max_sequence_length": 8192, "layernorm_epsilon": 1.5625e-07}
_EVA: Options = {"image_size": [224, 224], "patch_size": 14, "layernorm_epsilon": 1e-6}
_CAIT: Options = {"image_size": [224, 224], "patch_size": 16, "dec_num_layers": 2, "init_scale": 1e-5}
_EVA_CLIP: Options = {
    "num_layers": 63, "hidden_size": 1792, "num_attention_heads": 16, "inner_hidden_size": 15360,
    "use_final_layernorm": False, **_EVA,
}  # fmt: skip


def _stretched(factor: float) -> Options:
    rule = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rule["original_max_position_embeddings"] = 8192
    return {"rope_scaling": rule, "max_sequence_length": 131072}


def _t5(num_layers: int, hidden_size: int, num_heads: int, head_size: int, inner_size: int) -> Options:
    heads = {"hidden_size_per_attention_head": head_size, "cross_hidden_size_per_attention_head": head_size}
    return {**_T5, **_sizes(num_layers, hidden_size, num_heads, inner_hidden_size=inner_size), **heads}


#: Name -> class and options.
PRESETS: dict[str, tuple[str, Options]] = {
    "gpt2": ("GPT2Model", {**_GPT2, **_sizes(12, 768, 12)}),
    "gpt2-medium": ("GPT2Model", {**_GPT2, **_sizes(24, 1024, 16)}),
    "gpt2-large": ("GPT2Model", {**_GPT2, **_sizes(36, 1280, 20)}),
    "gpt2-xl": ("GPT2Model", {**_GPT2, **_sizes(48, 1600, 25)}),
    "gpt-neo-125m": ("GPTNeoModel", {**_NEO, **_sizes(12, 768, 12)}),
    "gpt-neo-1.3b": ("GPTNeoModel", {**_NEO, **_sizes(24, 2048, 16)}),
    "gpt-neo-2.7b": ("GPTNeoModel", {**_NEO, **_sizes(32, 2560, 20)}),
    "bert-base-uncased": ("BertModel", {**_BERT, **_sizes(12, 768, 12)}),
    "bert-large-uncased": ("BertModel", {**_BERT, **_sizes(24, 1024, 16)}),
    "roberta-base": ("RobertaModel", {**_ROBERTA, **_sizes(12, 768, 12)}),
    "roberta-large": ("RobertaModel", {**_ROBERTA, **_sizes(24, 1024, 16)}),
    "dpr-question_encoder-single-nq-base": ("DPRQuestionEncoder", {**_BERT, **_sizes(12, 768, 12)}),
    "dpr-ctx_encoder-single-nq-base": ("DPRContextEncoder", {**_BERT, **_sizes(12, 768, 12)}),
    "dpr-reader-single-nq-base": ("DPRReader", {**_BERT, **_sizes(12, 768, 12)}),
    "llama-7b": ("LLaMAModel", {**_LLAMA, **_sizes(32, 4096, 32), **_inner(11008)}),
    "llama-13b": ("LLaMAModel", {**_LLAMA, **_sizes(40, 5120, 40), **_inner(13824)}),
    "llama-30b": ("LLaMAModel", {**_LLAMA, **_sizes(60, 6656, 52), **_inner(17920)}),
    "llama-65b": ("LLaMAModel", {**_LLAMA, **_sizes(80, 8192, 64), **_inner(22016), "layernorm_epsilon": 1e-5}),
    "llama-2-7b": ("LLaMAModel", {**_LLAMA2, **_sizes(32, 4096, 32), **_inner(11008)}),
    "llama-2-13b": ("LLaMAModel", {**_LLAMA2, **_sizes(40, 5120, 40), **_inner(13824)}),
    "llama-2-70b": ("LLaMAModel", {**_LLAMA2, **_sizes(80, 8192, 64), **_inner(28672, 8)}),
    "llama-3-8b": ("LLaMAModel", {**_LLAMA3, **_sizes(32, 4096, 32), **_inner(14336, 8)}),
    "llama-3-70b": ("LLaMAModel", {**_LLAMA3, **_sizes(80, 8192, 64), **_inner(28672, 8)}),
    "llama-3.1-8b": ("LLaMAModel", {**_LLAMA3, **_sizes(32, 4096, 32), **_inner(14336, 8), **_stretched(8.0)}),
    "llama-3.2-1b": (
        "LLaMAModel",
        {**_LLAMA3, **_sizes(16, 2048, 32), **_inner(8192, 8), **_stretched(32.0), "tie_word_embeddings": True},
    ),
    "llama-3.2-3b": (
        "LLaMAModel",
        {**_LLAMA3, **_sizes(28, 3072, 24), **_inner(8192, 8), **_stretched(32.0), "tie_word_embeddings": True},
    ),
    "mistral-7b-v0.1": (
        "LLaMAModel",
        {**_LLAMA2, **_sizes(32, 4096, 32), **_inner(14336, 8), "max_sequence_length": 32768, "sliding_window": 4096},
    ),
    "qwen2-0.5b": (
        "LLaMAModel",
        {
            **_QWEN2,
            **_sizes(24, 896, 14),
            **_inner(4864, 2),
            "max_sequence_length": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-7b": (
        "LLaMAModel",
        {**_QWEN2, **_sizes(28, 3584, 28), **_inner(18944, 4), "max_sequence_length": 131072, "vocab_size": 152064},
    ),
    "qwen3-0.6b": ("LLaMAModel", {**_QWEN3, **_sizes(28, 1024, 16), **_inner(3072, 8), "tie_word_embeddings": True}),
    "qwen3-8b": ("LLaMAModel", {**_QWEN3, **_sizes(36, 4096, 32), **_inner(12288, 8)}),
    "mixtral-8x7b": (
        "MixtralModel",
        {
            **_LLAMA2,
            **_sizes(32, 4096, 32),
            **_inner(14336, 8),
            "max_sequence_length": 32768,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "t5-small": ("T5Model", _t5(6, 512, 8, 64, 2048)),
    "t5-base": ("T5Model", _t5(12, 768, 12, 64, 3072)),
    "t5-large": ("T5Model", _t5(24, 1024, 16, 64, 4096)),
    "t5-3b": ("T5Model", _t5(24, 1024, 32, 128, 16384)),
    "t5-11b": ("T5Model", _t5(24, 1024, 128, 128, 65536)),
    "chatglm-6b": ("ChatGLMModel", _sizes(28, 4096, 32, vocab_size=130528, max_sequence_length=2048)),
    "chatglm2-6b": ("ChatGLM2Model", {**_CHATGLM2, **_sizes(28, 4096, 32)}),
    "chatglm3-6b": ("ChatGLM3Model", {**_CHATGLM2, **_sizes(28, 4096, 32), "max_sequence_length": 8192}),
    "glm-4-9b": ("ChatGLM4Model", {**_GLM4, **_sizes(40, 4096, 32)}),
    "glm-4v-9b": (
        "GLM4VModel",
        {
            **_GLM4,
            **_sizes(40, 4096, 32),
            "is_gated_mlp": True,
            "eva_args": {**_EVA_CLIP, "image_size": [1120, 1120]},
            "proj_hidden_size": 4096,
            "image_length": 1600,
        },
    ),
    "glm-130b": ("GLM130B", _sizes(70, 12288, 96, vocab_size=150528, max_sequence_length=2048)),
    "vit-base-patch16-224": ("ViTModel", {**_VIT, **_sizes(12, 768, 12)}),
    "vit-base-patch16-384": ("ViTModel", {**_VIT, **_sizes(12, 768, 12), "image_size": [384, 384]}),
    "vit-large-patch16-224": ("ViTModel", {**_VIT, **_sizes(24, 1024, 16)}),
    "deit-tiny-distilled-patch16-224": ("ViTModel", {**_VIT, **_sizes(12, 192, 3, vocab_size=2), "pre_len": 2}),
    "deit-base-distilled-patch16-224": ("ViTModel", {**_VIT, **_sizes(12, 768, 12, vocab_size=2), "pre_len": 2}),
    "cait-xxs24-224": ("CaiT", {**_CAIT, **_sizes(24, 192, 4)}),
    "cait-s24-224": ("CaiT", {**_CAIT, **_sizes(24, 384, 8)}),
    "eva02_L_pt_m38m_p14": (
        "EVA2Model",
        {**_EVA, **_sizes(24, 1024, 16, inner_hidden_size=2730, predict_feature_dim=1024)},
    ),
    "eva-clip-4b-14-x-drop-last-layer": ("EVA2CLIPModel", _EVA_CLIP),
    "clip-vit-base-patch32": ("CLIP", {**_CLIP, **_sizes(12, 768, 12), "patch_size": 32}),
    "clip-vit-base-patch16": ("CLIP", {**_CLIP, **_sizes(12, 768, 12), "patch_size": 16}),
    "clip-vit-large-patch14": ("CLIP", {**_CLIP_LARGE, **_sizes(24, 1024, 16)}),
    "clip-vit-large-patch14-336": ("CLIP", {**_CLIP_LARGE, **_sizes(24, 1024, 16), "image_size": [336, 336]}),
    "vit-mae-base": ("MAE", {**_MAE, **_sizes(12, 768, 12)}),
    "vit-mae-large": ("MAE", {**_MAE, **_sizes(24, 1024, 16)}),
    "vit-mae-huge": ("MAE", {**_MAE, **_sizes(32, 1280, 16), "patch_size": 14}),
    "yolos-tiny": ("YOLOS", {**_YOLOS, **_sizes(12, 192, 3), "image_size": [800, 1333]}),
    "yolos-small": (
        "YOLOS",
        {**_YOLOS, **_sizes(12, 384, 6), "image_size": [512, 864], "has_mid_positions": True},
    ),
}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """Return the configuration of a named size, of the class that its family reads.

    Args:
        name: one of `PRESETS`.
        **changes: fields that differ.

    Raises:
        ConfigError: if there is none of that name, or a field is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"No preset is named '{name}', known are {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    model_class, options = PRESETS[name]
    config: TransformerConfig = getattr(models, model_class).config_class(**options)
    return config.replace(**changes)
