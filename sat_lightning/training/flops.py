"""The arithmetic of a batch, counted from the shapes of a model: what model FLOPs utilisation (MFU) sets against time.

For a batch of b sequences of s tokens, with a matrix of n weights W and p products a weight takes part in::

    forward    b s (sum over W of 2 n  +  layers * 4 * heads * head_size * v)       v keys seen by a query
    backward   as much again for the gradients of the inputs, of W and of attention's three inputs twice
               the 2 n of a weight's own gradient only where it trains

v is s, or (s + 1) / 2 where the family's own mask is causal. Gradients flow down to the first layer in which something
trains; what lies below runs forwards only. Of several experts those count that a token is sent to. Embedding tables
are looked up and cost nothing, except one that is also the head. Norms, activations and biases are left out (Kaplan et
al. 2020, arXiv:2001.08361), and so is what activation checkpointing computes again: MFU counts what had to be done.
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from sat_lightning.model import AnyModel, BaseModel, ComposedModel
from sat_lightning.nn.mlp import MLP

_LAYER = re.compile(r"\btransformer\.layers\.(\d+)\.")


def count_flops(model: AnyModel, num_rows: int, length: int, *, is_training: bool) -> int:
    """Estimate the arithmetic of one batch; the formula stands at the top of this file.

    Args:
        model: gives the sizes; the parts of a composed model are added up, each as if it read the whole batch. Cross
            attention is taken to read as many tokens as it writes.
        num_rows: sequences.
        length: tokens of each.
        is_training: with the backward pass.

    Returns:
        Floating point operations; a product and its sum are two.
    """
    if isinstance(model, ComposedModel):
        parts = model.parts.values()
        return sum(count_flops(part, num_rows, length, is_training=is_training) for part in parts)
    config = model.config
    first = _first_trained(model) if is_training else config.num_layers + 2
    per_token = 0.0
    for place, share, weight in _matrices(model):
        num_products = (
            1 + (is_training and weight.requires_grad) + _needs_input_gradient(place, first, config.num_layers)
        )
        per_token += 2 * num_products * share * size_of(weight)
    visible = (length + 1) / 2 if model.default_mask in ("causal", -1) else length
    for layer_id in range(config.num_layers):
        width = config.head_size * visible
        if config.layer_is_decoder(layer_id):
            width += config.cross_head_size * length
        per_token += (3 if layer_id >= first else 1) * 4 * config.num_attention_heads * width
    return round(num_rows * length * per_token)


def size_of(parameter: Tensor) -> int:
    """Return the number of elements of a parameter, also where ZeRO-3 has left an empty shell of it.

    Args:
        parameter: whole or sharded.
    """
    state = getattr(parameter, "quant_state", None)  # of 4 bits, two in a byte
    size: int = getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()
    return size


def bytes_of(parameter: Tensor) -> int:
    """Return the bytes of a parameter, whole.

    Args:
        parameter: whole or sharded.
    """
    is_packed = getattr(parameter, "quant_state", None) is not None
    return (parameter.numel() if is_packed else size_of(parameter)) * parameter.element_size()


def _matrices(model: BaseModel) -> Iterator[tuple[int, float, Tensor]]:
    """Yield what every token is multiplied by: its place, the share of tokens, the weight."""
    # With duplicates: a layer used twice works twice, and a head tied to the embedding is a product like any other.
    experts: dict[nn.Module, float] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MLP) and module.num_experts > 1:
            num_chosen = getattr(model.config, "num_experts_per_tok", 2)
            experts |= dict.fromkeys(module.children(), min(num_chosen, module.num_experts) / module.num_experts)
        if isinstance(module, nn.Embedding):
            continue
        for own_name, parameter in module.named_parameters(recurse=False):
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            # A convolution has more than two; so have keys and values of a prefix, which are no matrix.
            if num_dimensions == 2 or (num_dimensions > 2 and isinstance(module, nn.modules.conv._ConvNd)):
                yield _place_of(f"{name}.{own_name}", model), experts.get(module, 1.0), parameter
    if "default" in model.hooks.origins["final_forward"]:
        yield model.config.num_layers + 1, 1.0, model.transformer.word_embeddings.weight


def _place_of(name: str, model: BaseModel) -> int:
    """Order parameters as a forward meets them: -1 embeddings, the layers, then the last norm, then the head."""
    if found := _LAYER.search(name):
        return int(found[1])
    if name.startswith("mixins."):
        mixin = name.split(".")[1]
        seams = [seam for seam, owners in model.hooks.origins.items() if mixin in owners]
        return model.config.num_layers + 1 if seams == ["final_forward"] else 0
    return -1 if "embeddings" in name else model.config.num_layers


def _first_trained(model: BaseModel) -> int:
    places = (_place_of(name, model) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return min(places, default=model.config.num_layers + 2)


def _needs_input_gradient(place: int, first: int, num_layers: int) -> bool:
    """Whether something trains before a matrix; the first layer in which something does counts whole."""
    return first < place or first == place < num_layers
