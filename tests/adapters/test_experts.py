"""Experts of every layout against transformers' own model with the dense weights Q + B A in their places."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.func import functional_call

import qsvd
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.model import trained
from qsvd.files.split_folder import open_split
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

LAYOUTS = {  # on disk: an expert and projection a tensor; stacks of transposes with biases; stacks
    "MixtralForCausalLM": {},
    "GptOssForCausalLM": {},
    "Qwen3_5MoeForCausalLM": {"exclude": ["*.shared_expert_gate"]},
}
BLOCKS = {"MixtralForCausalLM": 1, "GptOssForCausalLM": 2, "Qwen3_5MoeForCausalLM": 1}
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """The class, the 16-bit model and the quantized model."""
    folder = tmp_path_factory.mktemp("experts")
    blocks = BLOCKS[request.param]
    layers = {"layer_types": ["full_attention"]} if request.param.startswith("Qwen") else {}
    write_checkpoint(folder / "model", request.param, num_hidden_layers=blocks, **layers)
    options = {"rank": 4, "expert_rank": 3, "iterations": 1, "device": "cpu"} | LAYOUTS[request.param]
    return request.param, folder / "model", qsvd.quantize(folder / "model", out=folder / "out", **options).path


def stacked(split, model, values):
    """What `values` returns for the weights, as parameters of the model of transformers by name."""
    found = {}
    for name, weight in split.weights.items():
        if "stack" not in weight:
            found[f"{weight['module']}.weight"] = values(name)
            continue
        place = model.get_parameter(weight["stack"])
        expert = values(name)
        found.setdefault(weight["stack"], []).append(expert if place.shape[1:] == expert.shape else expert.T)
    return {name: torch.stack(value) if isinstance(value, list) else value for name, value in found.items()}


def plain(architecture, model, dtype=torch.float32):
    loader = getattr(transformers, architecture)
    return loader.from_pretrained(model, dtype=dtype, experts_implementation="eager").eval()


def test_the_loaded_model_computes_with_the_stored_experts(made):
    architecture, source, out = made
    split, expected, found = open_split(out), plain(architecture, source), qsvd.load(out, device="cpu")
    ranks = {weight["rank"] for weight in split.weights.values() if "stack" in weight}
    assert ranks == {3}
    dense = stacked(split, expected, split.dense)
    with torch.no_grad():
        wanted = functional_call(expected, dense, kwargs={"input_ids": IDS}).logits
        assert torch.allclose(found(input_ids=IDS).logits, wanted, atol=2e-5)
        assert not torch.allclose(expected(input_ids=IDS).logits, wanted, atol=2e-3)


def test_the_gradients_of_trained_experts_are_those_of_the_dense_formula(made):
    architecture, source, out = made
    split = open_split(out)
    found = qsvd.load(out, device="cpu", options=qsvd.AdapterOptions("pissa", target_modules=("*",))).train()
    found(input_ids=IDS, labels=IDS).loss.backward()
    expected = plain(architecture, source, torch.float64)
    leaves = {name: [factor.double().requires_grad_() for factor in split.factors(name)] for name in split.weights}

    def dense(name):
        up, down = leaves[name]
        return split.residual(name).decode().double() + up @ down

    loss = functional_call(expected, stacked(split, expected, dense), kwargs={"input_ids": IDS, "labels": IDS}).loss
    loss.backward()
    parameters = trained(found)
    assert len(parameters) == 2 * len(leaves)
    for name, factors in leaves.items():
        module = split.weights[name]["module"]
        for part, wanted in zip(("up", "down"), factors, strict=True):
            gradient = parameters[f"{module}.{part}"].grad
            if gradient is None:  # no token chose the expert
                assert not wanted.grad.any()
            else:
                assert (gradient - wanted.grad).norm() <= 1e-4 * wanted.grad.norm() + 1e-12


def test_experts_are_frozen_by_default_and_only_those_that_get_tokens_are_run(made, monkeypatch):
    architecture, _, out = made
    model = qsvd.load(out, device="cpu")
    assert not [name for name in trained(model) if ".experts." in name]
    run = []
    forward = SplitLinear.forward
    monkeypatch.setattr(SplitLinear, "forward", lambda self, x: run.append(self.name) or forward(self, x))
    with torch.no_grad():
        model(input_ids=IDS[:1, :1])
    experts = [name for name in run if ".experts." in name]
    assert len(experts) == len(set(experts)) == 2 * 2 * BLOCKS[architecture]  # of 4 experts 2, up and down


def test_offloaded_experts_give_the_same_bits(made):
    _, _, out = made
    results = []
    for placement in (qsvd.Placement(), qsvd.Placement(0)):
        torch.manual_seed(0)
        options = qsvd.AdapterOptions("lora", 2, target_modules=("*",))
        model = qsvd.load(out, device="cpu", options=options, placement=placement).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trained(model).values() if p.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_stacks_that_stay_in_16_bits_are_loaded(made, tmp_path):
    architecture, source, _ = made
    more = LAYOUTS[architecture].get("exclude", [])
    options = {"rank": 4, "iterations": 1, "device": "cpu", "exclude": ["*.down_proj", *more]}
    out = qsvd.quantize(source, out=tmp_path, **options).path
    split, expected = open_split(out), plain(architecture, source)
    with torch.no_grad():
        wanted = functional_call(expected, stacked(split, expected, split.dense), kwargs={"input_ids": IDS}).logits
        assert torch.allclose(qsvd.load(out, device="cpu")(input_ids=IDS).logits, wanted, atol=2e-5)


def test_a_merged_export_has_the_tensors_of_the_source(made, tmp_path):
    architecture, source, out = made
    done = qsvd.export(out, out=tmp_path / "merged", to="merged", dtype="float32")
    assert done.checked is not None
    there, here = (load_file(folder / "model.safetensors") for folder in (source, done.path))
    assert {name: tensor.shape for name, tensor in here.items()} == {n: t.shape for n, t in there.items()}
    with torch.no_grad():
        wanted = qsvd.load(out, device="cpu")(input_ids=IDS).logits
        assert torch.allclose(plain(architecture, done.path)(input_ids=IDS).logits, wanted, atol=2e-5)


def test_what_cannot_run_quantized_experts_says_what_can(made, tmp_path):
    architecture, _, out = made
    with pytest.raises(
        qsvd.BadInput, match=r"transformers cannot run: open it with qsvd\.load\(OUT\), or write a 16-bit"
    ):
        getattr(transformers, architecture).from_pretrained(out)
    with pytest.raises(qsvd.BadInput, match=r"PEFT cannot run quantized experts .*; use qsvd export --to merged, or "):
        qsvd.export(out, out=tmp_path / "export", to="peft")
    text = (out / "README.md").read_text()
    assert "from_pretrained" not in text
    assert "which only qsvd can run" in text
    assert f'model = qsvd.load("{out}")' in text
