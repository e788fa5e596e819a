"""The memory of a generation that travels as `mems`: every layer's keys and values, the newest positions first to stay.

Legend: l layers, b rows, t positions held, s new positions, w width of a position, 2 * key/value heads * head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sat_lightning.errors import InputError


class Memory:
    """Grow `mems` `[l, b, t, w]` without copying it at every step; what was handed out is never written again.

    Args:
        mems: what is remembered at the beginning, or None.
        max_length: how many positions are kept after each extension, the newest.
        num_forgotten: positions of the text before those that `mems` holds.

    Raises:
        InputError: for a negative number.
    """

    def __init__(self, mems: Tensor | None, max_length: int, num_forgotten: int = 0) -> None:
        for name, value in (("max_memory_length", max_length), ("num_forgotten", num_forgotten)):
            if value < 0:
                raise InputError(f"{name} is {value}; it must be at least 0.")
        self.max_length = max_length
        self.first = num_forgotten
        """Where in the text the oldest position held stands."""
        self._buffer, self._start, self._stop = mems, 0, 0 if mems is None else mems.shape[2]

    @property
    def mems(self) -> Tensor | None:
        """What is held: a view `[l, b, t, w]`, or None at the beginning."""
        return None if self._buffer is None else self._buffer[:, :, self._start : self._stop]

    @property
    def next(self) -> int:
        """Where in the text the position behind the newest one stands."""
        return self.first + self._stop - self._start

    @property
    def num_rows(self) -> int:
        """Rows of what is held; 1 row serves any number."""
        return 1 if self._buffer is None else self._buffer.shape[1]

    def extend(self, new: Sequence[Tensor], num_to_come: int) -> None:
        """Append what a step gave, and forget what is too old.

        Args:
            new: for each layer `[b, s, w]`.
            num_to_come: how many positions may follow later, at most.
        """
        num_rows, num_new, _ = new[0].shape
        if self._buffer is None or self.num_rows != num_rows or self._stop + num_new > self._buffer.shape[2]:
            self._move(new, num_to_come)
        assert self._buffer is not None
        for layer, added in zip(self._buffer, new, strict=True):
            layer[:, self._stop : self._stop + num_new] = added
        self._stop += num_new
        surplus = max(self._stop - self._start - self.max_length, 0)
        self._start += surplus
        self.first += surplus

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from row `rows[i]`."""
        if self.mems is not None and self.num_rows > 1:
            self.replace(self.mems.index_select(1, rows))

    def replace(self, mems: Tensor) -> None:
        """Hold this in the place of what is held."""
        self._buffer, self._start, self._stop = mems, 0, mems.shape[2]

    def _move(self, new: Sequence[Tensor], num_to_come: int) -> None:
        """Make room: for all that may come, or where much of it is forgotten again, for as much as is kept."""
        held = self.mems
        num_rows, num_new, width = new[0].shape
        num_held = 0 if held is None else held.shape[2]
        room = num_held + num_new + min(num_to_come, max(self.max_length, num_new))
        buffer = new[0].new_empty(len(new), num_rows, room, width)
        if held is not None:
            buffer[:, :, :num_held] = held
        self._buffer, self._start, self._stop = buffer, 0, num_held
