"""A trained model is the same model wherever it is loaded: in qsvd, in PEFT, in plain transformers.

What it is comes from the files by NumPy in float64, put into transformers' own class.
"""

import re
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers

import qsvd
from qsvd.cli import run as qsvd_command
from tests.commands.trained_runs import (
    LABELS,
    METHODS,
    factors_of,
    head_of,
    random_sum,
    trained_weights,
    write_run,
)
from tests.export.cases import HALF_ULP, ROUNDINGS, base_in_float32, files_of, make_base, outputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # PEFT replaces the components
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks for an old name
]
MODELS = {"stories": (), "bert": LABELS}
SCALED = ("edora", "dora")  # whose rows have a gain
REFUSED = {("randlora", form): "changes weights at full rank, which a LoRA cannot do" for form in ("peft", "lora")}
REFUSED |= {("losa", form): "changes no weight that is 0, and a product of two factors" for form in ("peft", "lora")}
REFUSED |= {(method, "lora"): "scales the rows of each weight, which a LoRA on the 16-bit model" for method in SCALED}
# One of each kind: what is trained takes the place of the components, is beside them, has a gain, or is of full rank.
# All others differ in the product alone, of which every form is made: merged weights show it.
KINDS = ("pissa", "lora", "dora", "randlora", "losa")
IN_EVERY_FORM = [("bert", "edora"), *(("stories", method) for method in KINDS)]  # the first has a new head
CASES = [*IN_EVERY_FORM, *(("stories", method) for method in METHODS if method not in KINDS)]  # the same come first
in_every_form = pytest.mark.parametrize("case", IN_EVERY_FORM, ids="-".join, indirect=True)
SMALLEST = 2.0**-25  # half the least float16
COPIES = 4  # roundings to float32 of one element besides those of the product's sum: residual, gain, magnitude, norm


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory, stories, stories_base):
    """A base, a run and what the two stand for."""
    name, method = request.param
    labels = MODELS[name]
    folder = tmp_path_factory.mktemp("run")
    if name == "bert":
        made = make_base(folder, "BertModel", dtype=torch.float16)
        base, source = made / "out", made / "source"
    else:
        base, source = stories_base, stories
    model = write_run(base, folder / "run", method, labels=labels)
    weights = trained_weights(base, folder / "run", model)
    auto = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    options = {"num_labels": len(labels)} if labels else {}
    found = SimpleNamespace(
        name=name, method=method, base=base, folder=folder, run=folder / "run", source=source,
        model=model, labels=labels, weights=weights, auto=auto, options=options, head=head_of(folder / "run"),
    )  # fmt: skip
    if (name, method) not in IN_EVERY_FORM:
        return found
    found.exact = outputs(plain(found, weights, torch.float64))
    found.rounding = distance(outputs(plain(found, weights, torch.float32)), found.exact)
    found.original = outputs(plain(found, {}, torch.float64))
    return found


def plain(case, weights, dtype):
    """transformers' own model of the source, with these weights and the trained head."""
    model = case.auto.from_pretrained(case.source, dtype=dtype, **case.options)
    for path, weight in weights.items():
        model.get_submodule(path).weight.data = torch.from_numpy(weight).to(dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in case.head.items()}, strict=False)
    return model


def distance(left, right):
    return (left - right).abs().max().item()


def export(case, form):
    """The folder of an export by the command, made once; what is checked here is not checked by the command too."""
    out = case.folder / form
    if not out.exists():
        arguments = ["export", case.run, "--to", form, "--out", out, "--no-check"]
        assert qsvd_command([str(argument) for argument in arguments]) == 0
    return out


@in_every_form
def test_in_qsvd_it_is_what_was_in_memory_and_what_the_files_say(case):
    again = qsvd.load(case.base, adapter=case.run)
    assert torch.equal(outputs(again), outputs(case.model))
    assert distance(outputs(again), case.exact) <= ROUNDINGS * case.rounding
    assert distance(case.original, case.exact) > 100 * ROUNDINGS * case.rounding, "training would not be missed"


def is_refused(case, form, capsys):
    """Whether the method has no such export; the command then says why, and leaves no folder."""
    if (case.method, form) not in REFUSED:
        return False
    arguments = ["export", case.run, "--to", form, "--out", case.folder / "none"]
    assert qsvd_command([str(argument) for argument in arguments]) == 2
    assert f"{case.method} {REFUSED[case.method, form]}" in capsys.readouterr().err
    assert not (case.folder / "none").exists()
    return True


