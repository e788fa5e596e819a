"""A model: one backbone, mixins by name, and the table that says who answers at each seam.

Legend: b batch, s length, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sat_lightning.config import ConfigT, TransformerConfig
from sat_lightning.errors import ConfigError, HookError, InputError, nearest
from sat_lightning.hooks import RESERVED, HookTable, explain, resolve_hooks
from sat_lightning.model.adapter_ids import check_adapter_ids
from sat_lightning.model.keymap import KeyMap
from sat_lightning.model.mixin import BaseMixin
from sat_lightning.model.persistence import Persistent
from sat_lightning.nn.linear import Embedding
from sat_lightning.nn.masks import MaskLike, waiting_keys
from sat_lightning.nn.transformer import Transformer


class _Omitted:
    """Stands for an argument that was not given; None has a meaning of its own."""

    def __repr__(self) -> str:
        return "the family's own"


OMITTED: Any = _Omitted()


class BaseModel(Persistent, nn.Module):
    """A backbone and the mixins that change it.

    Args:
        config: the architecture.
        transformer: a backbone to share with another model. Default: a new one.
        **transformer_overrides: fields of `config` to change, and arguments of `Transformer` (`activation_func`,
            `layernorm`, `init_method`, `params_dtype`). They shape a new backbone; a shared one stays as it is.

    Calling the model, `logits, *outputs_per_layer = model(input_ids, position_ids, attention_mask, **kw)`:

    Args of the call:
        input_ids: `[b, s]`.
        position_ids: `[s]` or `[b|1, s]`. Omitted: the family's own.
        attention_mask: None (full), -1 or "causal", or a tensor `[s, t]` or `[b, 1, s|1, t]`, 1 is visible.
            Omitted: the family's own.
        **kw: reach every hook. The backbone itself knows `output_hidden_states`, `encoder_outputs`,
            `cross_attention_mask`, `log_attention_weights`, `target_ids` (see `sat_lightning.hooks.computes_loss`), and
            `token_indices` (see `sat_lightning.nn.unpadding`); methods of fine-tuning know `adapter_ids` `[b]`, for
            each row the number of the one that changes it (`TuningMixin.adapter_id`), -1 for none.

    Returns a list: what `final_forward` returned (logits `[b, s, v]`), then for each layer the dict of what hooks wrote
    to `output_this_layer`. A wrong shape, or a sequence longer than the position table, is an `InputError`.

    Raises:
        ConfigError: for an override that is neither, or contradicts the shared backbone.
        HookError: if the class itself defines a malformed hook.
    """

    config_class: ClassVar[type[TransformerConfig]] = TransformerConfig
    #: What an omitted `attention_mask` means in this family: None is full, "causal" is lower triangular.
    default_mask: ClassVar[MaskLike] = None
    #: What Hugging Face calls the tensors of this family, one table for each kind of file.
    key_maps: ClassVar[tuple[KeyMap, ...]] = ()
    hooks: HookTable

    def __init__(
        self,
        config: TransformerConfig,
        transformer: Transformer | None = None,
        **transformer_overrides: Any,
    ) -> None:
        super().__init__()
        config = read_config(config, self.config_class)
        self.mixins = nn.ModuleDict()
        if transformer is None:
            config, arguments = _split_overrides(config, transformer_overrides)
            transformer = Transformer(config, **arguments)
        else:
            _refuse_contradiction(transformer.config, transformer_overrides)
        self.config = config
        self.transformer = transformer
        self._resolve()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = OMITTED,
        attention_mask: MaskLike = OMITTED,
        **kw: Any,
    ) -> list[Any]:
        """Run the model; arguments, result and errors are described by the class."""
        if clash := kw.keys() & RESERVED:
            raise HookError(f"{sorted(clash)}: the backbone passes these keywords itself. Choose other names.")
        try:
            if kw.get("adapter_ids") is not None:
                check_adapter_ids(self, kw["adapter_ids"])
                kw["adapter_ids"] = torch.as_tensor(kw["adapter_ids"], device=input_ids.device)  # once for all linears
            if input_ids.dim() < 2:
                raise InputError(f"input_ids has shape {list(input_ids.shape)}; it must be [batch, length].")
            if position_ids is OMITTED:
                position_ids = self.make_position_ids(input_ids, **kw)
            if attention_mask is OMITTED:
                attention_mask = self.make_attention_mask(input_ids, **kw)
            else:
                attention_mask = self.read_attention_mask(attention_mask, input_ids)
            return self.transformer(input_ids, position_ids, attention_mask, hooks=self.hooks, **kw)
        except Exception as error:
            if not torch.compiler.is_compiling():
                self._add_provenance(error, input_ids, position_ids)
                if kw.get("token_indices") is not None:
                    _add_note(error, "token_indices were given: inside the layers hidden states are [1, tokens, c].")
            raise

    def make_position_ids(self, input_ids: Tensor, **kw: Any) -> Tensor | None:
        """Return the positions of a family whose caller gave none, `[1, s]`: 0, 1, 2, ..., or on from `mems`."""
        start = waiting_keys(kw)
        self.check_length(start + input_ids.shape[1])
        return torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]

    def make_attention_mask(self, input_ids: Tensor, **kw: Any) -> MaskLike:
        """Return the mask of a family whose caller gave none."""
        return self.default_mask

    def read_attention_mask(self, attention_mask: MaskLike, input_ids: Tensor) -> MaskLike:
        """Return a caller's mask as the backbone understands it; a family with forms of its own translates them."""
        return attention_mask

    def check_length(self, length: int) -> None:
        """Refuse a sequence that the learned position table cannot number."""
        config = self.config
        has_table = isinstance(self.transformer.position_embeddings, Embedding)
        if has_table and length > config.max_sequence_length:
            raise InputError(
                f"The sequence has {length} tokens, max_sequence_length is {config.max_sequence_length}. Shorten or "
                "split it, or build the model with a larger max_sequence_length."
            )

    @property
    def hook_origins(self) -> dict[str, str]:
        """Who answers at each seam: `{"attention_fn": "cache -> prefix -> default", ...}`."""
        return self.hooks.describe()

    def explain_hooks(self) -> str:
        """Return a table of every seam: its chain in call order, and where each hook is defined."""
        return explain(self.hooks)

    def add_mixin(self, name: str, new_mixin: BaseMixin, reinit: bool = False) -> None:
        """Add a mixin; a refused one leaves no trace.

        Args:
            name: its name, and its prefix in the state dict: `mixins.<name>.`.
            new_mixin: the mixin.
            reinit: call its `reinit` at once.

        Raises:
            HookError: if the name is taken, the object is no mixin or is in a model already, or a hook is malformed.
            HookConflictError: if it claims a seam that another plain hook holds.
        """
        if not isinstance(new_mixin, BaseMixin):
            raise HookError(f"'{name}' is a {type(new_mixin).__name__}, not a BaseMixin. Subclass BaseMixin.")
        if name in self.mixins:
            raise HookError(f"A mixin named '{name}' is there already. Call del_mixin('{name}'), or choose a name.")
        before = new_mixin.__dict__.get("transformer"), new_mixin._owner
        _refuse_a_second_home(name, new_mixin, self)
        _attach(new_mixin, self.transformer, self)
        try:
            new_mixin.added_to(self)
            self.mixins[name] = new_mixin
            self._resolve()
            if reinit:
                new_mixin.reinit(self)
        except BaseException:
            if self.mixins._modules.get(name) is new_mixin:
                self.del_mixin(name)
            _attach(new_mixin, *before)
            raise

    def del_mixin(self, name: str) -> None:
        """Remove a mixin and its hooks.

        Raises:
            HookError: if there is none of that name, or another mixin cannot stand without it.
        """
        mixin = self.get_mixin(name)
        order = list(self.mixins.items())
        del self.mixins[name]
        try:
            self._resolve()
        except HookError:
            self.mixins.clear()
            self.mixins.update(dict(order))
            raise
        _attach(mixin, None, None)

    def get_mixin(self, name: str) -> Any:
        """Return the mixin of that name.

        Raises:
            HookError: if there is none.
        """
        if name not in self.mixins:
            raise HookError(f"No mixin is named '{name}', there are {list(self.mixins)}.{nearest(name, self.mixins)}")
        return self.mixins[name]

    def reinit(self, mixin_names: list[str] | None = None) -> None:
        """Call `reinit` of the named mixins, or of all."""
        for name in self.mixins if mixin_names is None else mixin_names:
            self.get_mixin(name).reinit(self)

    def _resolve(self) -> None:
        speaking = {name: mixin for name, mixin in self.mixins.items() if not mixin._is_silent}
        object.__setattr__(self, "hooks", resolve_hooks(self.transformer, self, speaking))

    def _add_provenance(self, error: Exception, input_ids: Tensor, position_ids: Tensor | None) -> None:
        changed = [f"{seam} = {chain}" for seam, chain in self.hook_origins.items() if chain != "default"]
        _add_note(error, f"{type(self).__name__} hooks: {', '.join(changed) or 'all default'}")
        if isinstance(error, IndexError):
            _add_note(error, f"input_ids reach {_largest(input_ids)}, vocab_size is {self.config.vocab_size}.")
            _add_note(
                error,
                f"position_ids reach {_largest(position_ids)}, max_sequence_length is "
                f"{self.config.max_sequence_length}.",
            )


