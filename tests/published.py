"""Checkpoints in FP8 and MXFP4, written by the published layouts; the encoders share no code with qsvd."""

import json
import re

import numpy as np
import safetensors.torch
import torch
import transformers

DEEPSEEK = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
MXFP4_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8_tensors(name, weight, block=(128, 128), scale_dtype=torch.float32):
    """X and X_scale_inv of a matrix [..., O, I], as DeepSeek publishes them."""
    *_, rows, columns = weight.shape
    height, width = block
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*weight.shape[:-2], -(-rows // height), -(-columns // width), dtype=scale_dtype)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = weight[..., top : top + height, left : left + width].float()
            scale = (part.abs().amax((-2, -1), keepdim=True) / 448).to(scale_dtype)
            codes[..., top : top + height, left : left + width] = (part / scale.float()).to(torch.float8_e4m3fn)
            scales[..., top // height, left // width] = scale[..., 0, 0]
    return {name: codes, f"{name}_scale_inv": scales}


def mxfp4_tensors(name, stack):
    """X_blocks and X_scales of a stack [E, I, O], as gpt-oss publishes them."""
    numbers = stack.transpose(1, 2).double().numpy()
    groups = numbers.reshape(*numbers.shape[:2], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    scaled = groups / 2.0 ** exponents[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - MXFP4_VALUES).argmin(-1) + 8 * (scaled < 0)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    return {
        f"{name}_blocks": torch.from_numpy(np.ascontiguousarray(packed)),
        f"{name}_scales": torch.from_numpy(np.ascontiguousarray(exponents + 127, dtype=np.uint8)),
    }


def publish(folder, kind, **options):
    """Rewrite a checkpoint that transformers saved: the matrices of the blocks in FP8, or the stacks in MXFP4."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if kind == "fp8" and re.search(r"layers\.\d+\..*(proj|_mqa|eh)\.weight$|_proj$", name):
            tensors |= fp8_tensors(name, tensor, **options)
        elif kind == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors |= mxfp4_tensors(name, tensor)
        else:
            tensors[name] = tensor
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": kind, "modules_to_not_convert": ["lm_head", "router"]}
    if kind == "fp8":
        block = list(options.get("block", (128, 128)))
        quantization = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": block,
        }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return tensors


def write_published(folder, name, **options):
    """A tiny DeepSeek-V3 in FP8, or gpt-oss in MXFP4; the model as transformers loads it."""
    kind, sizes, quant = {"DeepseekV3": ("DeepseekV3", DEEPSEEK, "fp8"), "GptOss": ("GptOss", GPT_OSS, "mxfp4")}[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, architectures=[f"{kind}ForCausalLM"], pad_token_id=0)
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # blocks of very different sizes
            parameter.mul_(torch.logspace(-3, 1, len(parameter)).reshape(-1, *[1] * (parameter.ndim - 1)))
    model.save_pretrained(folder)
    publish(folder, quant, **options)
    return model


def same(ours, theirs):
    """Equal to the bit."""
    return ours.dtype == theirs.dtype and torch.equal(ours.view(BITS[ours.dtype]), theirs.view(BITS[theirs.dtype]))


def dequantized(folder):
    """The model in bfloat16, as transformers decodes it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