@in_every_form
def test_in_peft_on_the_residual_it_is_the_same_model(case, capsys):
    if is_refused(case, "peft", capsys):
        return
    out = export(case, "peft")
    base = base_in_float32(case.base, case.auto, **case.options)
    model = peft.PeftModel.from_pretrained(base, out)
    assert model.peft_config["default"].use_dora == (case.method in SCALED)
    assert distance(outputs(model), case.exact) <= ROUNDINGS * case.rounding


@in_every_form
def test_on_the_original_a_lora_adds_what_training_changed(case, capsys):
    if is_refused(case, "lora", capsys):
        return
    out = export(case, "lora")
    said = capsys.readouterr().out
    start, stored, errors, norms = plain(case, {}, torch.float64), factors_of(case.base), [], []
    moved = {}
    for path, weight in case.weights.items():
        linear = case.model.get_submodule(path)
        original = start.get_submodule(path).weight.detach().numpy()
        up, down = stored[linear.name.removesuffix(".weight")]
        split_error = original - linear.residual.decode().double().numpy() - up @ down
        moved[path] = weight + split_error
        errors.append(np.linalg.norm(split_error))
        norms.append(np.linalg.norm(original))
    expected = outputs(plain(case, moved, torch.float64))
    rounding = distance(outputs(plain(case, moved, torch.float32)), expected)
    model = peft.PeftModel.from_pretrained(plain(case, {}, torch.float32), out)
    assert distance(outputs(model), expected) <= ROUNDINGS * rounding
    stated = float(re.search(r"relative error (\d\.\d{4}), measured", said)[1])
    assert stated == pytest.approx(np.linalg.norm(errors) / np.linalg.norm(norms), abs=0.5e-4)


def test_merged_weights_are_rounded_once(case):
    found = files_of(export(case, "merged"))
    dtype = torch.float16 if case.labels else torch.float32  # of the source
    for path, weight in case.weights.items():
        linear = case.model.get_submodule(path)
        merged = next(found[name] for name in (f"{path}.weight", linear.name) if name in found)
        assert merged.dtype == dtype
        rank = linear.adapter.factors()[0].shape[1] + (min(weight.shape) if case.method == "randlora" else 0)
        sizes = np.abs(linear.residual.decode().double().numpy()) + products(linear)
        roundoff = (2 * rank + COPIES) * HALF_ULP[torch.float32] * sizes
        if case.method in SCALED:  # and of the norm, whose squares are sums of I terms
            roundoff += weight.shape[1] * HALF_ULP[torch.float32] * np.abs(weight)
        bound = HALF_ULP[dtype] * np.abs(weight) + SMALLEST * (dtype == torch.float16) + roundoff
        assert (np.abs(merged.double().numpy() - weight) <= bound).all(), path


def products(linear):
    """|B| |A|, with a gain of about 1 left out."""
    up, down = (factor.detach().double().abs().numpy() for factor in linear.adapter.factors())
    product = up @ down
    if hasattr(linear.adapter, "gam"):
        parts = (
            {name: tensor.detach().double().abs().numpy() for name, tensor in tensors}
            for tensors in (linear.adapter.named_parameters(), linear.adapter.named_buffers())
        )
        product += 2 * random_sum(*parts, product.shape)  # alpha / rank
    return product


@in_every_form
def test_merged_it_is_the_same_model_in_plain_transformers(case):
    out = export(case, "merged")
    merged = case.auto.from_pretrained(out, dtype=torch.float64)
    half = torch.float16 if case.labels else torch.float32
    rounded = plain(case, {}, torch.float64)
    head = {name: tensor.to(half).double() for name, tensor in case.head.items()}
    for path, weight in case.weights.items():
        rounded.get_submodule(path).weight.data = torch.from_numpy(weight).to(half).double()
    rounded.load_state_dict(head, strict=False)
    step = distance(outputs(rounded), case.exact)  # what rounding to the stored dtype alone costs
    assert distance(outputs(merged), case.exact) <= 2 * step + ROUNDINGS * case.rounding
    if case.labels:
        assert merged.config.id2label == dict(enumerate(case.labels))
        assert merged.config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize("case", [("stories", "pissa"), ("stories", "dora")], ids="-".join, indirect=True)
def test_it_generates_in_qsvd_as_in_plain_transformers(case):
    prompt = torch.tensor([[1, 403, 407, 261]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    exact = plain(case, case.weights, torch.float64).generate(prompt, **settings)
    assert torch.equal(qsvd.load(case.base, adapter=case.run).generate(prompt, **settings), exact)
