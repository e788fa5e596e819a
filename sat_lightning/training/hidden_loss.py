"""What a student learns from inside of its teacher (Jiao et al. 2019, arXiv:1909.10351; Sanh et al. 2019, 1910.01108).

Legend: b batch, s length, c the student's hidden size, k the teacher's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sat_lightning.errors import ConfigError
from sat_lightning.nn.linear import Linear, normal_init

_INIT_STD = 0.02


@dataclass(frozen=True)
class HiddenLossConfig:
    """Which layers of a student are to give what which of its teacher give."""

    weight: float = 1.0
    """Of the loss, beside that of the answers."""
    kind: Literal["mse", "cosine"] = "mse"
    """`mse` is the mean squared difference of the features (TinyBERT), `cosine` 1 minus the cosine (DistilBERT)."""
    layers: dict[int, int] | None = None
    """Layer of the teacher -> layer of the student, from 0. Default: evenly, the last to the last (2: 0, 5: 1)."""
    weights: list[float] | None = None
    """Of each pair, in the order of `layers`, relative to each other; default all alike."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"hidden.weight is {self.weight}. Set it above 0, or leave hidden out.")
        if self.kind not in ("mse", "cosine"):
            raise ConfigError(f"hidden.kind is '{self.kind}'. Set it to mse or cosine.")

    def pairs(self, num_teacher_layers: int, num_student_layers: int) -> list[tuple[int, int, float]]:
        """Return the layers that belong together.

        Args:
            num_teacher_layers: the teacher's.
            num_student_layers: the student's.

        Returns:
            For each pair the teacher's layer, the student's, and its share of the loss; the shares add up to 1.

        Raises:
            ConfigError: there is no such layer, the layers do not divide evenly, or there are not as many weights.
        """
        layers = self.layers
        if layers is None:
            step, rest = divmod(num_teacher_layers, num_student_layers)
            if rest or not step:
                example = {num_teacher_layers - 1: num_student_layers - 1}
                raise ConfigError(
                    f"hidden: {num_teacher_layers} layers of the teacher do not divide evenly by the student's "
                    f"{num_student_layers}. Set hidden.layers, as {example}."
                )
            layers = {step * (layer + 1) - 1: layer for layer in range(num_student_layers)}
        for ours, theirs in layers.items():
            if not (0 <= ours < num_teacher_layers and 0 <= theirs < num_student_layers):
                raise ConfigError(
                    f"hidden.layers has {ours}: {theirs}; the teacher's layers are 0 to {num_teacher_layers - 1}, the "
                    f"student's 0 to {num_student_layers - 1}."
                )
        weights = [1.0] * len(layers) if self.weights is None else self.weights
        if len(weights) != len(layers) or not layers or min(weights) < 0 or not sum(weights):
            raise ConfigError(
                f"hidden.weights is {weights} for {len(layers)} pairs of layers. Give one for each, none below 0."
            )
        return [(*pair, weight / sum(weights)) for pair, weight in zip(layers.items(), weights, strict=True)]


class HiddenLoss(nn.Module):
    """Compare what layers give; where the widths differ, a learned projection of the student's comes first.

    Args:
        config: what is compared.
        teacher: a model of ours.
        student: the same.
    """

    def __init__(self, config: HiddenLossConfig, teacher: Any, student: Any) -> None:  # noqa: ANN401
        super().__init__()
        sizes = student.config.hidden_size, teacher.config.hidden_size
        self.pairs = config.pairs(teacher.config.num_layers, student.config.num_layers)
        self.kind, self.weight = config.kind, config.weight
        self.projections = nn.ModuleList(
            Linear(*sizes, True, normal_init(_INIT_STD)) if sizes[0] != sizes[1] else nn.Identity() for _ in self.pairs
        )

    def forward(
        self, teacher_layers: Sequence[Tensor], student_layers: Sequence[Tensor], token_mask: Tensor | None
    ) -> Tensor:
        """Return the mean over tokens, before it is weighed.

        Args:
            teacher_layers: `[b, s, k]` of each layer.
            student_layers: `[b, s, c]` of each.
            token_mask: `[b, s]`, 1 for a token and 0 for padding; None: all are tokens.
        """
        total = torch.zeros((), device=student_layers[0].device)
        for (above, below, share), projection in zip(self.pairs, self.projections, strict=True):
            expected, given = teacher_layers[above].float(), projection(student_layers[below]).float()
            if self.kind == "mse":
                distance = (given - expected).square().mean(-1)
            else:
                distance = 1 - F.cosine_similarity(given, expected, dim=-1)
            total = total + share * _mean(distance, token_mask)
        return total


def _mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return values.mean()
    is_token = token_mask.to(torch.bool)
    return torch.where(is_token, values, 0.0).sum() / is_token.sum().clamp(min=1)
