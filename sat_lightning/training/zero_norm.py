"""The norm of all gradients under ZeRO: one all-reduce and one read, however many parameter groups there are."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def merge_norms(optimizer: Any) -> None:  # noqa: ANN401 - one of DeepSpeed's, or none of them
    """Let an optimizer of ZeRO 1 to 3 find the norm of all gradients at once.

    DeepSpeed adds up squares over the ranks once for each parameter group, of which layer-wise learning rates make
    dozens, and to clip it reads the norm from the device once for each as well. Squares are added up in fp64: the norm
    is finite wherever the gradients are, within fp32. What lies on the host, experts and tensor parallelism are left to
    DeepSpeed.

    Args:
        optimizer: of the engine.
    """
    is_stage_3 = hasattr(optimizer, "_get_norm_groups")
    if not (is_stage_3 or hasattr(optimizer, "scaled_global_norm")) or _is_special(optimizer):
        return

    def norm(norm_type: float = 2) -> Tensor:
        gradients = (gradient for group in optimizer.averaged_gradients.values() for gradient in group or ())
        squares = _sum_squares(gradients, optimizer.device)
        torch.distributed.all_reduce(squares, group=optimizer.dp_process_group)
        return squares.sqrt().float().cpu()  # one read; whoever looks at it from now on waits for nothing

    if is_stage_3:
        optimizer._get_norm_groups = lambda: [norm()]
    else:
        optimizer.scaled_global_norm = norm


def _is_special(optimizer: Any) -> bool:  # noqa: ANN401
    """Whether some gradients lie on the host, or count in another way than once."""
    signs = ("cpu_offload", "offload_optimizer", "has_moe_layers", "mpu", "model_parallel_group")
    if any(getattr(optimizer, name, None) for name in signs):
        return True
    if not (hasattr(optimizer, "averaged_gradients") and hasattr(optimizer, "dp_process_group")):
        return True
    groups = set(getattr(optimizer, "real_dp_process_group", []))
    if hasattr(optimizer, "fp16_groups"):  # stage 3
        groups |= {getattr(p, "ds_process_group", None) for group in optimizer.fp16_groups for p in group} - {None}
    ranks = torch.distributed.get_process_group_ranks
    has_others = any(ranks(group) != ranks(optimizer.dp_process_group) for group in groups)
    return has_others or "muon" in type(optimizer.optimizer).__name__.lower()


def _sum_squares(gradients: Iterable[Tensor], device: torch.device | str) -> Tensor:
    gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).square().sum()
