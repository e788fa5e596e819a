"""Which module, and which tensor, was the first that is not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from sat_lightning.training.verdict import BadBatch


def find_culprit(module: nn.Module, bad: BadBatch) -> str:
    """Compute a bad batch once more, and look at everything on the way; every rank has to call this.

    Args:
        module: that is trained.
        bad: the batch.

    Returns:
        A sentence or two on this rank.
    """
    if names := [name for name, parameter in module.named_parameters() if _is_bad(_part(parameter))]:
        return f"The parameter {names[0]} was not finite before the batch" + _others(names)
    search = _Search()
    try:
        with _eager(), search.watch(module), bad.rerun() as output:
            if search.first is not None or not bad.is_window:
                return search.first or _without_module(output)
            return search.follow_back(output["loss"] if isinstance(output, Mapping) else output)
    except Exception as error:  # noqa: BLE001 - one rank must not leave the others alone
        return f"Computing the batch again failed: {error}."


class _Search:
    """Looks at what goes into and comes out of each module."""

    def __init__(self) -> None:
        self.first: str | None = None
        self._first_masked: str | None = None
        self._outputs: list[tuple[str, Tensor]] = []

    @contextmanager
    def watch(self, root: nn.Module) -> Iterator[None]:
        """Look at every module inside the root while the context lasts."""
        handles: list[Any] = []
        for name, module in root.named_modules():
            if module is not root:
                label = f"{name} ({type(module).__name__})"
                before, after = partial(self._look_before, label), partial(self._look_after, label)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def follow_back(self, loss: Tensor) -> str:
        """Find the gradient that is not finite nearest to the loss, among those of the modules' outputs."""
        tensors = [tensor for _, tensor in self._outputs]
        gradients: Any = torch.autograd.grad(loss, tensors, allow_unused=True)
        after = "the loss"
        for (label, _), gradient in zip(reversed(self._outputs), reversed(gradients), strict=True):
            if gradient is None:
                continue
            if _is_bad(gradient):
                return (
                    f"Backwards from the loss, the first gradient that is not finite is that of the output of {label} "
                    f"{_describe(gradient)}; that of {after}, which comes after it, is finite."
                )
            after = f"the output of {label}"
        return "The gradients of all modules' outputs are finite: another batch of the window, or a parameter, is bad."

    def _look_before(self, label: str, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        for tensor in _tensors((args, kwargs)):
            # Masks hold -inf, and rightly so.
            if self.first is None and _is_bad(tensor) and not _is_mask(tensor):
                self.first = f"The first tensor that is not finite is an input of {label} {_describe(tensor)}."

    def _look_after(self, label: str, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        for tensor in _tensors(output):
            if self.first is None and _is_bad(tensor):
                said = f"The first tensor that is not finite is the output of {label} {_describe(tensor)}"
                names = [name for name, parameter in module.named_parameters(recurse=False) if _is_bad(parameter)]
                said += f", whose parameter {names[0]} is not finite either." if names else "; its inputs were finite."
                if _is_mask(tensor):
                    self._first_masked = self._first_masked or said
                else:
                    self.first = said
            if tensor.requires_grad and not any(tensor is known for _, known in self._outputs):
                self._outputs.append((label, tensor))


def _without_module(output: Any) -> str:  # noqa: ANN401
    if any(_is_bad(tensor) for tensor in _tensors(output)):
        return "Every module's output is finite: the training step itself made of them what is not."
    return "Here nothing was bad when the batch was computed again."


def _tensors(value: Any) -> list[Tensor]:  # noqa: ANN401
    found: list[Tensor] = []
    apply_to_collection(value, Tensor, found.append)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all())


def _is_mask(tensor: Tensor) -> bool:
    """Whether all that is not finite in it is -inf."""
    return bool((torch.isfinite(tensor) | torch.isneginf(tensor)).all())


def _part(parameter: nn.Parameter) -> Tensor:
    """What ZeRO 3 has left here of a parameter, or the whole of it."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part


def _describe(tensor: Tensor) -> str:
    num_nan, num_inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"(shape {list(tensor.shape)}, {str(tensor.dtype)[6:]}, {num_nan} NaN, {num_inf} infinite)"


def _others(names: list[str]) -> str:
    return f", nor were {len(names) - 1} more." if len(names) > 1 else "."


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled code does not call hooks that were registered after it was compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield
