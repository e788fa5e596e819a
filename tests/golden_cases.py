"""Runs recorded cases: a folder with case.json, io.safetensors and the model's files. Drop a folder in, and it runs.

A case is `tests/data/golden/<case>/`:

- `case.json`: `model_class`, `config`, `tolerance`, and `calls`: `{name, target (a method; default the call), kwargs,
  outputs}`. A kwarg "@x" is tensor x of io.safetensors, all else is literal; `outputs` says for each expected tensor
  where it is in the result (`ret[1]['hidden_states']`).
- `checkpoint/`: SAT's own layout (`latest`, `model_config.json`, `1/mp_rank_00_model_states.pt`), or, smaller,
  `model_config.json` and `model.safetensors` in the folder itself. Either is loaded by `from_pretrained`.

A case that needs more than its file says has an entry here: `MIXINS` (a user's own mixins, added before the weights are
loaded) or `PROCEDURES` (cases whose notes describe what to run instead of `calls`). Names beginning with `bug_` record
faults of SAT; `test_parity.py` says what is right there.
"""

import contextlib
import dataclasses
import json
import math
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sat_lightning import AutoModel, mixins
from sat_lightning.checkpoint import load_checkpoint
from sat_lightning.generation import (
    BaseStrategy,
    BeamSearchStrategy,
    evaluate_perplexity,
    filling_sequence,
    get_masks_and_position_ids_default,
    get_masks_and_position_ids_glm,
    stream_filling_sequence,
)
from sat_lightning.model import find_model
from sat_lightning.models import import_families
from tests import golden_mixins as user

import_families()

GOLDEN = Path(__file__).parent / "data" / "golden"
#: Case -> configuration -> the mixins that a user adds by hand, in order.
MIXINS = {
    "adapter": lambda c: {"adapter": mixins.AdapterMixin(c, adapter_hidden=6)},
    "base_moe": lambda c: {"router": user.Router(c.num_layers, c.hidden_size, c.num_experts)},
    "ffadd": lambda c: {"ffadd": mixins.FFADDMixin(c, r=6, layer_range=[1])},
    "hook_cross_layer": lambda c: {"writer": user.Writer(c.hidden_size), "reader": user.Reader()},
    "hook_cross_layer_ckpt1": lambda c: {"writer": user.Writer(c.hidden_size), "reader": user.Reader()},
    "hook_replacable": lambda c: {
        "ra": user.ReplacableScale(),
        "rb": user.PlainScale(),
        "rc": user.Shift(1),
    },
    "lora2_gpt2": lambda c: {"lora": mixins.LoraMixin(c, rank=3, alpha=2)},
    "lora_gpt2": lambda c: {"lora": mixins.LoRAMixin(c, r=3, lora_alpha=2)},
    "mixin_stack_scale_shift": lambda c: {
        "scale": user.HeadScale(c.num_attention_heads, c.head_size),
        "shift": user.HeadShift(c.num_attention_heads, c.head_size),
    },
    "mlphead_bert": lambda c: {"classification_head": mixins.MLPHeadMixin(c, 20, 3)},
    "prefix_gpt2": lambda c: {"prefix-tuning": mixins.PrefixTuningMixin(c, prefix_len=5)},
}
#: Case -> mixins of the class that the user takes out first.
REMOVED = {"mlphead_bert": ["bert-final"]}


def _area(size):
    return math.prod(map(int, size.split("x")))


def interpolate(case):
    """Load for a larger image, save, and load that for a larger one yet."""
    model = case.model
    for size in sorted({key.split("_")[-1] for key in case.tensors if key.startswith("image_")}, key=_area):
        height, width = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            options = {"image_size": [height, width], "resize_positions": "interpolate"}
            model = AutoModel.from_pretrained(folder, **options)
        with torch.no_grad():
            logits = model(case.tensors["input_ids"], image=case.tensors[f"image_{size}"])[0]
        case.compare(model.transformer.position_embeddings.weight, f"expected.pos_{size}")
        case.compare(logits, f"expected.img_{size}.logits")


def see(case):
    """Read with an image, and without one."""
    given = {name: case.tensors[name] for name in ("image_embed_mask", "vision_input_ids", "vision_image")}
    calls = {"image": {**given, "output_hidden_states": True}, "textonly": {}}
    for name, kw in calls.items():
        with torch.no_grad():
            logits, *layers = case.model(case.tensors["input_ids"], **kw)
        case.compare(logits, f"expected.{name}.logits")
        for layer_id, layer in enumerate(layers):
            for i, past in enumerate(layer["past_key_values"]):
                case.compare(past, f"expected.{name}.layer{layer_id}.past_key_values.{i}")
            if kw:
                case.compare(layer["hidden_states"], f"expected.{name}.layer{layer_id}.hidden_states")


