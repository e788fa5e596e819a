"""What the methods of fine-tuning share: they freeze the base, and can be switched off and weighed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, cast

from sat_lightning.errors import ConfigError, HookError
from sat_lightning.mixins.sat_form import refusal
from sat_lightning.model import BaseMixin

if TYPE_CHECKING:
    from sat_lightning.model import BaseModel


class TuningMixin(BaseMixin):
    """A method of fine-tuning: few parameters that train while the base stays as it is.

    A subclass is built by `XMixin(config, *, own settings)`. Training freezes everything but such mixins, and what
    their `tuned_parameters` name. One that is disabled is out of the forward, and costs nothing there.

    `adapter_ids` `[b]` of a call, a list or a tensor, names for each row the one method that changes it by its
    `adapter_id`, and -1 for none. An enabled method that reaches every row refuses such a call. A number of no method
    is an error in a list; in a tensor, which is not looked at, it is none.
    """

    freezes_base: ClassVar[bool] = True
    stays_trainable: ClassVar[bool] = True
    tells_rows_apart: bool | None = False
    #: The number by which `adapter_ids` of a call means it: one more than those of the model before. A file keeps it.
    #: None where it reaches every row.
    adapter_id: int | None = None
    #: The number it had when it was saved, which it gets where it is free.
    wanted_id: int | None = None
    _scale: float = 1.0

    def __new__(cls, *args: Any, **kwargs: Any) -> TuningMixin:
        """Refuse sizes in the place of the configuration, where SAT has no such class."""
        if args and isinstance(args[0], int) and cls.__module__.startswith("sat_lightning."):
            if not hasattr(cls.__init__, "__wrapped__"):
                raise ConfigError(refusal(cls.__name__, cls.__init__, args))
        return cast(TuningMixin, super().__new__(cls, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> TuningMixin:
        """Copy the method: with its model, as the copy's; by itself, without its model."""
        memo[id(self)] = twin = object.__new__(type(self))
        state = self.__dict__ if id(self._owner) in memo else self.__dict__ | self._free_state()
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def _free_state(self) -> dict[str, Any]:
        """Return what it would remember if it were in no model."""
        return {"_owner": None, "transformer": None}

    def added_to(self, model: BaseModel) -> None:
        """Take a number, if rows are told apart; a subclass with an `added_to` of its own calls this one."""
        others: list[Any] = [other for other in model.mixins.values() if other is not self]
        taken = [number for other in others if (number := getattr(other, "adapter_id", None)) is not None]
        is_free = self.wanted_id is not None and self.wanted_id not in taken
        number = self.wanted_id if is_free else 1 + max(taken, default=-1)
        self.adapter_id, self.wanted_id = number if self.tells_rows_apart else None, None

    @property
    def scale(self) -> float:
        """Factor to what the method adds: 1 as trained, 0 as if it were not there. A number, never a tensor."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value

    @property
    def enabled(self) -> bool:
        """Whether its hooks take part."""
        return not self._is_silent

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._set_silent(not value)

    def enable(self) -> None:
        """Take part again, at the same place among the model's mixins.

        Raises:
            HookConflictError: if another mixin has taken the seam meanwhile; this one then stays disabled.
        """
        self._set_silent(False)

    def disable(self) -> None:
        """Leave the forward, and keep the parameters.

        Raises:
            HookError: if another mixin cannot stand without this one, which then stays enabled.
        """
        self._set_silent(True)

    def _set_silent(self, is_silent: bool) -> None:
        before, self._is_silent = self._is_silent, is_silent
        try:
            if self._owner is not None:
                self._owner._resolve()
        except BaseException:
            self._is_silent = before
            raise


class BaseTuningMixin(TuningMixin):
    """Trains some parameters of the base itself, and has none of its own: it says which, by `tuned_parameters`."""

    def added_to(self, model: BaseModel) -> None:
        """Look whether the model has such parameters.

        Raises:
            HookError: if it has none.
        """
        if not self.tuned_in(model):
            raise HookError(
                f"{type(self).__name__}: {type(model).__name__} has no parameter that it would train, none matches "
                f"{' or '.join(self.tuned_parameters)}. Choose another method."
            )

    @property
    def scale(self) -> float:
        """Always 1: what was trained is in the base."""
        return 1.0

    @scale.setter
    def scale(self, value: float) -> None:
        raise HookError(
            f"{type(self).__name__} has no scale: it trains parameters of the base in place. Keep a copy of the base, "
            "or its file, to go back."
        )

    def disable(self) -> None:
        """Refuse: the base is what it is.

        Raises:
            HookError: always.
        """
        raise HookError(
            f"{type(self).__name__} cannot be disabled: it trains parameters of the base in place. Keep a copy of the "
            "base, or its file, to go back."
        )
