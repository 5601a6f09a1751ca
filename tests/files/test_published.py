"""Models in FP8 and MXFP4 are read as transformers decodes them, to the bit."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from qsvd.files.check import check_complete, check_not_quantized
from qsvd.files.source import open_checkpoint
from qsvd.plan.weights import Source, plan_model
from tests.checkpoints import write_checkpoint
from tests.published import dequantized, fp8_tensors, publish, same, write_published


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_decoded_as_transformers_does(tmp_path, scale_dtype):
    write_published(tmp_path, "DeepseekV3", scale_dtype=scale_dtype)
    checkpoint = open_checkpoint(str(tmp_path))
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = check_complete(checkpoint, plan_model(checkpoint.config, exclude=["*.experts.*"]))
    assert {spec.module.rpartition(".")[2] for spec in plan.weights} >= {"kv_a_proj_with_mqa", "q_b_proj", "up_proj"}
    assert not any("scale" in name for name in checkpoint.tensors)
    state = dequantized(tmp_path).state_dict()
    for name, stored in plan.spelling.items():
        assert checkpoint.tensors[stored].dtype in ("BF16", "F32")
        assert same(checkpoint.read(stored), state[name].to(checkpoint.read(stored).dtype)), name
    prefix = "model.layers.1.mlp.experts"
    for number in range(4):
        gate, up, down = (checkpoint.read(f"{prefix}.{number}.{part}_proj.weight") for part in ("gate", "up", "down"))
        assert same(torch.cat([gate, up]), state[f"{prefix}.gate_up_proj"][number])
        assert same(down, state[f"{prefix}.down_proj"][number])


def test_mxfp4_is_decoded_as_transformers_does(tmp_path):
    written = write_published(tmp_path, "GptOss").state_dict()
    checkpoint = open_checkpoint(str(tmp_path))
    check_not_quantized(checkpoint.config, checkpoint.tensors)
    plan = check_complete(checkpoint, plan_model(checkpoint.config, exclude=["*.experts.*"]))
    assert plan.unknown == ()
    state = dequantized(tmp_path).state_dict()
    for name, stored in plan.spelling.items():
        assert same(checkpoint.read(stored), state[name]), name
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert checkpoint.tensors[stack].shape == (4, 64, 192)
    assert checkpoint.tensors[stack].num_bytes == state[stack].nbytes
    assert checkpoint.tensors[stack].stored_bytes == 4 * 192 * (64 // 32) * 17
    assert (checkpoint.read(stack).float() - written[stack].float()).norm() < 0.2 * written[stack].float().norm()


def test_one_expert_and_its_rows_are_read_alone(tmp_path):
    write_published(tmp_path / "oss", "GptOss")
    checkpoint = open_checkpoint(str(tmp_path / "oss"))
    name = "model.layers.0.mlp.experts.down_proj"
    whole = checkpoint.read(name)
    assert same(checkpoint.read_part(Source(name, index=3)), whole[3])
    assert same(checkpoint.read_part(Source(name, index=1, rows=(5, 41))), whole[1, 5:41])
    assert same(checkpoint.read_part(Source(name, rows=(1, 3))), whole[1:3])
    with pytest.raises(ValueError, match="has no rows 4 to 4"):
        checkpoint.read_part(Source(name, index=4))


@pytest.mark.parametrize("shape", [(300, 200), (3, 300, 200), (128, 128), (1, 700), (129, 1)])
def test_blocks_that_the_end_cuts_are_of_the_published_size(tmp_path, shape):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows: 4.5 blocks. transformers 5.23 refuses it, or divides it evenly."""
    torch.manual_seed(1)
    write_checkpoint(tmp_path)
    publish(tmp_path, "fp8")
    path = tmp_path / "model.safetensors"
    stored = fp8_tensors("x", torch.randn(shape) * torch.logspace(-2, 2, shape[-1]))
    safetensors.torch.save_file(safetensors.torch.load_file(path) | stored, path)
    checkpoint = open_checkpoint(str(tmp_path))
    codes, scales = stored["x"].float().numpy(), stored["x_scale_inv"].numpy()
    rows, columns = (np.arange(size) // 128 for size in shape[-2:])
    wanted = torch.from_numpy(codes * scales[..., rows[:, None], columns]).bfloat16()
    assert same(checkpoint.read("x"), wanted)
    last = shape[-2]
    for index in [None] if len(shape) == 2 else [0, 2]:
        matrix = wanted if index is None else wanted[index]
        for first, end in {(0, last), (last // 2, last), (last // 3, last // 2 + 1), (last - 1, last)}:
            assert same(checkpoint.read_part(Source("x", index=index, rows=(first, end))), matrix[first:end])


def test_the_fingerprint_covers_codes_and_scales(tmp_path):
    write_published(tmp_path, "GptOss")
    path = tmp_path / "model.safetensors"
    prints = {open_checkpoint(str(tmp_path)).fingerprint}
    for ending in ("_blocks", "_scales"):
        tensors = safetensors.torch.load_file(path)
        next(tensor for name, tensor in tensors.items() if name.endswith(ending)).view(-1)[:8] += 1
        safetensors.torch.save_file(tensors, path)
        prints.add(open_checkpoint(str(tmp_path)).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"q_scale_inv": t["q_scale_inv"][:2]}, r"q F8_E4M3 \[300, 200\] and F32 \[2, 2\]$"),
        (lambda t: t | {"q": t["q"].to(torch.float8_e5m2)}, r"q F8_E5M2 \[300, 200\] and F32 \[3, 2\]$"),
        (lambda t: t | {"q_scale_inv": t["q_scale_inv"].int()}, r"q F8_E4M3 \[300, 200\] and I32 \[3, 2\]$"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, change, message):
    write_checkpoint(tmp_path)
    publish(tmp_path, "fp8")
    tensors = change(fp8_tensors("q", torch.randn(300, 200)))
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors and their scales are not F8_E4M3 with a scale for each 128 x 128"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_stack_of_another_group_is_not_mxfp4(tmp_path):
    write_published(tmp_path, "GptOss")
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    tensors[name] = tensors[name].reshape(4, 64, 6, 8).contiguous()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"are not MXFP4: model\.layers\.0\.mlp\.experts\.down_proj_blocks U8 \[4, 64"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": None}, "quant_method 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method 'fbgemm_fp8'"),
    ],
)
def test_other_eight_bit_forms_stay_refused(tmp_path, quantization, said):
    write_checkpoint(tmp_path)
    publish(tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=said) as error:
        check_not_quantized(checkpoint.config, checkpoint.tensors)
    assert "qsvd quantizes models in 16 bits, in FP8 with block scales" in str(error.value)
