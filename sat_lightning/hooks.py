"""The seams of the forward, and who speaks at each of them.

A model is a backbone plus mixins; a mixin speaks by defining a method with the name of a seam::

    word_embedding_forward(input_ids, output_cross_layer, **kw)
      + position_embedding_forward(position_ids, output_cross_layer, **kw)
    for each layer:
        layer_forward(hidden_states, mask, **kw)
            attention_forward(hidden_states, mask, **kw)
                linear_forward(x, *, linear, name, layer_id, **kw)            query_key_value
                query_key_forward(query, key, **kw)                           rotary, QK-norm
                attention_fn(query, key, value, mask, dropout_fn, **kw)
                linear_forward(...)                                           dense
            cross_attention_forward(hidden_states, cross_attention_mask, encoder_outputs, **kw)
            mlp_forward(hidden_states, **kw)
                routing_forward(hidden_states, **kw)                          only with experts
                linear_forward(...)                                           dense_h_to_4h, dense_4h_to_h
    final_forward(logits, **kw)

Inside a layer `**kw` always holds `hooks`, `layer_id` (int), `position_ids`, `output_this_layer`,
`output_cross_layer` and every keyword of the model call. What a hook writes to `output_this_layer` leaves the model in
`outputs_per_layer[layer_id]`; what it writes to `output_cross_layer` is a keyword of the next layer's hooks. An
embedding hook that puts tokens in front of the sequence says so there, see `sat_lightning.nn.front`. Where a caller
gives `token_indices`, hidden states in layers are `[1, tokens, c]`, around attention `[b, s, c]` as ever: see
`sat_lightning.nn.unpadding`.

Who wins: the default, then the model's own methods, then mixins in the order added. A plain hook takes a seam only
from the default or from a `@replaceable` hook; a `@non_conflict` hook receives `old_impl` and wraps what is there, or,
where it is `@innermost` too, what answers last.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from sat_lightning.errors import HookConflictError, HookError

Hook = Callable[..., Any]
HookT = TypeVar("HookT", bound=Hook)

#: Keywords that the backbone passes itself; a hook may not carry them to the next layer, nor a caller pass them.
RESERVED = frozenset(
    "hooks layer_id position_ids output_this_layer output_cross_layer old_impl causal_mask full_mask binary_masks "
    "rotary unpadding".split()
)


def non_conflict(hook: HookT) -> HookT:
    """Mark a hook as one that wraps: it receives `old_impl`, whatever held the seam before it."""
    hook.non_conflict = True  # type: ignore[attr-defined]
    return hook


def replaceable(hook: HookT) -> HookT:
    """Mark a hook as one that a later plain hook may replace (with a warning)."""
    hook.replaceable = True  # type: ignore[attr-defined]
    return hook


replacable = replaceable  # SAT's spelling


def innermost(hook: HookT) -> HookT:
    """Mark a wrapping hook as one that wraps what answers last, and not what other hooks make of that."""
    hook.innermost = True  # type: ignore[attr-defined]
    return hook


def computes_loss(hook: HookT) -> HookT:
    """Mark a `final_forward` that, given `target_ids`, returns the mean cross entropy and never builds the logits."""
    hook.computes_loss = True  # type: ignore[attr-defined]
    return hook


def passes_mask(hook: HookT) -> HookT:
    """Mark a hook that never reads the mask it hands on: no `[s, s]` tensor is then made for its sake."""
    hook.passes_mask = True  # type: ignore[attr-defined]
    return hook


@dataclass(frozen=True, eq=False)
class HookTable:
    """Who answers at each seam: resolved once per change of a model's mixins, then only read.

    `None` at a seam inside the layers means that nobody spoke and the module answers for itself; so untouched layers
    share one compiled graph and pay nothing.
    """

    word_embedding_forward: Hook
    position_embedding_forward: Hook
    layer_forward: Hook | None
    attention_forward: Hook | None
    query_key_forward: Hook | None
    attention_fn: Hook
    cross_attention_forward: Hook | None
    mlp_forward: Hook | None
    routing_forward: Hook | None
    linear_forward: Hook | None
    final_forward: Hook
    origins: Mapping[str, tuple[str, ...]]
    """For each seam the owners in call order, outermost first, ending in `default` or the hook that replaced it."""
    implementations: Mapping[str, tuple[Hook, ...]]
    """For each seam the functions behind `origins`, in the same order."""
    reads_mask: bool
    """Whether any hook sees the attention mask, so that it must be a real tensor of its full shape."""
    looks_up_positions: bool
    """Whether `position_ids` are rows of the default's position table, and nothing else."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle through plain dicts; bound methods follow their owners, so a copy's hooks are the copy's."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _rebuild_table, (
            values | {"origins": dict(self.origins), "implementations": dict(self.implementations)},
        )

    @property
    def computes_loss(self) -> bool:
        """Whether the final hook can turn `target_ids` into a loss without building the logits."""
        return getattr(self.final_forward, "computes_loss", False)

    def describe(self) -> dict[str, str]:
        """Return each seam's chain, outermost first: `{"attention_fn": "cache -> prefix -> default"}`."""
        return {seam: " -> ".join(owners) for seam, owners in self.origins.items()}


_FACTS = ("origins", "implementations", "reads_mask", "looks_up_positions")
SEAMS: tuple[str, ...] = tuple(f.name for f in fields(HookTable) if f.name not in _FACTS)
_MAY_BE_SILENT = frozenset(
    "layer_forward attention_forward query_key_forward cross_attention_forward mlp_forward routing_forward "
    "linear_forward".split()
)


