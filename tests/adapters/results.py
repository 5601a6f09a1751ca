"""Results of `qsvd quantize` for tests of whole models, and the plain float64 model that such a result stands for."""

import json

import bitsandbytes
import numpy as np
import torch
import transformers

from tests import reference
from tests.checkpoints import tiny_config
from tests.commands.folders import components_of, tensors_of
from tests.drawn import drawn_base

ROUNDINGS = 8  # two runs in one dtype round in another order; each is off the exact result by about the same
IDS = torch.arange(3, 35).reshape(2, 16)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
INPUTS = {  # of models that do not take tokens alone
    "T5ForConditionalGeneration": {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
    "MusicgenForCausalLM": {"input_ids": IDS.reshape(4, 8)},  # two codebooks
    "ViTModel": {"pixel_values": PIXELS},
    "SiglipModel": {"input_ids": IDS, "pixel_values": PIXELS},
}


def split_checkpoint(
    folder, architecture="LlamaForCausalLM", *, rank=4, shard_size="5GB", dtype=torch.bfloat16, seed=0, **options
):
    """A tiny random checkpoint in folder/source and a quantized model that goes with it in folder/out; the latter."""
    config = tiny_config(architecture, dtype=dtype, **options)
    chosen = {"source": folder / "source", "seed": seed, "shard_size": shard_size, "files": None}
    return drawn_base(folder / "out", config, rank, **chosen)


def modules_of(out):
    """Module path of every split weight."""
    return {weight["module"] for weight in json.loads((out / "qsvd.json").read_text())["weights"].values()}


def plain_model(out):
    """transformers' own model of the source in float64, with Q + B A in the place of each split weight."""
    manifest = json.loads((out / "qsvd.json").read_text())
    kind = getattr(transformers, manifest["source"]["architecture"])
    model = kind.from_pretrained(out.parent / "source", dtype=torch.float64).eval()
    stored, factors = tensors_of(out), components_of(out)
    for name, weight in manifest["weights"].items():
        dense = by_definition(name, weight["shape"], stored)
        if weight["rank"]:
            prefix = f"base_model.model.{weight['module']}.lora_"
            dense += factors[f"{prefix}B.weight"].double() @ factors[f"{prefix}A.weight"].double()
        model.get_submodule(weight["module"]).weight.data = dense
    return model


def by_definition(name, shape, stored):
    """Q [O, I] from the tensors that bitsandbytes defines, float32 products and sums in float64."""
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    parts = (stored[f"{name}.{part}"].numpy() for part in ("nested_quant_map", "absmax", "nested_absmax"))
    levels, codes, absmax = parts
    scales = levels[codes] * absmax.repeat(state["nested_blocksize"])[: codes.size] + np.float32(state["nested_offset"])
    indices = reference.unpacked(stored[name].flatten().numpy(), shape[0] * shape[1])
    return torch.from_numpy(reference.nf4_decode(indices, scales, shape).astype(np.float32)).double()


def in_float32(model):
    """The same model in float32 arithmetic. bitsandbytes' layers alone are in train mode: in eval mode they repack."""
    for parameter in model.eval().parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train().compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model


def outputs(model, architecture="LlamaForCausalLM"):
    """Logits, or hidden states of a bare encoder, in float64."""
    with torch.no_grad():
        return model(**INPUTS.get(architecture, {"input_ids": IDS}))[0].double()


def distance(left, right):
    return (left - right).abs().max().item()


def exact_outputs(plain, architecture="LlamaForCausalLM"):
    """Outputs of a float64 model, and how far from them float32 may be."""
    found = outputs(plain, architecture)
    rounding = ROUNDINGS * distance(outputs(plain.float(), architecture), found)
    assert rounding > 0
    return found, rounding


def assert_as_exact_as_float32(ours, exact, architecture="LlamaForCausalLM"):
    found, rounding = exact
    assert distance(outputs(ours, architecture), found) <= rounding
