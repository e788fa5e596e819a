"""What a training run does with methods of fine-tuning, and the formulas of adapters and heads."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from sat_lightning import AutoModel, BaseModel, TransformerConfig
from sat_lightning.checkpoint import load_checkpoint, save_sat
from sat_lightning.errors import ConfigError, HookError, InputError
from sat_lightning.mixins import AdapterMixin, FFADDMixin, MLPHeadMixin, NoMixin, PrefixTuningMixin, TaskHeadsMixin
from sat_lightning.mixins.mlp_head import pool
from sat_lightning.models import GPT2Model, T5Model
from sat_lightning.training import OptimConfig, SATLightningModule
from sat_lightning.training.freezing import freeze_base
from tests.families import FAMILIES
from tests.methods import METHODS
from tests.training_examples import changed_names, counting_loader, make_model, make_task, make_trainer, parameters_of

TINY = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=60, max_sequence_length=24)


def fit(task, num_steps=2):
    task.configure_model()
    before = parameters_of(task.model)
    make_trainer(num_steps).fit(task, counting_loader(16))
    return changed_names(before, task.model), before


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].is_head])
def test_a_run_changes_exactly_what_the_method_declares(method):
    """Two steps, as those that start at 0 give their other half no gradient in the first."""
    roomy = functools.partial(make_model, max_sequence_length=20)  # for a prompt, too
    task = make_task(roomy, mixins={"tuned": METHODS[method].make}, optim=OptimConfig(learning_rate=1e-2))
    changed, before = fit(task)
    words = {"bitfit": ("bias",), "layernorm": ("norm",)}.get(method, ("mixins.tuned.",))
    declared = {name for name in before if any(word in name for word in words)}
    assert changed == declared


def test_what_was_added_trains_beside_a_method_and_the_familys_own_head_does_not():
    factories = {"prefix": METHODS["prefix"].make, "extra": functools.partial(FFADDMixin, r=2)}
    task = make_task(mixins=factories)
    task.configure_model()
    trained = {name.split(".")[1] for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained == {"prefix", "extra"}


def test_patterns_have_the_last_word():
    prefix = {"prefix": METHODS["prefix"].make}
    task = make_task(mixins=prefix, trainable=[r"^mixins\.prefix", r"layers\.1\.mlp"])
    changed, before = fit(task)
    assert changed == {name for name in before if "prefix" in name or "layers.1.mlp" in name}
    task = make_task(mixins=prefix, frozen=[r"prefix\.0"])
    changed, _ = fit(task)
    assert changed == {"mixins.prefix.prefix.1"}
    with pytest.raises(ConfigError, match=r"trainable: 'mixins\\.prefxi' matches no parameter"):
        make_task(mixins=prefix, trainable=[r"mixins\.prefxi"]).configure_model()
    with pytest.raises(ConfigError, match="leave nothing to train"):
        make_task(mixins=prefix, frozen=["prefix"]).configure_model()


def test_a_disabled_method_neither_freezes_nor_trains():
    model = make_model()
    model.add_mixin("prefix", PrefixTuningMixin(model.config, 2))
    model.get_mixin("prefix").disable()
    freeze_base(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.add_mixin("adapter", AdapterMixin(model.config, 2))
    freeze_base(model)
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"adapter"}


def test_a_method_on_one_part_freezes_the_whole():
    model = FAMILIES["t5"].build()
    assert isinstance(model, T5Model)
    model.add_mixin("decoder.prefix", PrefixTuningMixin(model.decoder.config, 2))
    freeze_base(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder.mixins.prefix.prefix.0", "decoder.mixins.prefix.prefix.1"}


def test_a_mixin_of_a_part_is_built_with_the_configuration_of_the_part():
    family = FAMILIES["encoder-decoder"]
    build = functools.partial(family.build, dec_num_layers=1, dec_hidden_size=24, dec_num_attention_heads=3)
    factories = {"encoder.prefix": PrefixTuningMixin, "decoder.prefix": PrefixTuningMixin}
    task = SATLightningModule(build, mixins=factories)
    task.configure_model()
    assert [tuple(p.shape) for p in task.model.decoder.mixins["prefix"].parameters()] == [(2, 3, 16, 8)]
    assert len(list(task.model.encoder.mixins["prefix"].parameters())) == 2


def test_no_mixin_removes_a_mixin_for_another_head_to_take_its_place():
    task = make_task(mixins={"gpt2-final": NoMixin, "head": lambda c: MLPHeadMixin(c, 5)})
    task.configure_model()
    assert task.model.hook_origins["final_forward"] == "head"
    with pytest.raises(HookError, match="No mixin is named 'gpt2-finl'.*Did you mean 'gpt2-final'"):
        make_task(mixins={"gpt2-finl": NoMixin}).configure_model()


def test_init_from_does_without_a_head_that_was_removed(tmp_path):
    from sat_lightning.training.initialise import init_from

    base = make_model()
    base.save_pretrained(tmp_path)
    task = make_task(mixins={"gpt2-final": NoMixin, "head": lambda c: MLPHeadMixin(c, 5)})
    init_from(task, tmp_path)
    task.configure_model()
    assert_close(task.model.transformer.state_dict(), base.transformer.state_dict(), atol=0, rtol=0)


def bottleneck(mixin, numbers, layer_id, x):
    down, up = (getattr(mixin, f"ff{number}")[layer_id] for number in numbers)
    return F.linear(F.gelu(F.linear(x, down.weight, down.bias)), up.weight, up.bias)


def layer_by_hand(model, mixin, layer_id, x, order):
    """One layer with adapters, from the parts of the base."""
    layer, is_parallel = model.transformer.layers[layer_id], mixin.is_parallel

    def attend(x):
        mixed = layer.attention.query_key_value(x)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in mixed.split(32, -1))
        output = layer.attention.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return output + bottleneck(mixin, (1, 2), layer_id, x if is_parallel else output)

    def feed(x):
        output = layer.mlp.dense_4h_to_h(F.gelu(layer.mlp.dense_h_to_4h(x), approximate="tanh"))
        return output + bottleneck(mixin, (3, 4), layer_id, x if is_parallel else output)

    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if order == "post":
        x = first(x)
        x = second(x + attend(x))
        return x + feed(x)
    third, fourth = (layer.third_layernorm, layer.fourth_layernorm) if order == "sandwich" else (lambda y: y,) * 2
    x = x + third(attend(first(x)))
    return x + fourth(feed(second(x)))


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("order", ["pre", "post", "sandwich"])
def test_adapters_equal_the_formula_in_every_order_of_norms(order, is_parallel):
    torch.manual_seed(0)
    config = TINY.replace(layernorm_order=order)
    model = BaseModel(config).eval()
    mixin = AdapterMixin(config, 6, is_parallel=is_parallel)
    model.add_mixin("adapter", mixin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        ids = torch.randint(0, 60, (2, 9))
        x = model.transformer.word_embeddings(ids) + model.transformer.position_embeddings(torch.arange(9))
        for layer_id in range(2):
            x = layer_by_hand(model, mixin, layer_id, x, order)
        expected = model.transformer.final_layernorm(x) @ model.transformer.word_embeddings.weight.T
        assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-5)
    assert not model.hooks.reads_mask, "an [s, s] tensor would be made for a causal mask"


def test_adapters_of_sat_run_their_layers_as_sat_does_and_ours_as_the_model_does(tmp_path):
    torch.manual_seed(0)
    config = TINY.replace(layernorm_order="pre")
    post = BaseModel(config.replace(layernorm_order="post")).eval()
    post.add_mixin("adapter", AdapterMixin(post.config, 6))
    with torch.no_grad():
        for parameter in post.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(0, 60, (2, 9))
    file = tmp_path / "sat" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save({"module": post.state_dict()}, file)

    model = BaseModel(config).eval()
    model.add_mixin("adapter", AdapterMixin(config, 6))
    report = load_checkpoint(model, file)
    assert report.renamed == ("mixins.adapter: its layers run in post order, as SAT's do whatever layernorm_order is",)
    assert_close(model(ids)[0], post(ids)[0], atol=1e-6, rtol=1e-5)
    assert not model.hooks.reads_mask
    model.get_mixin("adapter").disable()
    assert not torch.allclose(model(ids)[0], post(ids)[0], atol=1e-2), "without it the model keeps its own order"
    model.get_mixin("adapter").enable()
    for name, write in (("native", model.save_pretrained), ("of_ours", lambda folder: save_sat(model, folder))):
        write(tmp_path / name)
        again = AutoModel.from_pretrained(tmp_path / name)
        assert_close(again(ids)[0], post(ids)[0], atol=1e-6, rtol=1e-5)
        assert_close(copy.deepcopy(again)(ids)[0], post(ids)[0], atol=1e-6, rtol=1e-5)

    ours = BaseModel(config).eval()
    ours.add_mixin("adapter", AdapterMixin(config, 6))
    save_sat(ours, tmp_path / "own")
    assert load_checkpoint(ours, tmp_path / "own").renamed == ()
    assert ours.hooks.layer_forward is None


def test_adapters_at_one_place_leave_the_other():
    model = BaseModel(TINY)
    model.add_mixin("adapter", AdapterMixin(TINY, 6, places=["mlp"]))
    assert {name.split(".")[0] for name, _ in model.get_mixin("adapter").named_parameters()} == {"ff3", "ff4"}
    model(torch.arange(4)[None])[0].square().mean().backward()
    with pytest.raises(ConfigError, match="places: 'atention' is none.*Did you mean 'attention'"):
        AdapterMixin(TINY, 6, places=["atention"])


def test_wrong_settings_say_what_is_right():
    with pytest.raises(ConfigError, match="adapter_hidden is 0"):
        AdapterMixin(TINY, 0)
    with pytest.raises(ConfigError, match=r"layer_range is \[2\]; layers are 0 to 1"):
        FFADDMixin(TINY, 4, [2])
    with pytest.raises(ConfigError, match="r is 0"):
        FFADDMixin(TINY, 0)
    with pytest.raises(ConfigError, match=r"MLPHeadMixin\(model.config, ...\)"):
        MLPHeadMixin("32", 20, 3)
    with pytest.raises(ConfigError, match="activation is 'rellu'.*Did you mean 'relu'"):
        MLPHeadMixin(TINY, 3, activation="rellu")
    with pytest.raises(ConfigError, match="pooling is 'max'"):
        MLPHeadMixin(TINY, 3, pooling="max")
    with pytest.raises(ConfigError, match="output_sizes is"):
        MLPHeadMixin(TINY)
    with pytest.raises(ConfigError, match="heads is empty"):
        TaskHeadsMixin(TINY, {})


@pytest.mark.parametrize("is_left", [False, True])
def test_pooling_knows_padding(is_left):
    torch.manual_seed(0)
    rows = [torch.randn(1, length, 8) for length in (3, 5)]
    padded = torch.full((2, 5, 8), 1e4)
    mask = torch.zeros(2, 5, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(5 - row.shape[1], 5) if is_left else slice(0, row.shape[1])
        padded[index, place], mask[index, place] = row[0], 1
    for pooling in ("first", "last", "mean"):
        got = pool(padded, pooling, mask)
        assert_close(got, torch.cat([pool(row, pooling) for row in rows]))
    assert_close(pool(rows[0], "last"), rows[0][:, -1])
    assert_close(pool(rows[0], "first"), rows[0][:, 0])
    assert_close(pool(rows[0], "mean"), rows[0].mean(1))


def test_task_heads_answer_by_name_and_leave_the_models_own():
    model = GPT2Model(TINY)
    ids = torch.randint(0, 60, (2, 9))
    own = model(ids)[0]
    model.add_mixin("heads", TaskHeadsMixin(TINY, {"topic": 3, "mood": [7, 2]}, pooling="mean", activation="tanh"))
    assert torch.equal(model(ids)[0], own)
    assert model(ids, task="topic")[0].shape == (2, 3)
    assert model(ids, task="mood")[0].shape == (2, 2)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    causal = torch.ones(9, 9).tril()
    short = model(ids[:1, :4], task="topic")[0]
    assert_close(model(ids, attention_mask=causal, task="topic", token_mask=mask)[0][:1], short)
    with pytest.raises(InputError, match=r"task is 'topics', the heads are \['topic', 'mood'\].*Did you mean 'topic'"):
        model(ids, task="topics")
    targets = torch.randint(0, 60, (2, 9))
    assert model(ids, target_ids=targets)[0].dim() == 0, "the loss without logits is still there"


def test_a_head_of_a_list_is_one_of_arguments():
    torch.manual_seed(0)
    one = MLPHeadMixin(TINY, 7, 3, activation="gelu")
    torch.manual_seed(0)
    two = MLPHeadMixin(TINY, sizes=[7, 3], activation="gelu")
    x = torch.randn(2, 5, 32)
    assert torch.equal(one.final_forward(x), two.final_forward(x))
    expected = F.linear(F.gelu(one.layers[0](x)), one.layers[1].weight, one.layers[1].bias)
    assert_close(one.final_forward(x), expected)
