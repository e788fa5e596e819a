"""How SAT cuts tensors into model-parallel partitions, and how they are put together again.

Columns of a linear's output are rows of its weight: those are cut by rows, fused blocks each for itself (`[q|k|v]`
gives rank r `[q_r|k_r|v_r]`); linears that read a cut input are cut by columns; large embeddings by rows; all else is
whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import CheckpointError

SMALLEST_CUT_VOCABULARY = 1000
"""SAT keeps smaller embeddings whole on every rank."""

_QKV = re.compile(r"(\.|^)attention\.query_key_value\.(weight|bias)$")
_THIRDS = re.compile(r"(\.|^)attention_plus\.query_key_value\.\d+\.(weight|bias)$")
_HALVES = re.compile(r"(\.|^)cross_attention\.key_value\.(weight|bias)$")
_ROWS = re.compile(
    r"(\.|^)(cross_attention\.query|mlp\.dense_h_to_4h(_gate)?(_\d+)?|mlp\.gate_proj\.\d+|mixins\.mlp\.w2\.\d+"
    r"|gated_h_to_4h_list\.\d+)\.(weight|bias)$"
)
_COLUMNS = re.compile(
    r"(\.|^)((cross_)?attention\.dense|attention_plus\.dense\.\d+|mlp\.dense_4h_to_h(_\d+)?)\.weight$"
)
_IMAGE_ENCODER = re.compile(r"^mixins\.eva\.vit_model\.")
_EMBEDDING = re.compile(r"(\.|^)transformer\.word_embeddings\.weight$")
# Heads that SAT cuts; those of other families are whole.
_HEADS = {
    "LLaMAModel": "mixins.lm.lm_head.weight",
    "MixtralModel": "mixins.lm.lm_head.weight",
    "ChatGLMModel": "mixins.chatglm-final.lm_head.weight",
    "ChatGLM2Model": "mixins.chatglm-final.lm_head.weight",
    "ChatGLM3Model": "mixins.chatglm-final.lm_head.weight",
    "ChatGLM4Model": "mixins.chatglm-final.lm_head.weight",
    "GLM4VModel": "mixins.chatglm-final.lm_head.weight",
    "T5Model": "decoder.mixins.t5-final.lm_head.weight",
}


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut: along `dim`, each of the blocks with those shares for itself."""

    dim: int
    shares: tuple[int, ...] = (1,)

    def part(self, tensor: Tensor, rank: int, count: int, name: str) -> Tensor:
        """Return what one rank holds, as a tensor of its own."""
        sizes = list(self._sizes(tensor.shape[self.dim]))
        if any(size % count for size in sizes):
            raise CheckpointError(
                f"'{name}' has {tensor.shape[self.dim]} entries along axis {self.dim}, in blocks of {sizes}: {count} "
                "partitions do not divide that. Choose a divisor, or pad the vocabulary first."
            )
        blocks = [block.chunk(count, dim=self.dim)[rank] for block in tensor.split(sizes, dim=self.dim)]
        return torch.cat(blocks, dim=self.dim)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the parts of all ranks together again."""
        blocks = [part.split(list(self._sizes(part.shape[self.dim])), dim=self.dim) for part in parts]
        return torch.cat([block for same in zip(*blocks, strict=True) for block in same], dim=self.dim)

    def _sizes(self, size: int) -> Iterator[int]:
        return (size * share // sum(self.shares) for share in self.shares)


def find_cut(name: str, config: TransformerConfig, model_class: str) -> Cut | None:
    """Tell how SAT cuts the tensor of that name; None is whole on every rank."""
    if model_class == "GLM4VModel" and (inner := _IMAGE_ENCODER.sub("", name)) != name:
        return find_cut(inner, TransformerConfig.from_dict(config.eva_args), "EVA2CLIPModel")  # type: ignore[attr-defined]
    if _QKV.search(name):
        if model_class == "GLM130B":  # fused head by head, so that a cut between heads keeps q, k and v together
            return Cut(0)
        groups = config.num_multi_query_heads
        return Cut(0, (config.num_attention_heads, groups, groups) if groups else (1, 1, 1))
    if _THIRDS.search(name):
        return Cut(0, (1, 1, 1))
    if _HALVES.search(name):
        return Cut(0, (1, 1))
    is_cut_table = _EMBEDDING.search(name) is not None and config.vocab_size >= SMALLEST_CUT_VOCABULARY
    if _ROWS.search(name) or is_cut_table or name == _HEADS.get(model_class):
        return Cut(0)
    return Cut(1) if _COLUMNS.search(name) else None


class MergedTensors(Mapping[str, Tensor]):
    """The whole tensors of a checkpoint in partitions; each is put together when it is asked for.

    Args:
        partitions: the tensors of each rank.
        config: of the model.
        model_class: its name.
        what: the checkpoint, for messages.
    """

    def __init__(
        self, partitions: Sequence[Mapping[str, Tensor]], config: TransformerConfig, model_class: str, what: str
    ) -> None:
        self._partitions, self._config, self._model_class, self._what = partitions, config, model_class, what
        for rank, partition in enumerate(partitions):
            if partition.keys() != partitions[0].keys():
                names = sorted(partition.keys() ^ partitions[0].keys())
                raise CheckpointError(
                    f"{what}: ranks 0 and {rank} do not hold the same tensors ({names[0]} and {len(names) - 1} more). "
                    "They are not of one save."
                )

    def __getitem__(self, name: str) -> Tensor:
        parts = [partition[name] for partition in self._partitions]
        cut = find_cut(name, self._config, self._model_class)
        if cut is None or len(parts) == 1 or self._is_whole(parts[0], cut):
            return parts[0]
        return cut.merge(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._partitions[0])

    def __len__(self) -> int:
        return len(self._partitions[0])

    def _is_whole(self, part: Tensor, cut: Cut) -> bool:
        """Some classes keep a table whole that others cut; only its rows tell."""
        return cut.shares == (1,) and cut.dim == 0 and part.shape[0] == self._config.vocab_size


def split_tensors(
    tensors: Mapping[str, Tensor], config: TransformerConfig, model_class: str, rank: int, count: int
) -> dict[str, Tensor]:
    """Return what one rank of `count` holds; tensors of its own, so that a save holds nothing else.

    Raises:
        CheckpointError: if the sizes cannot be divided.
    """
    for field in ("num_attention_heads", "num_multi_query_heads"):
        if getattr(config, field) % count:
            raise CheckpointError(f"{field} {getattr(config, field)} is not divisible by {count} partitions.")
    result = {}
    for name in tensors:
        cut = find_cut(name, config, model_class) if count > 1 else None
        result[name] = tensors[name] if cut is None else cut.part(tensors[name], rank, count, name)
    return result
