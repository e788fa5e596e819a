"""What a mixin is: new parameters and the hooks that use them, in one class."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from sat_lightning import hooks

if TYPE_CHECKING:
    from sat_lightning.model.base import BaseModel
    from sat_lightning.nn.transformer import Transformer


class BaseMixin(nn.Module):
    """A change to a model: define methods named after the seams of `sat_lightning.hooks`.

    A plain method takes its seam; one marked `@non_conflict` receives `old_impl` and wraps what is there::

        class ScaleMLP(BaseMixin):
            def __init__(self, config):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(config.hidden_size))

            @non_conflict
            def mlp_forward(self, hidden_states, old_impl=None, **kw):
                return old_impl(hidden_states, **kw) * self.scale

    Once added, `self.transformer` is the backbone of the model.
    """

    transformer: Transformer
    #: Whether training freezes all else of the model, unless patterns over names say what trains.
    freezes_base: ClassVar[bool] = False
    #: Whether its parameters train also where another mixin freezes the base: heads of a new task.
    stays_trainable: ClassVar[bool] = False
    #: Whether `adapter_ids` of a call choose the rows that it changes. None: it is part of the model, as a head is.
    tells_rows_apart: bool | None = None
    #: Whether every linear it holds is run by `run_linear`, so that adapters of weights reach it.
    runs_linears: ClassVar[bool] = False
    #: Whether it remembers modules of the model that holds it, so that a second one cannot hold it too.
    is_of_one_model: ClassVar[bool] = False
    #: Patterns over names of the model's other parameters that train with it, as `\.bias$`.
    tuned_parameters: tuple[str, ...] = ()
    #: How many tokens it leaves in front of what an encoder returns to its decoder.
    num_kept_in_front: int = 0
    #: Whether its hooks are left out when a model resolves them; see `mixins.tuning`.
    _is_silent: bool = False
    _owner: BaseModel | None = None
    #: What the mixin was built with, (args, kwargs), so that a folder can say how to build it again.
    init_arguments: tuple[tuple[Any, ...], dict[str, Any]]
    non_conflict = staticmethod(hooks.non_conflict)
    replaceable = staticmethod(hooks.replaceable)
    replacable = staticmethod(hooks.replacable)

    def __new__(cls, *args: Any, **kwargs: Any) -> BaseMixin:
        """Note the arguments; a class need not."""
        mixin = super().__new__(cls)
        object.__setattr__(mixin, "init_arguments", (args, kwargs))
        return mixin

    def added_to(self, model: BaseModel) -> None:
        """Settle what depends on the model's modules, before its hooks are resolved; an error refuses to be added.

        Args:
            model: the model that is about to hold this mixin, with those that were added before.
        """

    def tuned_in(self, model: BaseModel) -> dict[str, nn.Parameter]:
        """Return those of a model's parameters that train with this mixin, by name; none of a method or a new head."""
        beside = tuple(f"mixins.{name}." for name, mixin in model.mixins.items() if mixin.stays_trainable)
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if any(re.search(pattern, name) for pattern in self.tuned_parameters) and not name.startswith(beside)
        }

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Set initial values that depend on trained modules, once those are loaded.

        Args:
            parent_model: the model this mixin was added to; its other mixins are within reach.
        """
