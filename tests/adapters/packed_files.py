"""Checkpoints of qsvd's own quantization method with random codes and scales, and their decoding by definition.

What is written here follows docs/format.md alone; levels, bits and scales are those of tests/normal_floats.py.
"""

import json
from math import ceil

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import normal_floats, reference

CODECS = ("nf3-64-8x256", "nf2-64-bf16", "nf4-32-fp32", "nf8-16-fp16", "nf2-16-3x16", "nf3-128-4x64", "nf4-16-2x16")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def meaning(codec):
    """Bits, block, dtype of the scales, bits and block of nested ones or None: "nf3-64-8x256"."""
    bits, block, scales = codec.removeprefix("nf").split("-")
    nested = tuple(map(int, scales.split("x"))) if "x" in scales else (None, None)
    return int(bits), int(block), DTYPES.get(scales), *nested


def random_parts(codec, shape, seed=0):
    """What the files hold for one weight, by the last part of the name."""
    rng = np.random.default_rng([seed, *shape])
    bits, block, dtype, nested_bits, nested_block = meaning(codec)
    blocks = ceil(shape[0] * shape[1] / block)
    codes = normal_floats.packed_bits(rng.integers(0, 2**bits, shape[0] * shape[1]), bits)
    found = {"weight": torch.from_numpy(codes)}
    if dtype is not None:
        return found | {"absmax": torch.from_numpy(rng.uniform(0.1, 0.4, blocks)).to(dtype)}
    nested = normal_floats.packed_bits(rng.integers(0, 2**nested_bits, blocks), nested_bits)
    absmax = torch.from_numpy(rng.uniform(0.1, 0.3, ceil(blocks / nested_block)).astype(np.float32))
    return found | {"absmax": absmax, "absmax_codes": torch.from_numpy(nested), "offset": torch.tensor(0.1)}


def decoded(codec, parts, shape):
    """The weight by definition, float64 [O, I]: a level times a scale."""
    bits, block, _, *nested = meaning(codec)
    blocks = ceil(shape[0] * shape[1] / block)
    codes = normal_floats.unpacked_bits(parts["weight"].numpy(), bits, shape[0] * shape[1])
    scales = normal_floats.scales_of(parts, blocks, *nested)
    return (normal_floats.levels(bits)[codes] * reference.spread(scales, codes.size, block)).reshape(shape)


def write_packed(folder, model, paths, *, dtype=torch.bfloat16, codecs=CODECS, spelling=None):
    """Save a model with random codes in the place of these linear layers' weights, each path with another codec.

    Args:
        spelling: A module's path -> its path in the files, where the two differ.

    Returns:
        The model with the dense weights, float32, and the quantization_config.
    """
    model.to(dtype).save_pretrained(folder)
    files = load_file(folder / "model.safetensors")
    model = type(model).from_pretrained(folder, dtype=torch.float32)
    listed: dict[str, list[str]] = {}
    for number, path in enumerate(paths):
        codec, linear = codecs[number % len(codecs)], model.get_submodule(path)
        parts = random_parts(codec, tuple(linear.weight.shape), seed=number)
        dense = decoded(codec, parts, tuple(linear.weight.shape))
        linear.weight = nn.Parameter(torch.from_numpy(dense).float())
        listed.setdefault(codec, []).append(path)
        files |= {f"{(spelling or {}).get(path, path)}.{part}": tensor for part, tensor in parts.items()}
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    found = {"quant_method": "qsvd", "codecs": listed, "dtype": str(dtype).removeprefix("torch.")}
    edit_config(folder, quantization_config=found)
    return model, found


def edit_config(folder, **changes):
    """Change values of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def block_linears(model):
    """Paths of the plain linear layers inside of the repeated blocks."""
    linears = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    return [path for path in linears if any(map(str.isdigit, path.split(".")))]
