"""LoSA: zeros of a pruned model stay zero, in the layer and in the merged export."""

import pytest
import safetensors.torch
import torch

import qsvd
from qsvd.adapters.adapter import AdapterOptions
from qsvd.adapters.linear import SplitLinear
from qsvd.adapters.methods.losa import Losa, packed, unpacked
from qsvd.adapters.model import split_linears
from qsvd.numerics.nf4 import NormalFloat4
from tests import reference
from tests.adapters.principals import StoredWeight, decoded
from tests.checkpoints import write_checkpoint
from tests.export.cases import WIDTHS


def pruned(shape, share=0.6, seed=0):
    weight = torch.from_numpy(reference.gaussian(*shape, seed=seed))
    return weight * (weight.abs() > weight.abs().quantile(share))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 43])
def test_bits_hold_the_mask(columns):
    mask = torch.from_numpy(reference.gaussian(5, columns, seed=columns)) > 0
    assert packed(mask).shape == (5, -(-columns // 8))
    assert torch.equal(unpacked(packed(mask), columns), mask)


def test_zeros_of_the_residual_stay_zero_whatever_is_trained():
    weight = pruned((64, 64))
    residual = NormalFloat4(double_quant=True).encode(weight)
    stored = StoredWeight(residual, torch.zeros(64, 0), torch.zeros(0, 64))
    adapter = Losa.start(stored, AdapterOptions("losa", rank=3), torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.up += torch.from_numpy(reference.gaussian(64, 3, seed=5))
    found = SplitLinear(residual, adapter, None).weight
    zeros = decoded(residual) == 0
    assert zeros[weight == 0].all(), "NF4 has an exact zero"
    assert not found[zeros].any()
    assert found[~zeros].all()


def test_the_merged_export_is_as_sparse_as_the_pruned_model(tmp_path):
    write_checkpoint(tmp_path / "source", "LlamaForCausalLM", dtype=torch.bfloat16, **WIDTHS)
    path = tmp_path / "source" / "model.safetensors"
    tensors = {
        name: pruned(tensor.shape, seed=len(name)).bfloat16() if name.endswith("proj.weight") else tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    base = qsvd.quantize(tmp_path / "source", out=tmp_path / "out", rank=0, device="cpu").path
    model = qsvd.load(base, options=AdapterOptions("losa", rank=2))
    with torch.no_grad():
        for _, linear in split_linears(model):
            linear.adapter.up.fill_(0.01)
    model.save_pretrained(tmp_path / "run")
    qsvd.export(tmp_path / "run", to="merged", out=tmp_path / "merged")  # compares the logits
    written = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    split = [name for name in tensors if name.endswith("proj.weight")]
    assert len(split) == 14
    for name in split:
        assert not written[name][tensors[name] == 0].any()
        assert (written[name] != tensors[name]).any()
    for form in ("peft", "lora"):
        with pytest.raises(qsvd.BadInput, match="losa changes no weight that is 0, and a product of two factors"):
            qsvd.export(tmp_path / "run", to=form, out=tmp_path / form)
