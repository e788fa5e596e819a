"""Checks that a family equals Hugging Face on random weights, both ways; a family's test calls `check_parity`.

    def test_gptneo_equals_hugging_face():
        theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(...tiny...))
        ours = check_parity(theirs, {"input_ids": ids}, lambda out: out.logits)   # the class is found by config.json

What is compared: names, shapes, dtypes and bytes of theirs -> ours -> theirs; outputs; gradients of every parameter;
outputs in bfloat16.
"""

import copy
import json
from functools import partial

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from sat_lightning import AutoModel
from sat_lightning.checkpoint.huggingface import find_key_map, import_config, save_huggingface
from sat_lightning.checkpoint.keymap import plan_export, plan_import

OURS = "sat_lightning"
#: (our class, theirs) -> the largest difference of fp32 outputs that tests have seen in this process.
MEASURED = {}


def randomise(model, std=0.05):
    """Weights that no default would hide behind; norms stay near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * std + is_norm)


def to_ours(theirs, model_class=None, **overrides):
    """Convert a Hugging Face model in memory; returns (our model in eval mode, key map, the layout of their file)."""
    values = json.loads(theirs.config.to_json_string(use_diff=False)) | {"architectures": [type(theirs).__name__]}
    found, key_map = find_key_map(values, model_class)
    config = import_config(found, key_map, values).replace(**overrides)
    ours = found(config)
    for name in key_map.without:
        ours.del_mixin(name)
    for name, make in key_map.adds.items():
        ours.add_mixin(name, make(config))
    source = theirs.state_dict()
    is_tied = key_map.is_tied(values)
    plan = plan_import(key_map, source, config, ours.state_dict().keys(), is_tied=is_tied)
    ours.load_state_dict(dict(plan.read(source, "theirs")), strict=False)
    return ours.eval(), key_map, plan


def check_round_trip(theirs, ours, key_map, layout, is_tied):
    source = ours.state_dict()
    plan = plan_export(key_map, source, ours.config, layout=layout, is_tied=is_tied)
    back, expected = dict(plan.write(source, "ours")), theirs.state_dict()
    assert back.keys() == expected.keys(), back.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def check_parity(theirs, kwargs, pick, *, our_kwargs=None, our_pick=None, visible=None, model_class=None, **options):
    """Compare a Hugging Face model with ours.

    Args:
        theirs: the model; its weights are drawn anew here.
        kwargs: of its call.
        pick: output -> tensor of theirs.
        our_kwargs: of our call. Default: the same.
        our_pick: output -> tensor of ours. Default: the first.
        visible: bool tensor that indexes both tensors before they are compared (rows that no padding hides).
        model_class: ours. Default: found by their configuration.
        **options: `atol` of fp32 outputs (1e-5), `grad_atol` (1e-4), `bf16_atol` (6e-2; None leaves bf16 out).

    Returns:
        Our model.
    """
    torch.manual_seed(0)
    randomise(theirs)
    theirs.eval()
    ours, key_map, plan = to_ours(theirs, model_class)
    is_tied = key_map.is_tied(theirs.config.to_dict())
    check_round_trip(theirs, ours, key_map, plan.layout, is_tied)
    our_kwargs, our_pick = our_kwargs or kwargs, our_pick or (lambda out: out[0])
    select = (lambda t: t) if visible is None else (lambda t: t[visible])
    expected, got = select(pick(theirs(**kwargs))), select(our_pick(ours(**our_kwargs)))
    check_outputs(theirs, ours, expected, got, options.get("atol", 1e-5))
    check_gradients(theirs, ours, key_map, plan.layout, expected, got, is_tied, options.get("grad_atol", 1e-4))
    if (bf16_atol := options.get("bf16_atol", 6e-2)) is not None:
        with torch.no_grad():
            theirs.to(torch.bfloat16), ours.to(torch.bfloat16)
            expected, got = select(pick(theirs(**_to_bf16(kwargs)))), select(our_pick(ours(**_to_bf16(our_kwargs))))
            assert_close(got.float(), expected.float(), atol=bf16_atol, rtol=bf16_atol)
            theirs.float(), ours.float()
    return ours


def check_outputs(theirs, ours, expected, got, atol=1e-5):
    """Compare fp32 outputs, and note the difference for the table of families."""
    key = type(ours).__name__, type(theirs).__name__
    MEASURED[key] = max(MEASURED.get(key, 0.0), (got - expected).abs().max().item())
    assert_close(got, expected, atol=atol, rtol=1e-5)


def check_gradients(theirs, ours, key_map, layout, expected, got, is_tied, atol):
    direction = torch.randn_like(expected)
    theirs.zero_grad(), ours.zero_grad()
    (expected * direction).mean().backward()
    (got * direction).mean().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    tied = {name for pair in key_map.pairs(is_tied).items() for name in pair}
    known = {name for name, grad in grads.items() if grad is not None and name not in tied}
    mine = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in ours.named_parameters(remove_duplicate=False)
    }
    plan = plan_export(key_map, mine.keys(), ours.config, layout=layout, is_tied=False)
    back = dict(plan.write(mine, "gradients"))
    for name in known:
        assert_close(back[name], grads[name], atol=atol, rtol=1e-3, msg=lambda m, n=name: f"gradient of {n}: {m}")
    theirs.zero_grad(), ours.zero_grad()


def _to_bf16(kwargs):
    return {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}


def check_folder_parity(theirs, folder, kwargs, pick, **options):
    """Compare as `check_parity` does, through folders: for models whose names in memory are not those of the file.

    Args:
        theirs: the model; its weights are drawn anew here.
        folder: an empty folder.
        kwargs: of its call.
        pick: output -> tensor of theirs.
        **options: `our_kwargs`, `our_pick` and tolerances as in `check_parity`; `std` of the weights (0.05).

    Returns:
        Our model.
    """
    torch.manual_seed(0)
    randomise(theirs, options.get("std", 0.05))
    theirs.eval().save_pretrained(folder / "theirs")
    ours = AutoModel.from_pretrained(folder / "theirs")
    save_huggingface(ours, folder / "back")
    check_same_files(folder / "theirs", folder / "back")
    our_kwargs, our_pick = options.get("our_kwargs", kwargs), options.get("our_pick", lambda out: out[0])
    expected, got = pick(theirs(**kwargs)), our_pick(ours(**our_kwargs))
    check_outputs(theirs, ours, expected, got, options.get("atol", 1e-5))
    again = type(theirs).from_pretrained(folder / "back").eval()
    assert_close(pick(again(**kwargs)), expected)
    check_folder_gradients(theirs, ours, folder, expected, got, options.get("grad_atol", 1e-4))
    if (bf16_atol := options.get("bf16_atol", 6e-2)) is not None:
        with torch.no_grad():
            expected = pick(theirs.to(torch.bfloat16)(**_to_bf16(kwargs)))
            got = our_pick(ours.to(torch.bfloat16)(**_to_bf16(our_kwargs)))
        assert_close(got.float(), expected.float(), atol=bf16_atol, rtol=bf16_atol)
        ours.float()
    return ours


def check_same_files(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype and torch.equal(second[name], tensor), name


def check_folder_gradients(theirs, ours, folder, expected, got, atol):
    """Compare gradients by the names of files: both models write them as if they were weights."""
    direction = torch.randn_like(expected)
    (expected * direction).mean().backward()
    (got * direction).mean().backward()
    for model, save in ((theirs, lambda m: m.save_pretrained), (ours, lambda m: partial(save_huggingface, m))):
        twin = copy.deepcopy(model)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            is_frozen = parameter.grad is None and not parameter.requires_grad
            missing = torch.full_like(parameter, float("nan")) if is_frozen else torch.zeros_like(parameter)
            other.data = missing if parameter.grad is None else parameter.grad
        save(twin)(folder / f"gradients-{type(model).__module__.partition('.')[0]}")
    wanted, found = (load_file(folder / f"gradients-{name}" / "model.safetensors") for name in ("transformers", OURS))
    for name, gradient in wanted.items():
        if not gradient.isnan().all():
            assert_close(found[name], gradient, atol=atol, rtol=1e-3, msg=lambda m, n=name: f"gradient of {n}: {m}")
    theirs.zero_grad(), ours.zero_grad()
