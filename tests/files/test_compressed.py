"""The tensors of compressed-tensors: by name, shape and bytes, written and read back."""

from types import SimpleNamespace

import pytest
import torch

from qsvd.errors import BadInput
from qsvd.files.quantized.compressed import (
    compressed_config,
    compressed_tensors,
    ignored_layers,
    renamed,
    stored_compressed,
)
from qsvd.numerics.int4 import Int4
from qsvd.plan.allocation import residual_bytes
from tests import reference

NAME = "layers.0.q_proj.weight"
SHAPE, GROUP = (6, 192), 64


@pytest.fixture
def packed():
    return Int4(GROUP).encode(torch.from_numpy(reference.gaussian(*SHAPE)))


def test_names_shapes_and_bytes(packed):
    tensors = compressed_tensors(NAME, packed)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert shapes == {
        f"{NAME}_packed": (torch.int32, (6, 24)),
        f"{NAME}_scale": (torch.bfloat16, (6, 3)),
        f"{NAME}_shape": (torch.int64, (2,)),
    }
    assert tensors[f"{NAME}_shape"].tolist() == [6, 192]
    assert residual_bytes(packed.codec, SHAPE) == sum(tensor.nbytes for tensor in tensors.values())


def test_what_is_written_is_read_back(packed):
    stored = stored_compressed(NAME, renamed(compressed_tensors(NAME, packed), [NAME]), SHAPE, packed.codec)
    read = stored.read(lambda tensor: tensor)
    assert torch.equal(read.decode(), packed.decode())
    assert (read.shape, read.codec.name) == (SHAPE, "int4-64")


@pytest.mark.parametrize("part", ["packed", "scale"])
def test_a_missing_tensor_is_named_as_in_the_file(packed, part):
    tensors = compressed_tensors(NAME, packed)
    del tensors[f"{NAME}_{part}"]
    with pytest.raises(BadInput, match=f"{NAME} is not an int4-64 weight: {NAME}_{part} is missing"):
        stored_compressed(NAME, renamed(tensors, [NAME]), SHAPE, packed.codec)


@pytest.mark.parametrize(("first", "is_bare"), [("layers.0.q", True), ("model.layers.0.q", False)])
def test_layers_in_16_bits_are_also_named_as_in_a_class_with_a_head(first, is_bare):
    left = (first.replace("q", "gate"), "lm_head")
    plan = SimpleNamespace(left_linears=left, base_prefix="model", weights=[SimpleNamespace(module=first)])
    more = ("model.layers.0.gate", "model.lm_head") if is_bare else ()
    assert ignored_layers(plan, ("lm_head", "score")) == (*left, *more, "score")


def test_the_library_reads_the_config():
    pytest.importorskip("compressed_tensors")
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = CompressedTensorsConfig.from_dict(compressed_config(Int4(32), ["lm_head"]))
    (group,) = config.quantization_config.config_groups.values()
    kind = group.weights
    assert (kind.num_bits, kind.type, kind.strategy, kind.group_size, kind.symmetric) == (4, "int", "group", 32, True)
    assert config.quantization_config.format == "pack-quantized"
    assert config.quantization_config.ignore == ["lm_head"]
    assert (config.dequantize, config.is_quantization_compressed) == (True, True)
