"""Cuda2d's windows equal their definition, written out with one mask over all tokens; what it derives and refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.errors import ConfigError, InputError
from sat_lightning.models import Cuda2dModel
from tests.families import SIZES, ids
from tests.golden_cases import GOLDEN, Case

# Text, sides of the two images, kernel sizes: sides that do not divide, even kernels, windows wider than an image.
SHAPES = [(4, 3, 6, 3, 3), (2, 2, 5, 2, 2), (0, 3, 4, 4, 5), (3, 1, 3, 1, 1), (1, 4, 7, 5, 4)]


def build(text=2, side0=2, side1=5, kernel_size=2, kernel_size2=3, **changes):
    torch.manual_seed(0)
    first = text + side0**2
    options = {
        "layout": [text, first, first + side1**2],
        "max_sequence_length": first,
        "new_sequence_length": first + side1**2,
        "kernel_size": kernel_size,
        "kernel_size2": kernel_size2,
    }
    model = Cuda2dModel(Cuda2dModel.config_class(**(SIZES | options | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def seen_by_large(config):
    """What each token of the large image sees of all tokens: an own loop over places."""
    (side0, side1), (text, first, whole) = config.sides, config.layout
    seen = torch.zeros(whole - first, whole, dtype=torch.bool)
    size0, size1 = config.kernel_size2, config.kernel_size
    for query in range(side1**2):
        row, column = divmod(query, side1)
        for key in range(side0**2):
            down = key // side0 - row * side0 // side1 + size0 // 2
            right = key % side0 - column * side0 // side1 + size0 // 2
            seen[query, text + key] = 0 <= down < size0 and 0 <= right < size0
        window = [(r, c) for r in range(1 - size1, size1) for c in range(-(size1 // 2), size1 - size1 // 2)]
        for down, right in window[: (len(window) >> 1) + 1]:
            if 0 <= row + down < side1 and 0 <= column + right < side1:
                seen[query, first + (row + down) * side1 + column + right] = True
    return seen


def written_out(model, input_ids, mask):
    """The forward with dense scores over both parts."""
    backbone, config = model.transformer, model.config
    plus, first = model.get_mixin("attention_plus"), config.layout[1]
    table = torch.cat([
        backbone.position_embeddings.weight[:first],
        model.get_mixin("extra_position_embedding").position_embeddings.weight[: config.layout[2] - first],
    ])  # fmt: skip
    seen = torch.zeros(config.layout[2], config.layout[2], dtype=torch.bool)
    seen[:first, :first], seen[first:] = mask.bool(), seen_by_large(config)
    x = backbone.word_embeddings(input_ids) + table
    for layer_id, layer in enumerate(backbone.layers):
        normed = layer.input_layernorm(x)
        mixed = torch.cat(
            [layer.attention.query_key_value(normed[:, :first]), plus.query_key_value[layer_id](normed[:, first:])], 1
        )
        query, key, value = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in mixed.chunk(3, -1))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        context = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        context = context.transpose(1, 2).flatten(2)
        x = x + torch.cat([layer.attention.dense(context[:, :first]), plus.dense[layer_id](context[:, first:])], 1)
        inner = torch.nn.functional.gelu(layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x)), approximate="tanh")
        x = x + layer.mlp.dense_4h_to_h(inner)
    return backbone.final_layernorm(x) @ backbone.word_embeddings.weight.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_windows_equal_their_definition_with_gradients(shape, backend):
    model = build(*shape, attention_backend=backend)
    first, whole = model.config.layout[1:]
    input_ids = ids(2, whole)
    mask = torch.ones(first, first).tril()
    expected = written_out(model, input_ids, mask)
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for given in ({}, {"attention_mask": -1}, {"attention_mask": mask}, {"attention_mask": mask.bool()}):
        got = model(input_ids, **given)[0]
        assert_close(got, expected, atol=1e-5, rtol=1e-4)
    got.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_masks_are_about_the_first_part():
    model = build()
    first, whole = model.config.layout[1:]
    input_ids, mask = ids(2, whole), torch.rand(first, first) > 0.3
    mask |= torch.eye(first, dtype=torch.bool)
    assert_close(model(input_ids, attention_mask=mask)[0], written_out(model, input_ids, mask), atol=1e-5, rtol=1e-4)
    rows = torch.stack([mask, torch.ones(first, first, dtype=torch.bool).tril()])[:, None]
    got = model(input_ids, attention_mask=rows)[0]
    for row in range(2):
        assert_close(got[row], model(input_ids, attention_mask=rows[row, 0])[0][row], atol=1e-6, rtol=1e-5)
    full = model(input_ids, attention_mask=None)[0]
    assert_close(full, model(input_ids, attention_mask=torch.ones(2, 1, 1, first))[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(full, model(input_ids)[0], atol=1e-3)
    padding = torch.ones(2, 1, 1, first)
    padding[1, ..., 0] = 0
    hidden = mask.new_ones(first, first)
    hidden[:, 0] = False
    got = model(input_ids, attention_mask=padding)[0]
    assert_close(got[1], model(input_ids, attention_mask=hidden)[0][1], atol=1e-6, rtol=1e-5)
    assert_close(got[0], full[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_grouped_queries_and_dropout_of_weights():
    model = build(num_multi_query_heads=2, attention_dropout=0.5)
    wide = build(attention_dropout=0.5)
    whole, groups = model.config.layout[2], [0, 0, 1, 1]
    state = model.state_dict()
    for name in [name for name in state if "query_key_value" in name]:  # repeat each key and value head
        query, key, value = state[name].split([32, 16, 16])
        state[name] = torch.cat([query, *(x.unflatten(0, (2, 8))[groups].flatten(0, 1) for x in (key, value))])
    wide.load_state_dict(state)
    assert_close(model(ids(2, whole))[0], wide(ids(2, whole))[0], atol=1e-5, rtol=1e-4)
    model.train()
    assert not torch.allclose(model(ids(2, whole))[0], model(ids(2, whole))[0], atol=1e-3)


@pytest.mark.parametrize("names", [None, {0: "extra_position_embedding", 1: "attention_plus"}])
def test_numbered_mixins_of_old_files_are_named(names, tmp_path):
    """As SAT wrote this family before v0.1: the mixins by number."""
    case = Case("cuda2d")
    numbers = {"mixins.extra_position_embedding.": "mixins.0.", "mixins.attention_plus.": "mixins.1."}
    state = load_file(GOLDEN / "cuda2d" / "model.safetensors")
    for name in list(state):
        for new, old in numbers.items():
            if name.startswith(new):
                state[name.replace(new, old)] = state.pop(name)
    (tmp_path / "1").mkdir()
    torch.save({"module": state}, tmp_path / "1" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("1")
    values = json.loads((GOLDEN / "cuda2d" / "model_config.json").read_text())
    (tmp_path / "model_config.json").write_text(json.dumps(values))
    case.model = AutoModel.from_pretrained(tmp_path, **({} if names is None else {"mixin_names": names}))
    case.check()
    assert case.model.load_report.renamed == (
        "mixins.0.* -> mixins.extra_position_embedding.*",
        "mixins.1.* -> mixins.attention_plus.*",
    )


@torch.no_grad()
def test_the_large_image_may_begin_with_the_projections_of_the_small_one():
    model = build()
    model.reinit(["attention_plus"])
    plus = model.get_mixin("attention_plus")
    for layer_id, layer in enumerate(model.transformer.layers):
        assert torch.equal(plus.query_key_value[layer_id].weight, layer.attention.query_key_value.weight)
        assert torch.equal(plus.dense[layer_id].bias, layer.attention.dense.bias)


def test_layouts_are_read_and_refused():
    config = Cuda2dModel.config_class
    assert config(layout="64,464,4064").sides == (20, 60)
    with pytest.raises(ConfigError, match=r"layout is \[4, 12, 48\]: it must be the ends of the text, of a square"):
        config(layout=[4, 12, 48])
    with pytest.raises(ConfigError, match=r"layout is \[4, 13\]: it must be"):
        config(layout=[4, 13])
    with pytest.raises(
        ConfigError, match=r"needs 464 \+ 3600 positions, there are 100 \(max_sequence_length\) \+ 4012"
    ):
        config(max_sequence_length=100)
    with pytest.raises(ConfigError, match="kernel sizes are 0 and 5, they must be above 0"):
        config(kernel_size=0)
    model = build()
    with pytest.raises(InputError, match=r"input_ids has 9 tokens, layout \[2, 6, 31\] has 31: text, small image"):
        model(ids())