def measure_perplexity(case):
    """Measure texts with and without words that may not be said; ours leaves the caller's tensors alone."""
    given = {name: case.tensors[name].clone() for name in ("tokens", "attention_mask", "position_ids", "loss_mask")}
    replaced = given | {"tokens": case.tensors["expected.tokens_used_invalid"]}
    for reduction in ("mean", "none"):
        with torch.no_grad():
            plain = evaluate_perplexity(case.model, **given, reduction=reduction)
            limited = evaluate_perplexity(case.model, **replaced, invalid_slices=[slice(50, None)], reduction=reduction)
        case.compare(plain, f"expected.{reduction}")
        case.compare(limited, f"expected.{reduction}_invalid")
    for name, tensor in given.items():
        assert torch.equal(tensor, case.tensors[name]), f"{name} was changed"


class Recorder(BaseStrategy):
    """The most likely token, and a list of the logits it was taken from."""

    def step(self, logits, state):
        vars(self).setdefault("seen", []).append(logits)
        return super().step(logits, state)


def fill(case):
    """Fill the slots of `seq`, and compare tokens, memory, and the logits of every step."""
    given = {name: case.tensors[name] for name in ("encoder_outputs", "cross_attention_mask") if name in case.tensors}
    batch_size = case.tensors["expected.tokens"].shape[0]
    strategy = Recorder(top_k=1, **SETTINGS.get(case.name, {}))
    layout = get_masks_and_position_ids_default
    if "expected.position_ids" in case.tensors:  # a text with the blank 55, filled from 57 on
        ids = case.tensors["seq"].tolist()
        layout = partial(get_masks_and_position_ids_glm, mask_position=ids.index(55), context_length=ids.index(57))
        for made, name in zip(layout(case.tensors["seq"])[1:], ("attention_mask", "position_ids"), strict=True):
            case.compare(made, f"expected.{name}")
    tokens, mems = filling_sequence(
        case.model, case.tensors["seq"], batch_size, strategy, get_masks_and_position_ids=layout, **given
    )
    case.compare(tokens, "expected.tokens")
    case.compare(mems, "expected.mems")
    for step, logits in enumerate(strategy.seen):
        case.compare(logits, f"expected.step{step}.logits")
    assert f"expected.step{len(strategy.seen)}.logits" not in case.tensors


def fill_with_crosses(case):
    """Fill while looking at an encoder's outputs, whose keys and values are computed once."""
    fill(case)
    given = {name: case.tensors[name] for name in ("encoder_outputs", "cross_attention_mask")}
    case.model.add_mixin("auto-regressive", mixins.CachedAutoregressiveMixin())
    with torch.no_grad():
        layers = case.model(case.tensors["seq"][None, :5], torch.arange(5)[None], -1, **given)[1:]
    for layer_id, layer in enumerate(layers):
        for letter, found in zip("kv", layer["mem_cross"], strict=True):
            case.compare(found, f"expected.layer{layer_id}.mem_cross_{letter}")


def fill_on(case):
    """Fill, then fill five slots more on top of the memory of the first."""
    tokens, mems = case.tensors["seq"][None], None
    for phase in ("phase1", "phase2"):
        seq = tokens[0] if mems is None else torch.cat([tokens[0], torch.full((5,), -1)])
        tokens, mems = filling_sequence(case.model, seq, 1, BaseStrategy(top_k=1), mems=mems)
        case.compare(tokens, f"expected.{phase}.tokens")
        case.compare(mems, f"expected.{phase}.mems")


def stream(case):
    """See every token and the memory as they come."""
    steps = list(stream_filling_sequence(case.model, case.tensors["seq"], 1, BaseStrategy(top_k=1)))
    for step, (tokens, mems) in enumerate(steps):
        case.compare(tokens, f"expected.step{step}.tokens")
        case.compare(torch.tensor(mems.shape), f"expected.step{step}.mems_shape")
    case.compare(steps[-1][1], "expected.last.mems")
    assert f"expected.step{len(steps)}.tokens" not in case.tensors


class Replay(BeamSearchStrategy):
    """SAT draws its candidates, and begins with copies of one beam: take the recorded draws, from as many copies."""

    def start(self, state):
        state = super().start(state)
        state.extras["beams"].scores.zero_()
        return state

    def step(self, logits, state):
        self.seen.append(logits)
        return super().step(logits, state)

    def choose(self, scores, num_candidates):
        places = self.tensors[f"expected.step{len(self.seen) - 1}.multinomial_result"][None]
        values, order = scores.gather(1, places).sort(dim=1, descending=True)
        return values, places.gather(1, order)


def search(case):
    """Keep beams by the recorded draws: compare the logits of each step, the texts, and where they run the memory."""
    settings = {name: value for name, value in case.record["strategy"].items() if name != "class"}
    strategy = Replay(**settings)
    strategy.seen, strategy.tensors = [], case.tensors
    texts, mems = filling_sequence(case.model, case.tensors["seq"], settings["num_beams"], strategy)
    for beam, tokens in enumerate(texts):
        case.compare(tokens, f"expected.beam{beam}")
    for step, logits in enumerate(strategy.seen):
        case.compare(logits, f"expected.step{step}.logits")
    assert f"expected.step{len(strategy.seen)}.logits" not in case.tensors
    if mems is not None:
        case.compare(mems, "expected.mems")


