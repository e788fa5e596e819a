"""The configuration: SAT's files in and out, and every contradiction refused with its cure."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from sat_lightning import TransformerConfig
from sat_lightning.errors import ConfigError

GOLDEN = Path(__file__).parent / "data" / "golden"
SAT_OPTIONS = """
num_layers hidden_size num_attention_heads vocab_size max_sequence_length layernorm_order model_parallel_size
is_decoder cross_attn_hidden_size use_bias use_qkv_bias inner_hidden_size hidden_size_per_attention_head
cross_hidden_size_per_attention_head use_final_layernorm layernorm_epsilon num_multi_query_heads
cross_num_multi_query_heads row_parallel_linear_final_bias is_gated_mlp is_rotary_emb parallel_output num_experts
hidden_dropout attention_dropout drop_path checkpoint_activations checkpoint_num_layers checkpoint_skip_layers
""".split()


@dataclass(frozen=True, kw_only=True)
class FamilyConfig(TransformerConfig):
    """A family adds fields by subclassing."""

    num_types: int = 2
    """Rows of the type table."""


def test_every_option_of_sat_has_its_name():
    assert set(SAT_OPTIONS) <= {f.name for f in dataclasses.fields(TransformerConfig)}


def test_every_field_is_documented():
    lines = Path(__import__("sat_lightning.config").config.__file__).read_text().splitlines()
    for field in dataclasses.fields(TransformerConfig):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """'), f"{field.name} has no docstring under it"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/model_config.json")), ids=lambda path: path.parent.name)
def test_a_file_of_sat_is_read_and_written_back_as_it_was(path):
    file = json.loads(path.read_text())
    config = TransformerConfig.from_dict(file)
    written = config.to_dict()
    # SAT's T5 has an option of its own with the name and the default of one of ours, which need not be written.
    left_out = {name for name in file.keys() - written.keys() if file[name] == getattr(TransformerConfig(), name)}
    assert left_out <= {"init_method_std"}
    assert list(written.items()) == [(name, value) for name, value in file.items() if name not in left_out]
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict(everything=True)))) == config


def test_defaults_stay_out_of_the_file_and_everything_brings_them_in():
    config = TransformerConfig(use_bias=False, hidden_dropout=0.1, rope_scaling={"rope_type": "linear", "factor": 2.0})
    written = config.to_dict(model_class="GPT2Model")
    assert next(iter(written.items())) == ("model_class", "GPT2Model")
    assert written["use_bias"] is False
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "hidden_dropout" not in written
    assert "is_decoder" not in written
    everything = config.to_dict(everything=True)
    assert everything["hidden_dropout"] == 0.1
    assert set(SAT_OPTIONS) <= everything.keys()


def test_a_family_writes_its_own_options_always():
    config = FamilyConfig(num_layers=2)
    assert config.to_dict()["num_types"] == 2
    assert FamilyConfig.from_dict(config.to_dict()) == config


def test_unknown_keys_are_kept_or_refused_never_dropped():
    file = {
        "num_layers": 2,
        "model_class": "GPT2Model",
        "tokenizer_type": "fake",
        "bert_prob": 0.5,
        "eva_args": {"a": 1},
    }
    config = TransformerConfig.from_dict(file)
    assert config.extra == {k: file[k] for k in ("model_class", "tokenizer_type", "bert_prob", "eva_args")}
    written = config.to_dict()
    assert list(written)[:2] == ["model_class", "tokenizer_type"]
    assert list(written)[-2:] == ["bert_prob", "eva_args"]
    assert config.to_dict(model_class="Other")["model_class"] == "Other"
    with pytest.raises(ConfigError, match="TransformerConfig has no option 'bert_prob'."):
        TransformerConfig.from_dict(file, unknown="refuse")
    TransformerConfig.from_dict({"model_class": "GPT2Model", "num_layers": 2}, unknown="refuse")
    with pytest.raises(ConfigError, match="no option 'hiden_size'. Did you mean 'hidden_size'?"):
        TransformerConfig.from_dict({"hiden_size": 32}, unknown="refuse")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "hidden_size 30 is not divisible by num_attention_heads 4. Change one, or set "
            "hidden_size_per_attention_head.",
        ),
        (
            {"num_attention_heads": 16, "num_multi_query_heads": 3},
            "num_attention_heads 16 is not divisible by num_multi_query_heads 3: each key/value head serves the same "
            "number of query heads.",
        ),
        (
            {"num_attention_heads": 16, "cross_num_multi_query_heads": 5},
            "num_attention_heads 16 is not divisible by cross_num_multi_query_heads 5: each key/value head serves the "
            "same number of query heads.",
        ),
        (
            {"layernorm_order": "prae"},
            "layernorm_order: unknown value 'prae', known are pre, post, sandwich. Did you mean 'pre'?",
        ),
        (
            {"attention_backend": "flahs"},
            "attention_backend: unknown value 'flahs', known are auto, eager, sdpa, flash, flex. Did you mean 'flash'?",
        ),
        (
            {"rope_scaling": {"rope_type": "lama3"}},
            "rope_scaling: unknown rope_type 'lama3', known are default, linear, ntk, llama3, yarn. Did you mean "
            "'llama3'?",
        ),
        ({"num_layers": 0}, "num_layers is 0, it must be above 0."),
        ({"vocab_size": -1}, "vocab_size is -1, it must be above 0."),
        ({"inner_hidden_size": 0}, "inner_hidden_size is 0, it must be above 0, or left out for its default."),
        ({"num_multi_query_heads": -2}, "num_multi_query_heads is -2, it cannot be negative."),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0, a probability from 0 up to (not including) 1."),
        (
            {"num_layers": 3, "is_decoder": [True, False]},
            "is_decoder lists 2 layers, num_layers is 3: give one each.",
        ),
        (
            {"num_layers": 2, "checkpoint_activations": True, "checkpoint_skip_layers": 2},
            "checkpoint_skip_layers 2 leaves none of 2 layers to checkpoint. Lower it, or set "
            "checkpoint_activations to false.",
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 4, "hidden_size_per_attention_head": 8, "is_rotary_emb": True},
            "is_rotary_emb: cannot rotate 16 features of heads of 8. Set rotary_dim to an even number of at most 8.",
        ),
    ],
)
def test_contradictions_are_refused_with_numbers_and_cure(values, text):
    with pytest.raises(ConfigError) as error:
        TransformerConfig(**values)
    assert str(error.value) == text
    assert isinstance(error.value, ValueError)


def test_replace_names_the_nearest_field():
    assert TransformerConfig().replace(num_layers=2).num_layers == 2
    with pytest.raises(ConfigError, match="TransformerConfig has no option 'num_layer'. Did you mean 'num_layers'?"):
        TransformerConfig().replace(num_layer=2)


def test_derived_sizes():
    config = TransformerConfig(hidden_size=64, num_attention_heads=4, num_multi_query_heads=2)
    assert (config.head_size, config.num_key_value_heads, config.inner_size) == (16, 2, 256)
    wide = config.replace(hidden_size_per_attention_head=24, inner_hidden_size=100)
    assert (wide.head_size, wide.inner_size, wide.cross_head_size) == (24, 100, 16)