def _refuse_a_second_home(name: str, mixin: BaseMixin, model: BaseModel) -> None:
    """Refuse what adapts the linears of another backbone, or is in this model by another name."""
    owner = mixin._owner
    if mixin.is_of_one_model and owner is not None and (owner is model or owner.transformer is not model.transformer):
        held = next((own for own, one in owner.mixins.items() if one is mixin), name)
        raise HookError(
            f"'{name}' is in a {type(owner).__name__} already, as '{held}', and adapts what is there. Add a "
            f"copy.deepcopy of it, or call del_mixin('{held}') there first."
        )


def _attach(mixin: BaseMixin, transformer: Transformer | None, owner: BaseModel | None) -> None:
    """Tell a mixin where it is; neither is its submodule: the backbone is registered once, in the model."""
    object.__setattr__(mixin, "transformer", transformer)
    object.__setattr__(mixin, "_owner", owner)


def read_config(config: TransformerConfig, config_class: type[ConfigT]) -> ConfigT:
    """Return the configuration as the family's own class.

    A plain `TransformerConfig` becomes one: its `extra` holds the family's fields where it was read from a file, and
    what is at the plain default takes the family's.

    Raises:
        ConfigError: if it is no configuration.
    """
    if not isinstance(config, TransformerConfig):
        raise ConfigError(f"config is a {type(config).__name__}, it must be a {config_class.__name__}.")
    if isinstance(config, config_class):
        return config
    fields = [field for field in dataclasses.fields(config) if field.name != "extra"]
    given = {field.name: getattr(config, field.name) for field in fields}
    changed = {field.name: given[field.name] for field in fields if given[field.name] != field.default}
    return config_class.from_dict(changed | config.extra)


def _split_overrides(config: TransformerConfig, overrides: dict[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """Part overrides into fields of the configuration and arguments of the backbone."""
    names = {f.name for f in dataclasses.fields(config)}
    arguments = inspect.signature(Transformer.__init__).parameters.keys() - {"self", "config"}
    for name in overrides.keys() - names - arguments:
        raise ConfigError(
            f"'{name}' is neither a field of {type(config).__name__} nor an argument of Transformer."
            f"{nearest(name, names | arguments)}"
        )
    changes = {k: v for k, v in overrides.items() if k in names}
    return config.replace(**changes) if changes else config, {k: v for k, v in overrides.items() if k in arguments}


def _refuse_contradiction(config: TransformerConfig, overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        if getattr(config, name, value) != value:
            raise ConfigError(
                f"{name}={value!r} cannot change a backbone that stands with {getattr(config, name)!r}. Leave it out, "
                "or build the model without `transformer`."
            )


def _largest(ids: Any) -> object:
    return ids.max() if isinstance(ids, Tensor) and ids.numel() else None


def _add_note(error: Exception, note: str) -> None:
    """Append to the traceback (`add_note` is new in Python 3.11; before it the message itself grows)."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])
