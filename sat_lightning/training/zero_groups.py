"""What DeepSpeed asks all ranks once for each parameter group, asked once for all groups."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Elements of a group, on all ranks together, that are gathered with other groups': more take longer than it takes to
#: begin, and need not be copied.
_FEW = 2**20


def join_groups(optimizer: Any) -> None:  # noqa: ANN401 - one of DeepSpeed's, or none of them
    """Let an optimizer of ZeRO 1 to 3 find the norm of all gradients at once, and ZeRO 1 and 2 gather small groups so.

    DeepSpeed adds up squares over the ranks once for each parameter group, of which layer-wise learning rates make
    dozens, and to clip it reads the norm from the device once for each as well; then it gathers each group's weights
    by themselves. What lies on the host, experts and tensor parallelism are left to DeepSpeed.

    Args:
        optimizer: of the engine.
    """
    if _is_special(optimizer):
        return
    _join_norms(optimizer)
    _join_gathers(optimizer)


def _join_norms(optimizer: Any) -> None:  # noqa: ANN401
    """Squares are added up in fp64: the norm is finite wherever the gradients are, within fp32."""
    is_stage_3 = hasattr(optimizer, "_get_norm_groups")

    def norm(norm_type: float = 2) -> Tensor:
        gradients = (gradient for group in optimizer.averaged_gradients.values() for gradient in group or ())
        squares = _sum_squares(gradients, optimizer.device)
        torch.distributed.all_reduce(squares, group=optimizer.dp_process_group)
        return squares.sqrt().float().cpu()  # one read; whoever looks at it from now on waits for nothing

    if is_stage_3:
        optimizer._get_norm_groups = lambda: [norm()]
    elif hasattr(optimizer, "scaled_global_norm"):
        optimizer.scaled_global_norm = norm


def _join_gathers(optimizer: Any) -> None:  # noqa: ANN401
    step = optimizer.step
    names = getattr(getattr(step, "__func__", None), "__globals__", {})
    if "all_gather_dp_groups" not in names:
        return

    def step_with_one_gather(closure: Any = None) -> None:  # noqa: ANN401
        # Only for as long as this engine steps: the function is one of a module that others use as well.
        before, names["all_gather_dp_groups"] = names["all_gather_dp_groups"], gather_groups
        try:
            step(closure)
        finally:
            names["all_gather_dp_groups"] = before

    optimizer.step = step_with_one_gather


def gather_groups(
    groups_flat: list[Tensor],
    partitioned_param_groups: list[list[Tensor]],
    dp_process_group: list[Any],
    start_alignment_factor: int = 1,
    allgather_bucket_size: int = 0,
) -> None:
    """Gather the weights of all groups, each of which lies whole in one tensor, one rank's part after another's.

    Args:
        groups_flat: those tensors, of which each rank has updated its part.
        partitioned_param_groups: the parts, as views, by group and rank.
        dp_process_group: the ranks, the same for each group.
        start_alignment_factor: unused; parts are equally long.
        allgather_bucket_size: unused.
    """
    gather, ranks = torch.distributed.all_gather_into_tensor, dp_process_group[0]
    rank, num_ranks = torch.distributed.get_rank(ranks), torch.distributed.get_world_size(ranks)
    if num_ranks == 1:
        return
    pairs = [(whole, parts[rank]) for whole, parts in zip(groups_flat, partitioned_param_groups, strict=True)]
    small = [pair for pair in pairs if pair[0].numel() <= _FEW and pair[0].dtype is pairs[0][0].dtype]
    for whole, part in pairs:
        if len(small) < 2 or all(whole is not other for other, _ in small):
            gather(whole, part, ranks)
    if len(small) > 1:
        own = torch.cat([part for _, part in small])
        of_all = own.new_empty(num_ranks * own.numel())
        gather(of_all, own, ranks)
        columns = of_all.view(num_ranks, -1).split([part.numel() for _, part in small], 1)
        for (whole, _), column in zip(small, columns, strict=True):
            whole.view(num_ranks, -1).copy_(column)


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
