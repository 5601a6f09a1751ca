"""Names and bytes of a split: judged by what bitsandbytes writes, what PEFT reads, and hashlib."""

import hashlib
import itertools
import json

import bitsandbytes.functional as bitsandbytes
import peft
import pytest
import torch
from transformers import BitsAndBytesConfig

from qsvd.decompose.split import Split
from qsvd.files.layout import (
    adapter_config,
    adapter_tensors,
    digest,
    fingerprint,
    quantization_config,
    residual_tensors,
    stored_residual,
)
from qsvd.files.safetensors import DTYPE_NAMES, NewTensor, write_stream
from qsvd.numerics.codec import NestedScales
from qsvd.numerics.nf4 import NormalFloat4
from qsvd.plan.allocation import STATE_BYTES, residual_bytes

NAME = "model.layers.0.mlp.down_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (64, 172), (33, 5), (1, 7), (300, 256)]


def weight_of(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_bitsandbytes(weight, double_quant):
    """What its own Linear4bit saves for this weight: the codes, and the state packed for safetensors."""
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
    return {NAME: codes} | {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}


def assert_same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tensors_of_a_residual_are_the_bytes_that_bitsandbytes_saves(shape, dtype, double_quant):
    weight = weight_of(shape, dtype)
    packed = NormalFloat4(double_quant=double_quant).encode(weight)
    assert_same_bytes(residual_tensors(NAME, packed, dtype), by_bitsandbytes(weight, double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_a_residual_as_its_own_state(dtype, double_quant):
    weight = weight_of((64, 192))
    packed = NormalFloat4(double_quant=double_quant).encode(weight)
    tensors = residual_tensors(NAME, packed, dtype)
    state = bitsandbytes.QuantState.from_dict({k: v for k, v in tensors.items() if k != NAME}, device="cpu")
    assert state.dtype == dtype
    decoded = bitsandbytes.dequantize_4bit(tensors[NAME], state)
    assert torch.equal(decoded, packed.decode().to(dtype))


def read_back(saved):
    state = saved.get(f"{NAME}.quant_state.bitsandbytes__nf4")
    stored = stored_residual(NAME, saved, b"" if state is None else state.numpy().tobytes())
    return stored.read(lambda tensor: tensor)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_bitsandbytes_saves_is_read_back_and_written_again_to_the_same_bytes(shape, double_quant):
    saved = by_bitsandbytes(weight_of(shape), double_quant)
    packed = read_back(saved | {"another.weight": torch.zeros(2)})
    assert packed.shape == shape
    assert isinstance(packed.scales, NestedScales) == double_quant
    assert packed.codec.double_quant == double_quant
    assert_same_bytes(residual_tensors(NAME, packed, torch.float32), saved)


@pytest.mark.parametrize("lacking", [NAME, f"{NAME}.absmax", f"{NAME}.quant_state.bitsandbytes__nf4"])
def test_a_residual_that_lacks_a_tensor_is_refused(lacking):
    saved = by_bitsandbytes(weight_of((64, 64)), double_quant=True)
    del saved[lacking]
    with pytest.raises(ValueError, match=r"down_proj\.weight is not an NF4 weight: it needs"):
        read_back(saved)


def test_a_residual_in_fp4_is_refused():
    codes, state = bitsandbytes.quantize_4bit(weight_of((64, 64)), quant_type="fp4", blocksize=64)
    saved = {NAME: codes} | {f"{NAME}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    with pytest.raises(ValueError, match="is not an NF4 weight"):
        read_back(saved)


def split_of(rank, dtype=torch.bfloat16):
    packed = NormalFloat4(double_quant=False).encode(weight_of((6, 10)))
    up, down = weight_of((6, rank), dtype, seed=1), weight_of((rank, 10), dtype, seed=2)
    return Split(packed, up, down, 1, (0.0,))


def test_factors_have_the_names_and_shapes_of_pefts_own_state_dict():
    module = torch.nn.ModuleDict({"proj": torch.nn.Linear(10, 6, bias=False)})
    model = peft.get_peft_model(module, peft.LoraConfig(r=3, target_modules=["proj"]))
    theirs = peft.get_peft_model_state_dict(model)
    ours = adapter_tensors("proj", split_of(3))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    up, down = (ours[f"base_model.model.proj.lora_{letter}.weight"] for letter in "BA")
    assert torch.equal(up, weight_of((6, 3), torch.bfloat16, seed=1))
    assert torch.equal(down, weight_of((3, 10), torch.bfloat16, seed=2))


def test_rank_0_has_no_factors():
    assert adapter_tensors("proj", split_of(0)) == {}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (11008, 4096), (8192, 28672)])
def test_the_bytes_of_a_residual_are_foreseen_from_above_and_within_a_state(shape, double_quant):
    if shape[0] * shape[1] > 1e6:  # too large to encode here; what bitsandbytes would store, counted by hand
        blocks = shape[0] * shape[1] // 64
        scales = blocks + 4 * (blocks // 256) + 4 * 256 if double_quant else 4 * blocks
        actual = shape[0] * shape[1] // 2 + scales + 4 * 16 + 200  # the JSON of a state has 200 bytes or so
    else:
        tensors = by_bitsandbytes(weight_of(shape, torch.bfloat16), double_quant)
        actual = sum(tensor.nbytes for tensor in tensors.values())
    foreseen = residual_bytes(NormalFloat4(double_quant=double_quant), shape)
    assert actual <= foreseen <= actual + STATE_BYTES


def test_the_longest_state_fits_in_what_is_foreseen_for_it():
    nested = NestedScales(
        torch.zeros(4, dtype=torch.uint8), torch.ones(1), torch.tensor(-1.2345678806304932e-38), torch.ones(256), 256
    )
    packed = NormalFloat4(double_quant=True).encode(weight_of((4, 64)))
    longest = type(packed)(packed.codes, nested, (10**6, 10**6), packed.codec)
    state = residual_tensors(NAME, longest, torch.bfloat16)[f"{NAME}.quant_state.bitsandbytes__nf4"]
    assert json.loads(state.numpy().tobytes())["shape"] == [10**6, 10**6]
    assert state.numel() <= STATE_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_sha256_over_names_and_bytes_in_the_order_of_names(dtype, tmp_path):
    tensors = {"b": weight_of((3, 4), dtype), "a": torch.arange(5), "empty": torch.zeros(0)}
    total = hashlib.sha256()
    for name in ("a", "b", "empty"):
        tensor = tensors[name]
        write_stream(tmp_path / name, [NewTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor)], {})
        content = (tmp_path / name).read_bytes()
        total.update(name.encode() + b"\x00" + content[len(content) - tensor.nbytes :])
    for order in itertools.permutations(tensors):
        assert digest({name: tensors[name] for name in order}) == total.hexdigest()


def test_a_digest_of_a_transposed_view_is_that_of_its_values():
    tensor = weight_of((3, 4))
    assert digest({"a": tensor.T}) == digest({"a": tensor.T.contiguous()}) != digest({"a": tensor})


def test_a_fingerprint_is_sha256_over_a_line_for_each_weight_in_the_order_of_names():
    text = b"a.weight 01ab\nb.weight 77ff\n"
    digests = {"b.weight": "77ff", "a.weight": "01ab"}
    assert fingerprint(digests) == hashlib.sha256(text).hexdigest()
    assert fingerprint(dict(reversed(digests.items()))) == fingerprint(digests)


def test_peft_makes_a_plain_lora_with_scale_1_of_the_adapter_config(tmp_path):
    config = adapter_config(["b.proj", "a.proj"], 12, "CAUSAL_LM", "some/base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(lora) is peft.LoraConfig
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (12, 12, 0.0, "none")
    assert (lora.init_lora_weights, lora.use_dora, lora.use_rslora) == (True, False, False)
    assert (lora.task_type, lora.base_model_name_or_path, lora.inference_mode) == ("CAUSAL_LM", "some/base", True)
    assert lora.target_modules == {"a.proj", "b.proj"}
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"proj": torch.nn.Linear(32, 32)})})
    lora.task_type = lora.base_model_name_or_path = None
    assert peft.get_peft_model(model, lora).base_model.model["a"]["proj"].scaling == {"default": 1.0}


def test_an_adapter_config_does_not_depend_on_the_order_of_modules():
    names = [f"layer.{number}.proj" for number in range(20)]
    one, other = (json.dumps(adapter_config(order, 4, None, "base")) for order in (names, names[::-1]))
    assert one == other


@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_reads_the_quantization_config_as_nf4(double_quant):
    record = quantization_config(
        ["lm_head", "x.gate"], double_quant=double_quant, dtype=torch.float16, has_components=False
    )
    config = BitsAndBytesConfig.from_dict(json.loads(json.dumps(record)))
    assert (config.load_in_4bit, config.load_in_8bit, config.bnb_4bit_quant_type) == (True, False, "nf4")
    assert config.bnb_4bit_use_double_quant is double_quant
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert config.bnb_4bit_quant_storage == torch.uint8
    assert config.llm_int8_skip_modules == ["lm_head", "x.gate"]
