"""A model that reads rows which stand at different places.

Legend: b rows, s tokens read at once, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_lightning.generation.runner import Runner


class RaggedReader:
    """Reads several tokens of each row at once, and forgets of each row what it should not have read.

    Args:
        runner: that has read the prompts.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner, self.cache = runner, runner.cache
        self.counts = [len(row) for row in runner.rows]
        """Tokens that each row holds."""
        self.length = runner.num_prompt
        """Slots held; the newest token of each row is in the last."""
        self.padding = [runner.num_prompt - count for count in self.counts]
        """Slots in front of each prompt."""
        self._next = self._columns()

    def read(self, ids: Tensor) -> Tensor:
        """Read the next tokens `[b, s]` of each row; returns logits `[b, s, v]`."""
        runner, size = self.runner, ids.shape[1]
        kw = {**runner.keywords, "num_logits": size}
        call: Any = runner.model.decode if runner.writer is not runner.model else runner.model
        outputs = call(ids, position_ids=self._places(size), attention_mask="causal", cache=self.cache, **kw)
        self.cache.advance(size)
        return outputs[0]

    def _places(self, size: int) -> Tensor | None:
        """Positions of the next tokens: what the layout has in the column where each row would be if it were alone."""
        table = self.runner.positions
        if table is None:
            return None
        num_new = self.cache.length - self.length
        columns = self._next[:, None] + torch.arange(num_new, num_new + size, device=table.device)
        columns = columns.clamp(max=table.shape[-1] - 1)  # behind a row's end nothing counts
        table = table.expand(len(columns), *table.shape[1:])
        shape = (len(columns), *[1] * (table.dim() - 2), size)
        return table.gather(-1, columns.view(shape).expand(*table.shape[:-1], size))

    def keep(self, counts: list[int], is_active: list[bool]) -> None:
        """Forget what was read beyond `counts` tokens of each row, and align those that are not done."""
        ends = [self.length + new - old for new, old in zip(counts, self.counts, strict=True)]
        active = [row for row, active in enumerate(is_active) if active]
        length, device = ends[active[0]], self.runner.device
        # Nothing moves while the rows end in one slot, with no more in front of them than the prompts' padding was.
        if any(ends[row] != length or ends[row] - counts[row] > self.padding[row] for row in active):
            length = max(counts[row] for row in active)
            held = torch.tensor(counts, device=device).clamp(max=length)
            self.cache.align(torch.tensor(ends, device=device), held, length)
        self.cache.crop(length)
        self.counts, self.length = counts, length
        self._next = self._columns()  # once, where the device is waited for in any case

    def _columns(self) -> Tensor:
        """`[b]`, the columns of the layout behind the tokens that each row holds."""
        held = [count + padding for count, padding in zip(self.counts, self.padding, strict=True)]
        return torch.tensor(held, device=self.runner.device)
