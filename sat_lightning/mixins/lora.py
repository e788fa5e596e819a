"""Low-rank adaptation: a trained product of two thin matrices beside frozen linears.

Legend: r rank, R sum of the ranks of a linear's parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lightning.config import TransformerConfig
from sat_lightning.errors import ConfigError
from sat_lightning.hooks import innermost, non_conflict
from sat_lightning.mixins.linear_adapter import Adapter, Kept, check_patterns, learned, rows_of, whole
from sat_lightning.mixins.places import Place, Slot, look_up
from sat_lightning.mixins.quantized import dense_weight
from sat_lightning.mixins.sat_form import Arguments, accepts_sat_form, sizes
from sat_lightning.mixins.weight_tuning import WeightTuningMixin

Term = tuple[Slot, Tensor, Tensor, float]
"""Rows, A `[r, in]`, B `[rows, r]`, factor."""
ATTENTION = r"attention\.(query_key_value|query|key_value|dense)"


class LoraWeights(Adapter):
    """A and B of one linear, for each adapted part: `matrix_A.<j>` `[r, in]` and `matrix_B.<j>` `[out_j, r]`.

    Args:
        place: the linear.
        slots: its adapted parts.
        ranks: of each.
        factors: of each, alpha / rank or the like.
        is_pissa: whether A and B begin at the main singular vectors; what they begin with is kept, and subtracted.
    """

    def __init__(
        self, place: Place, slots: Sequence[Slot], ranks: Sequence[int], factors: Sequence[float], is_pissa: bool
    ) -> None:
        super().__init__(place, slots)
        self.ranks, self.factors = tuple(ranks), tuple(factors)
        names = ["matrix_A", "matrix_B"] + ["initial_A", "initial_B"] * is_pissa
        for name in names:
            self.add_module(name, nn.Module())
        for slot, rank, factor in zip(slots, ranks, factors, strict=True):
            if is_pissa and (rank > (largest := min(self.in_features, slot.size)) or factor <= 0):
                raise ConfigError(
                    f"init='pissa': {slot.name} has {largest} singular vectors, rank is {rank} and the factor "
                    f"{factor:g}. Give a rank up to that (rank_pattern), and an alpha above 0."
                )
            for name in names:
                shape = (rank, self.in_features) if name.endswith("A") else (slot.size, rank)
                values = learned(place, *shape)
                if name.startswith("initial"):
                    self.get_submodule(name).register_buffer(str(slot.index), torch.zeros_like(values.data))
                else:
                    self.get_submodule(name).register_parameter(str(slot.index), values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with a product of zero: B is 0 and A random, or for a table A is 0 and B random."""
        for number in self.matrix_A._parameters:
            first, second = self.pair(number)
            if self.is_table:
                nn.init.zeros_(first)
                nn.init.normal_(second)
            else:
                nn.init.kaiming_uniform_(first, a=math.sqrt(5))
                nn.init.zeros_(second)

    def pair(self, number: str, name: str = "matrix") -> tuple[Tensor, Tensor]:
        """Return A and B of a part by its number."""
        return getattr(self.get_submodule(f"{name}_A"), number), getattr(self.get_submodule(f"{name}_B"), number)

    def terms(self) -> list[Term]:
        """Return the products that are added."""
        kinds = [("matrix", 1.0)] + [("initial", -1.0)] * ("initial_A" in self._modules)
        return [
            (slot, *self.pair(str(slot.index), kind), sign * factor)
            for kind, sign in kinds
            for slot, factor in zip(self.slots, self.factors, strict=True)
        ]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Return all A in one `[R, in]` and all B in one `[out, R]`, factors included: one product serves all parts."""
        terms = self.terms()
        columns = []
        for slot, _, up, factor in terms:
            up = up if factor == 1.0 else up * factor
            after = self.out_features - slot.start - slot.size
            columns.append(F.pad(up, (0, 0, slot.start, after)) if slot.size < self.out_features else up)
        if len(terms) == 1:
            return terms[0][1], columns[0]
        return torch.cat([down for _, down, _, _ in terms]), torch.cat(columns, dim=1)

    def forward(self, x: Tensor, output: Tensor, scale: float, rows: Tensor | None) -> Tensor:
        """Add to the output of the linear: `[..., in]` and `[..., out]` to `[..., out]`."""
        down, up = self.stacked()
        is_cast = torch.is_autocast_enabled(x.device.type)
        hidden = F.linear(x if is_cast or x.dtype == down.dtype else x.to(down.dtype), down)
        if scale != 1.0:
            hidden = hidden * scale
        if rows is not None:
            hidden = hidden * rows
        if not is_cast and output.dtype != up.dtype:
            return output + F.linear(hidden, up).to(output.dtype)
        return torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.t()).view_as(output)

    def delta(self) -> Tensor:
        """Return what is added to the weight `[out, in]`, in fp32."""
        like = self.terms()[0][1]
        change = torch.zeros(self.out_features, self.in_features, device=like.device, dtype=torch.float32)
        for slot, down, up, factor in self.terms():
            change[slot.start : slot.start + slot.size] += factor * (up.detach().float() @ down.detach().float())
        return change

    def merged(self, weight: Tensor, bias: Tensor | None, scale: float) -> Kept:
        """Add the product to the weight."""
        change = self.delta() * scale
        return weight + (change.t() if self.is_table else change), bias

    @torch.no_grad()
    def reset(self, module: nn.Module) -> None:
        """For PiSSA, begin with the largest singular values of the base."""
        if "initial_A" not in self._modules:
            return
        with whole(module.weight, *self.parameters()):
            weight = dense_weight(module).float()
            for slot, rank, factor in zip(self.slots, self.ranks, self.factors, strict=True):
                left, values, right = torch.linalg.svd(weight[slot.start : slot.start + slot.size], full_matrices=False)
                root = (values[:rank] / factor).sqrt()
                for name in ("matrix", "initial"):
                    down, up = self.pair(str(slot.index), name)
                    down.copy_(root[:, None] * right[:rank])
                    up.copy_(left[:, :rank] * root)


def _lora2_form(
    layer_num: int,
    r: int = 0,
    lora_alpha: float = 1.0,
    lora_dropout: float = 0.0,
    layer_range: Sequence[int] | None = None,
    qlora: bool = False,
    cross_attention: bool = True,
) -> Arguments:
    if qlora:
        raise ConfigError("qlora: call quantize_base(model) once the weights are loaded, and add this without qlora.")
    layers = "|".join(map(str, range(layer_num) if layer_range is None else layer_range))
    target = rf"^layers\.({layers})\.{'(cross_)?' if cross_attention else ''}{ATTENTION}"
    return (sizes(layer_num),), {"rank": r, "alpha": lora_alpha, "dropout": lora_dropout, "target": target}


def _lora_form(
    hidden_size: int,
    layer_num: int = 24,
    r: int = 0,
    lora_alpha: float = 1.0,
    lora_dropout: float = 0.0,
    layer_range: Sequence[int] | None = None,
) -> Arguments:
    given = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "layer_range": layer_range}
    return (sizes(layer_num, hidden_size),), given


class LoraMixin(WeightTuningMixin):
    r"""``W x + scale * alpha / rank * B A x`` on chosen linears (Hu et al. 2021, arXiv:2106.09685).

    Queries, keys and values of a fused projection each have their own A and B (`matrix_A.0` to `.2`), as in SAT; all
    of a linear's A are one product. Several such mixins on one model add up; `adapter_ids` `[b]` of a call chooses
    for each sample the one whose `adapter_id` it is, and none for -1.

    Args:
        config: the model's.
        rank: of the product.
        alpha: the product is multiplied by alpha / rank.
        target: regular expressions over the names of linears (see `mixins.places`): `"attention"`, `"mlp"`,
            `r"query_key_value\.(query|value)"`; `"query_key_value$"` takes the fused projection as one, as PEFT does.
            Default: all of attention, as in SAT.
        dropout: of what A reads.
        rank_pattern: other ranks, by regular expressions over names; the first that matches counts.
        alpha_pattern: other alphas.
        use_rslora: multiply by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
        init: "default": A random, B zero; "pissa": the main singular vectors of the weight (Meng et al. 2024,
            arXiv:2404.02948), set by `reinit` once the base is loaded. The base itself stays as it is: what A and B
            begin with is kept in the adapter and subtracted.

    Raises:
        ConfigError: for a number out of range; when added to a model, for a pattern that matches nothing.
    """

    @accepts_sat_form(_lora2_form)
    def __init__(
        self,
        config: TransformerConfig,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        target: str | Sequence[str] = ATTENTION,
        dropout: float = 0.0,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        use_rslora: bool = False,
        init: Literal["default", "pissa"] = "default",
    ) -> None:
        super().__init__(config, target)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.rank_pattern, self.alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self.use_rslora, self.init = use_rslora, init
        for value in (rank, *self.rank_pattern.values()):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"LoRA: rank is {value!r}, it must be a whole number above 0.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"LoRA: dropout is {dropout}, it must be in [0, 1).")
        if init not in ("default", "pissa"):
            raise ConfigError(f"LoRA: init is '{init}', known are 'default' and 'pissa'.")

    def added_to(self, model: Any) -> None:  # noqa: ANN401
        """Find the linears and build A and B; see `WeightTuningMixin.added_to`."""
        self._used: tuple[set[str], set[str]] = (set(), set())
        has_built = any(isinstance(module, Adapter) for module in self.modules())
        super().added_to(model)
        if not has_built:
            check_patterns(self.rank_pattern, self._used[0], "rank_pattern")
            check_patterns(self.alpha_pattern, self._used[1], "alpha_pattern")

    def make_adapter(self, place: Place, slots: list[Slot]) -> LoraWeights:
        """Build A and B of one linear."""
        ranks = [look_up(self.rank_pattern, slot.name, self.rank, self._used[0]) for slot in slots]
        alphas = [look_up(self.alpha_pattern, slot.name, self.alpha, self._used[1]) for slot in slots]
        root: Callable[[float], float] = math.sqrt if self.use_rslora else float
        factors = [alpha / root(rank) for alpha, rank in zip(alphas, ranks, strict=True)]
        if isinstance(place.module, nn.Embedding) and self.init == "pissa":
            raise ConfigError("init='pissa' is for linears. Leave word_embeddings out of target.")
        return self.make_weights(place, slots, ranks, factors)

    def make_weights(
        self, place: Place, slots: list[Slot], ranks: Sequence[int], factors: Sequence[float]
    ) -> LoraWeights:
        """Build A and B of these ranks and factors; a method with more to learn adds it here."""
        return LoraWeights(place, slots, ranks, factors, self.init == "pissa")

    def adapt(self, adapter: Any, x: Tensor, *, linear: nn.Module, old_impl: Any, **kw: Any) -> Tensor:
        """Run the linear, and add the product."""
        output = old_impl(x, linear=linear, **kw)
        rows = rows_of(kw, self.adapter_id, adapter.place_name, x)
        return adapter(self.drop(x), output, self.scale, rows)

    def merge_lora(self) -> None:
        """Merge, by SAT's name for it; after `del_mixin` the model is a plain one."""
        self.merge()

    def drop(self, x: Tensor) -> Tensor:
        """Drop features of what A reads, in training."""
        return F.dropout(x, self.dropout) if self.dropout > 0.0 and self.training else x

    @innermost  # a prompt, or a patch of an image, is no word
    @non_conflict
    def word_embedding_forward(self, input_ids: Tensor, *, old_impl: Any, **kw: Any) -> Tensor:
        """Add the product to the table's rows: `[b, s]` to `[b, s, c]`; only where word_embeddings is a target."""
        output = old_impl(input_ids, **kw)
        adapter: Any = self._adapters[self.transformer.word_embeddings]
        down, up = adapter.stacked()
        hidden = F.embedding(input_ids, down.t()) * self.scale
        rows = rows_of(kw, self.adapter_id, adapter.place_name, input_ids[..., None])
        return output + F.linear(hidden if rows is None else hidden * rows, up).to(output.dtype)


class LoRAMixin(LoraMixin):
    """`LoraMixin` on self-attention with the words of SAT's class of this name, whose weights it loads.

    Args:
        config: the model's.
        r: rank of the product.
        lora_alpha: the product is multiplied by lora_alpha / r.
        lora_dropout: of what A reads.
        layer_range: the layers to adapt. Default: all.
    """

    @accepts_sat_form(_lora_form)
    def __init__(
        self,
        config: TransformerConfig,
        *,
        r: int = 8,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        layer_range: Sequence[int] | None = None,
    ) -> None:
        layers = r"\d+" if layer_range is None else f"({'|'.join(map(str, layer_range))})"
        target = rf"^layers\.{layers}\.attention\.(query_key_value|dense)"
        super().__init__(config, rank=r, alpha=lora_alpha, target=target, dropout=lora_dropout)