def resolve_hooks(backbone: object, model: object = None, mixins: Mapping[str, object] | None = None) -> HookTable:
    """Decide who answers at each seam; pure, so that a refusal changes nothing.

    Args:
        backbone: holds the default of every seam as a method of that name.
        model: speaks first, as if it were a mixin placed before all others.
        mixins: by name, in the order added.

    Returns:
        The immutable table.

    Raises:
        HookConflictError: if two plain hooks claim one seam.
        HookError: if a wrapping hook takes no `old_impl`, or a method's name almost is a seam's.
    """
    owners = ([] if model is None else [("model", model)]) + list((mixins or {}).items())
    for name, owner in owners:
        _refuse_misspelt(name, owner)
    table: dict[str, Hook | None] = {}
    origins: dict[str, tuple[str, ...]] = {}
    implementations: dict[str, tuple[Hook, ...]] = {}
    for seam in SEAMS:
        chain = _chain(seam, getattr(backbone, seam), owners)
        origins[seam] = tuple(owner for owner, _ in chain)
        implementations[seam] = tuple(hook for _, hook in chain)
        table[seam] = None if origins[seam] == ("default",) and seam in _MAY_BE_SILENT else _compose(chain)
    own = [
        hook
        for seam in ("layer_forward", "attention_forward", "attention_fn")
        for name, hook in zip(origins[seam], implementations[seam], strict=True)
        if name != "default"
    ]
    return _rebuild_table(
        {
            **table,
            "origins": origins,
            "implementations": implementations,
            "reads_mask": any(not getattr(hook, "passes_mask", False) for hook in own),
            "looks_up_positions": origins["position_embedding_forward"] == ("default",),
        }
    )


def _rebuild_table(values: dict[str, Any]) -> HookTable:
    frozen = {name: MappingProxyType(values[name]) for name in ("origins", "implementations")}
    return HookTable(**(values | frozen))


def _chain(seam: str, default: Hook, owners: list[tuple[str, object]]) -> list[tuple[str, Hook]]:
    """Return the hooks of one seam, outermost first."""
    chain: list[tuple[str, Hook]] = [("default", default)]
    for name, owner in owners:
        hook = getattr(owner, seam, None)
        if hook is None:
            continue
        holder, held = chain[0]
        if getattr(hook, "non_conflict", False):
            _require_old_impl(seam, name, hook)
            chain.insert(len(chain) - 1 if getattr(hook, "innermost", False) else 0, (name, hook))
        elif holder == "default" or (len(chain) == 1 and getattr(held, "replaceable", False)):
            if holder != "default":
                warnings.warn(f"{seam}: '{name}' replaces '{holder}', which is @replaceable.", stacklevel=4)
            chain = [(name, hook)]
        else:
            raise HookConflictError(_conflict(seam, name, [owner for owner, _ in chain]))
    return chain


def _conflict(seam: str, name: str, held_by: list[str]) -> str:
    wrap = f"or let '{name}' wrap it with @non_conflict."
    if len(held_by) > 1:
        cure = f"Add '{name}' before '{held_by[-2]}', {wrap}"
    elif held_by == ["model"]:
        cure = f"Mark the model's method @replaceable, {wrap}"
    else:
        cure = f"Call del_mixin('{held_by[0]}') first, or mark it @replaceable, {wrap}"
    return f"{seam}: '{name}' cannot take the seam, '{' -> '.join(held_by)}' holds it. {cure}"


def _compose(chain: list[tuple[str, Hook]]) -> Hook:
    impl = chain[-1][1]
    for _, hook in reversed(chain[:-1]):
        impl = partial(hook, old_impl=impl)
    return impl


def _require_old_impl(seam: str, name: str, hook: Hook) -> None:
    if "old_impl" not in inspect.signature(hook).parameters:
        raise HookError(
            f"{seam}: '{name}' is @non_conflict but has no parameter 'old_impl'. "
            "Add it, and call it to run what the hook wraps."
        )


def _refuse_misspelt(name: str, owner: object) -> None:
    """Refuse a public method whose name is within two edits of a seam's: it would never be called."""
    for base in type(owner).__mro__:
        if base.__module__.startswith(("torch.", "sat_lightning.model.")) or base is object:
            continue
        for attribute, value in vars(base).items():
            if attribute.startswith("_") or attribute in SEAMS or not callable(value):
                continue
            for seam in SEAMS:
                if abs(len(seam) - len(attribute)) <= 2 and _edit_distance(attribute, seam) <= 2:
                    raise HookError(
                        f"'{name}' defines '{attribute}', which no seam is called. Did you mean '{seam}'? "
                        f"Rename it, or start the name with an underscore if it is no hook."
                    )


def _edit_distance(left: str, right: str) -> int:
    """Count the insertions, deletions and substitutions between two words (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def describe_source(hook: Hook) -> str:
    """Return `file:line` of a hook's definition, or its type's name where there is no source."""
    function = inspect.unwrap(getattr(hook, "__func__", hook))
    try:
        return f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        return type(hook).__name__


def explain(table: HookTable) -> str:
    """Return a table of the seams: name, owners in call order, file and line of each owner's function."""
    rows = [("seam", "chain (outermost first)", "defined at")]
    for seam in SEAMS:
        where = [describe_source(hook) for hook in table.implementations[seam]]
        rows.append((seam, " -> ".join(table.origins[seam]), where[0]))
        rows += [("", "", place) for place in where[1:]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{seam:<{widths[0]}}  {chain:<{widths[1]}}  {place}".rstrip() for seam, chain, place in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
