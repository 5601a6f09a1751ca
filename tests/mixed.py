"""A base of mixed bits and ranks, and the numbers it stands for, by docs/format.md and NumPy in float64."""

import json
import re

import numpy as np
import torch
import transformers

import qsvd
from tests import normal_floats
from tests.checkpoints import write_checkpoint
from tests.commands.folders import components_of, tensors_of

CODECS = ("nf3-64-8x256-fit", "nf2-16-fp16", "nf8-128-bf16", "nf4-32-3x16", "nf3-64-fp32")
RANKS = (3, 0, 4, 1)
SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_table(file, modules, codecs=CODECS, ranks=RANKS):
    """An allocation that gives neighbours different things; {module: (codec, rank)}."""
    chosen = {m: (codecs[n % len(codecs)], ranks[n % len(ranks)]) for n, m in enumerate(modules)}
    file.write_text("".join(f"{module} {codec} {rank}\n" for module, (codec, rank) in chosen.items()))
    return chosen


def modules_of(folder):
    """Paths of the linear layers in the blocks of a checkpoint, in model order."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return [path for path, module in model.named_modules() if ".layers." in path and hasattr(module, "in_features")]


def mixed_base(folder, *, shard_size="5GB", **options):
    """A tiny random Llama in folder/source and its mixed split in folder/out; the latter."""
    write_checkpoint(folder / "source", **options)
    write_table(folder / "table.txt", modules_of(folder / "source"))
    options = {"iterations": 1, "shard_size": shard_size, "allocation": folder / "table.txt"}
    return qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", **options))


def residual(codec, module, shape, stored):
    """Q [O, I], float64, rounded to float32 once as a decoder does."""
    bits, block, dtype, scale_bits, scale_block = re.fullmatch(
        r"nf(\d)-(\d+)-(?:(fp32|fp16|bf16)|(\d+)x(\d+))(?:-fit)?", codec
    ).groups()
    count = shape[0] * shape[1]
    blocks = -(-count // int(block))
    parts = {
        part: stored[key] for part in ("absmax", "absmax_codes", "offset") if (key := f"{module}.{part}") in stored
    }
    if dtype:
        assert parts.keys() == {"absmax"}
        assert parts["absmax"].dtype == SCALES[dtype]
        scales = normal_floats.scales_of(parts, blocks)
    else:
        scales = normal_floats.scales_of(parts, blocks, int(scale_bits), int(scale_block))
    codes = normal_floats.unpacked_bits(stored[f"{module}.weight"].numpy(), int(bits), count)
    values = normal_floats.levels(int(bits))[codes] * scales.repeat(int(block))[:count]
    return values.reshape(shape)


def plain_model(out):
    """transformers' own model of the source in float64, with Q + B A in the place of each split weight."""
    manifest = json.loads((out / "qsvd.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(out.parent / "source", dtype=torch.float64).eval()
    stored, factors = tensors_of(out), components_of(out)
    for weight in manifest["weights"].values():
        module = weight["module"]
        dense = residual(weight["codec"], module, weight["shape"], stored)
        if weight["rank"]:
            up, down = (factors[f"base_model.model.{module}.lora_{letter}.weight"].double().numpy() for letter in "BA")
            assert up.shape[1] == weight["rank"]
            dense = dense + up @ down
        model.get_submodule(module).weight.data = torch.from_numpy(np.ascontiguousarray(dense))
    return model
