"""The public models of SAT by name, as data. `models.json` in `SAT_HOME` adds names, or replaces these.

An address is a URL of a zip that holds one model folder, or `hf://organisation/name`. None: SAT serves it from a
private bucket only, so the caller gives `url`, a mirror (`SAT_MIRROR`), or a folder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """Where a model is, and what is known about the file."""

    url: str | None
    size: int | None = None
    """Bytes; checked where given."""
    sha256: str | None = None
    """Hexadecimal; checked where given."""


_CLOUD = "https://cloud.tsinghua.edu.cn/d/dd80f9d39d454bc29ce4/files/?p=%2F{}.zip&dl=1"
_SHARED = "https://cloud.tsinghua.edu.cn/f/{}/?dl=1"
_AMINER = "https://lfs.aminer.cn/misc/{}.zip"

KNOWN_MODELS: dict[str, KnownModel] = {
    **{
        name: KnownModel(_CLOUD.format(name))
        for name in (
            "bert-base-uncased bert-large-uncased roberta-base roberta-large vit-base-patch16-224-in21k deit-tiny "
            "deit-small deit-base cait-s24-224 gpt2 eva02_L_pt_m38m_p14 llama-7b llama-13b clip yolos-tiny mae-vit-base"
        ).split()
    },
    **{
        name: KnownModel(_AMINER.format(f"{folder}/{name}"))
        for folder, names in {
            "clip": "clip-vit-base-patch16 clip-vit-large-patch14",
            "cogview/glm": "glm-large-zh glm-large-en-blank glm-10b-en glm-10b-zh",
            "cogview/cogview2": "coglm cogview2-dsr cogview2-itersr",
            "cogvideo": "cogvideo-stage1 cogvideo-stage2",
        }.items()
        for name in names.split()
    },
    "cogview-base": KnownModel(_SHARED.format("df21f6d4109b4285bfd9")),
    "gpt-neo-1.3b": KnownModel(_SHARED.format("22e87976b5b745ad90af")),
    "dpr-ctx_encoder-single-nq-base": KnownModel(_SHARED.format("e5475f1211a948708baa")),
    "dpr-question_encoder-single-nq-base": KnownModel(_SHARED.format("5c4aae7d11fc4c45a5bd")),
    "dpr-reader-single-nq-base": KnownModel(_SHARED.format("e169889ab40d4615a34d")),
    "chatglm-6b": KnownModel("hf://THUDM/chatglm-6b"),
    "chatglm2-6b": KnownModel("hf://THUDM/chatglm2-6b"),
    "chatglm3-6b": KnownModel("hf://THUDM/chatglm3-6b"),
    "chatglm3-6b-base": KnownModel("hf://THUDM/chatglm3-6b-base"),
    "chatglm3-6b-32k": KnownModel("hf://THUDM/chatglm3-6b-32k"),
    "glm4v-9b-chat": KnownModel("hf://THUDM/glm-4v-9b"),
    "llama-30b": KnownModel(None),
    "llama-65b": KnownModel(None),
    "eva-clip-4b-14-x-drop-last-layer": KnownModel(None),
}
