"""Resident memory of a merge, measured in a process of its own."""

import pytest
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.export.merged import MergedForm, write_merged
from qsvd.export.trained import Trained, TrainedModel
from qsvd.files.split_folder import open_split
from tests.checkpoints import tiny_config
from tests.peaks import grown


def merge(base, out):
    split = open_split(base)

    def read(name):
        rows, columns = split.weights[name]["shape"]
        return Trained(torch.ones(rows, 4), torch.ones(4, columns))

    write_merged(TrainedModel(split, read), out, MergedForm())


def write_zeros(folder, config):
    """A 16-bit model whose matrices take no time to draw."""
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    tensors = {name: torch.zeros(like.shape, dtype=torch.bfloat16) for name, like in shapes.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_memory_is_one_weight_and_its_dense_form(tmp_path):
    sides = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3}
    write_zeros(tmp_path / "source", tiny_config("LlamaForCausalLM", **sides))
    qsvd.quantize(qsvd.Quantize(str(tmp_path / "source"), out=tmp_path / "out", rank=0, include=("*.1.mlp.up_proj",)))

    def work():
        merge(tmp_path / "out", tmp_path / "x-first")
        yield
        merge(tmp_path / "out", tmp_path / "x")
        yield

    (taken,) = grown(work, tmp_path)
    one_weight = 1024 * 4096 * (4 + 2 + 0.5 + 1 / 16)  # float32, bfloat16, codes, float32 scales
    slack = 24 * 2**20  # what the allocator keeps, and chunks of files
    written = (tmp_path / "x" / "model.safetensors").stat().st_size
    assert one_weight + slack < written / 1.5, "the whole model would pass"
    assert one_weight / 4 < taken <= one_weight + slack
