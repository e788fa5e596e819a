"""What transformers once wrote beside the weights, and published files still carry, is known, and written back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lightning import AutoModel
from sat_lightning.checkpoint import save_huggingface
from sat_lightning.errors import CheckpointError

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 30, "hidden_size": 8, "max_position_embeddings": 12}
ENCODER = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
NUMBERS = torch.arange(12)[None]
CAUSAL = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()


def neo():
    config = transformers.GPTNeoConfig(
        **SIZES, num_layers=2, num_heads=2, window_size=3, attention_types=[[["global", "local"], 1]]
    )
    # As their code made the mask of a local layer: what lies a window back is struck out.
    window = torch.bitwise_xor(CAUSAL, torch.tril(CAUSAL, -3))
    names = "transformer.h.{}.attn.attention.bias", "transformer.h.{}.attn.attention.masked_bias"
    carried = {names[0].format(0): CAUSAL, names[0].format(1): window}
    carried |= {names[1].format(i): torch.tensor(-1e9) for i in range(2)}
    return transformers.GPTNeoForCausalLM(config), carried


def encoder(kind, prefix, config="BertConfig"):
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**ENCODER))
    return theirs, {f"{prefix}embeddings.position_ids": NUMBERS}


CASES = {
    "bert": lambda: encoder("BertForMaskedLM", "bert."),
    "bert bare": lambda: encoder("BertModel", ""),
    "roberta": lambda: encoder("RobertaForMaskedLM", "roberta.", "RobertaConfig"),
    "dpr": lambda: encoder("DPRQuestionEncoder", "question_encoder.bert_model.", "DPRConfig"),
    "gptneo": neo,
}


@pytest.mark.parametrize("name", CASES)
def test_buffers_of_old_files_are_compared_and_written_back(name, tmp_path):
    theirs, carried = CASES[name]()
    theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    state = load_file(file) | {key: value.clone() for key, value in carried.items()}
    save_file(state, file, metadata={"format": "pt"})
    save_huggingface(AutoModel.from_pretrained(tmp_path / "theirs"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in state.items())
    spoilt = next(iter(carried))
    save_file(state | {spoilt: state[spoilt] ^ True}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'.*{spoilt}' is not what the configuration makes of it"):
        AutoModel.from_pretrained(tmp_path / "theirs")


def test_heads_of_pretraining_are_left_behind_by_name(tmp_path):
    """As bert-base-uncased is published: the class for masked words, and weights of two more heads."""
    config = transformers.BertConfig(**ENCODER)
    theirs = transformers.BertForPreTraining(config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("BertForPreTraining", "BertForMaskedLM"))
    with pytest.raises(CheckpointError, match=r"unexpected bert.pooler.dense.bias, .*seq_relationship.*ignore"):
        AutoModel.from_pretrained(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path, ignore=("bert.pooler.*", "cls.seq_relationship.*"))
    assert len(ours.load_report.unexpected) == 4
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = theirs.eval()(ids).prediction_logits
        torch.testing.assert_close(ours(ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_what_no_code_ever_read_is_left_behind_and_reported(tmp_path):
    """T5's published files hold a table of relative positions for cross attention, which has none."""
    config = transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    file, name = (
        tmp_path / "model.safetensors",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )
    save_file(load_file(file) | {name: torch.randn(32, 2)}, file, metadata={"format": "pt"})
    assert AutoModel.from_pretrained(tmp_path).load_report.renamed == (f"{name}: never used, left behind",)
    save_file(load_file(file) | {name.replace("layer.1", "layer.0"): torch.randn(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected decoder.block.0.layer.0.EncDec"):
        AutoModel.from_pretrained(tmp_path)
