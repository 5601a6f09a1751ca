"""LoRA-GA: its start by the formula and by PEFT, the outputs before the first step, and files that it refuses."""

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.methods.table import METHODS
from qsvd.adapters.model import split_linears, trained
from tests import reference
from tests.adapters.principals import principal_of
from tests.adapters.results import outputs, split_checkpoint
from tests.gradients import write_gradients

ROWS, COLUMNS, RANK, ALPHA, GAMMA = 70, 48, 5, 3.0, 4.0
ROUNDOFF = 16 * 2.0**-24  # of the largest logit: on some CPUs products with more columns, all zeros, add in other order


@pytest.fixture(scope="module", params=[0, 4])
def out(request, tmp_path_factory):
    return split_checkpoint(tmp_path_factory.mktemp("result"), rank=request.param)


def options_of(file, **changes):
    return AdapterOptions("lora-ga", **({"rank": RANK, "own": {"gradients": file}} | changes))


def test_it_starts_from_the_vectors_of_the_paper_as_pefts_does_but_for_their_sizes():
    """PEFT scales B by the singular values and leaves A as it is; the directions are the same, up to signs."""
    gradient = torch.from_numpy(reference.gaussian(ROWS, COLUMNS, seed=1)) @ torch.diag(0.8 ** torch.arange(COLUMNS))
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    stored = principal_of((ROWS, COLUMNS), 0)
    stored = type(stored)(stored.residual, stored.up_OR, stored.down_RI, gradient=(left.float(), right.float()))
    options = AdapterOptions("lora-ga", rank=RANK, alpha=ALPHA, own={"gamma": GAMMA})
    adapter = METHODS["lora-ga"].start(stored, options, torch.Generator())
    size = ROWS**0.25 / GAMMA**0.5
    torch.testing.assert_close(adapter.down.double(), size * right[:RANK], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(adapter.up.double(), size * left[:, RANK : 2 * RANK], rtol=1e-6, atol=1e-7)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer._peft_loraga_grad = gradient
    config = peft.LoraConfig(
        r=RANK, init_lora_weights="lora_ga", target_modules=["0"], lora_ga_config=peft.LoraGAConfig(stable_gamma=GAMMA)
    )
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model.get_submodule("0")
    for mine, other in ((adapter.down, theirs.lora_A), (adapter.up.T, theirs.lora_B)):
        rows = other["default"].weight.detach()
        rows = rows if rows.shape == mine.shape else rows.T
        cosines = (nn.functional.normalize(mine.detach(), dim=1) * nn.functional.normalize(rows, dim=1)).sum(dim=1)
        torch.testing.assert_close(cosines.abs(), torch.ones(RANK), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step_the_logits_are_those_of_the_quantized_model(out, tmp_path, dtype):
    """Every product that is added has a factor of zeros; afterwards another one moves."""
    model = qsvd.load(out, options=options_of(write_gradients(out, tmp_path / "g", 8), dtype=dtype))
    expected = outputs(qsvd.load(out))
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=ROUNDOFF * float(expected.abs().max()))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.mul_(1.5)
    assert not torch.equal(outputs(model), outputs(qsvd.load(out)))


def test_a_run_is_loaded_without_the_file_and_has_the_start_beside_what_is_trained(out, tmp_path):
    file = write_gradients(out, tmp_path / "g", 8)
    model = qsvd.load(out, options=options_of(file))
    model.save_pretrained(tmp_path / "run")
    file.unlink()
    again = qsvd.load(tmp_path / "run")
    assert again.split_record.own == {"gradients": str(file)}
    saved = safetensors.torch.load_file(tmp_path / "run" / "qsvd_adapter.safetensors")
    parts = ("up", "down", "start_up", "start_down")
    for (path, ours), (_, theirs) in zip(split_linears(again), split_linears(model), strict=True):
        for part in parts:
            tensor = ours.adapter.state_dict()[part]
            assert torch.equal(tensor, theirs.adapter.state_dict()[part])
            assert torch.equal(tensor, saved[f"{path}.{part}"])
            assert tensor.any()
    with pytest.raises(qsvd.BadInput, match="g does not exist; qsvd calibrate MODEL DATA --out "):
        qsvd.load(out, options=options_of(file))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            None,
            {},
            r"^lora-ga starts from gradients of the 16-bit model: give --gradients FILE \(qsvd calibr",
        ),
        ({"rank": 0}, {}, r"g has no gradients; run qsvd calibrate MODEL DATA --gradient-rank 5 --out FILE$"),
        (
            {"fingerprint": "0" * 64},
            {},
            r"g has the gradients of another model \(the/model\) than the 16-bit model",
        ),
        ({"rank": 4}, {}, r"g has gradients of rank 4, and the rank to train is 5; give --rank 4, or run qsvd calibr"),
        ({"rank": 8}, {"rank": None}, r"gradients of rank 8, and the rank to train is 32; give --rank 8, or run"),
        (
            {"leave_out": ("model.layers.0.mlp.up_proj",)},
            {},
            r"no gradients of 1 of 14 layers \(model\.layers\.0",
        ),
        ({}, {"own": {"gamma": 0.0}}, r"--gamma 0\.0 is not a finite number above 0"),
        ({}, {"dropout": 0.1}, r"dropout is an option of the method lora or .*weightlora, and the method is lora-ga"),
    ],
)
def test_a_file_that_it_cannot_start_from_is_refused(out, tmp_path, file, changes, said):
    options = options_of(None, **changes)
    if file is not None:
        written = write_gradients(out, tmp_path / "g", **({"rank": 8} | file))
        options = options_of(written, **changes)
    with pytest.raises(qsvd.BadInput, match=said):
        qsvd.load(out, options=options)


def test_layers_that_are_not_trained_need_no_gradient(out, tmp_path):
    file = write_gradients(out, tmp_path / "g", 8, leave_out=("model.layers.0.mlp.up_proj",))
    model = qsvd.load(out, options=options_of(file, target_modules=("q_proj",)))
    assert {name.rpartition(".")[0] for name in trained(model)} == {
        f"model.layers.{number}.self_attn.q_proj" for number in range(2)
    }


def test_experts_are_refused(tmp_path):
    out = split_checkpoint(tmp_path, "MixtralForCausalLM")
    options = options_of(write_gradients(out, tmp_path / "g", 8), target_modules=("*",))
    with pytest.raises(qsvd.BadInput, match=r"^lora-ga trains no experts \(.*leave out --train-experts, or use"):
        qsvd.load(out, options=options)