#: Case -> settings of the strategy that its notes name.
SETTINGS = {"gen_rep_penalty_invalid": {"repetition_penalty": 1.7, "invalid_slices": [slice(50, 60)]}}
#: Beginning of a case's name -> function of the case, which runs what the notes describe and compares.
PROCEDURES = {
    "gen_beam": search,
    "gen_decoder_cross": fill_with_crosses,
    "gen_mems_phase2": fill_on,
    "gen_perplexity": measure_perplexity,
    "gen_stream": stream,
    "gen_": fill,
    "glm4v": see,
    "vit_interp": interpolate,
}
#: Model class -> keywords of every call that the recording set otherwise: MAE's drawing was replaced by a tensor.
KEYWORDS = {"MAE": {"noise": "@noise"}}
#: Cases that are recorded for other tests: faults.
ELSEWHERE = re.compile(r"bug_")

# Fields of a case's `config` that are no part of the architecture, and None for "default": left out.
# SAT writes an epsilon that is not its default into model_config.json, and classes with their own keep it.
_TRAINING = {
    "hidden_dropout", "attention_dropout", "drop_path", "model_parallel_size", "init_method_std", "layernorm_epsilon",
}  # fmt: skip


def case_names(pattern=""):
    """Names of the cases that the general test runs, by a regular expression on their beginning."""
    names = sorted(path.name for path in GOLDEN.iterdir() if (path / "case.json").is_file())
    return [name for name in names if re.match(pattern, name) and not ELSEWHERE.match(name)]


class Case:
    """One recorded model: `model` stands with its weights, in eval mode."""

    def __init__(self, name, **changes):
        self.name, folder = name, GOLDEN / name
        self.record = json.loads((folder / "case.json").read_text())
        self.tensors = load_file(folder / "io.safetensors")
        self.tolerance = max(self.record["tolerance"]["atol"], 1e-6)
        self.folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
        self.model = self.load(**changes).eval()

    def load(self, **changes):
        """Load by the public API; what SAT leaves out of model_config.json is taken from case.json."""
        options = {**self._left_out(), **changes}
        if self.name not in MIXINS:
            return AutoModel.from_pretrained(self.folder, **options)
        values = json.loads((self.folder / "model_config.json").read_text())
        model_class = find_model(self.record["model_class"])
        model = model_class(model_class.config_class.from_dict(values).replace(**options))
        for mixin_name in REMOVED.get(self.name, ()):
            model.del_mixin(mixin_name)
        with warnings.catch_warnings() if self.name == "hook_replacable" else contextlib.nullcontext():
            warnings.simplefilter("ignore")  # a replaceable hook is replaced, which warns
            for mixin_name, mixin in MIXINS[self.name](model.config).items():
                model.add_mixin(mixin_name, mixin)
        load_checkpoint(model, self.folder)
        return model

    def _left_out(self):
        values = json.loads((self.folder / "model_config.json").read_text())
        config_class = find_model(self.record["model_class"]).config_class
        defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
        return {
            name: value
            for name, value in self.record["config"].items()
            if name in defaults.keys() - values.keys() - _TRAINING and value not in (None, defaults[name])
        }

    def run(self, call):
        function = getattr(self.model, call.get("target") or "__call__")
        kwargs = call["kwargs"] | KEYWORDS.get(self.record["model_class"], {})
        return function(**{name: self.value(value) for name, value in kwargs.items()})

    def value(self, value):
        """A literal, or the tensor that "@name" names, inside lists and dicts too."""
        if isinstance(value, str) and value.startswith("@"):
            return self.tensors[value[1:]]
        if isinstance(value, (list, tuple)):
            return [self.value(one) for one in value]
        return {k: self.value(v) for k, v in value.items()} if isinstance(value, dict) else value

    def check(self):
        """Run every call, or the procedure of the case, and compare every recorded tensor."""
        if not self.record.get("calls"):
            for beginning, procedure in PROCEDURES.items():
                if self.name.startswith(beginning):
                    return procedure(self)
            raise LookupError(f"{self.name} has no calls: write its procedure, see PROCEDURES in {__file__}.")
        with torch.no_grad():
            for call in self.record["calls"]:
                result = self.run(call)
                for key, place in call["outputs"].items():
                    got = eval(place, {"ret": result})  # noqa: S307  (places such as ret[1]['hidden_states'])
                    self.compare(got, key)

    def compare(self, got, key):
        """Compare a tensor with the recorded one of that name."""
        wanted = self.tensors[key]
        assert_close(got, wanted, atol=self.tolerance, rtol=1e-5, msg=lambda m: f"{self.name} {key}: {m}")
