"""Bases to export from, trained weights made up beside them, and the dense weights that these stand for.

The dense weights come from the files by docs/format.md and NumPy in float64; nothing of qsvd takes part.
"""

import json

import bitsandbytes
import numpy as np
import safetensors.torch
import torch
import transformers

import qsvd
from qsvd.export.trained import Trained, TrainedModel
from qsvd.files.split_folder import open_split
from tests.checkpoints import write_checkpoint
from tests.reference import unpacked

WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes decodes other widths wrongly on some CPUs
IDS = torch.arange(3, 35).reshape(2, 16)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative, at most
EPS32 = 2.0**-23
ROUNDINGS = 8  # two runs in float32 round in another order; each is off the exact result by about the same


def make_base(folder, architecture="LlamaForCausalLM", *, rank=4, dtype=torch.bfloat16, **quantize):
    """A tiny random model in folder/source, and its split in folder/out."""
    write_checkpoint(folder / "source", architecture, dtype=dtype, **WIDTHS)
    options = {"iterations": 1, "shard_size": "100KB"} | quantize
    qsvd.quantize(qsvd.Quantize(str(folder / "source"), out=folder / "out", rank=rank, **options))
    return folder


def perturbed(folder, *, seed=0, size=0.05, gains=False, added=(0,)):
    """Trained weights by name: the stored factors moved by `size`, the nth with added[n % len(added)] more of rank."""
    generator = torch.Generator().manual_seed(seed)
    split = open_split(folder)
    trained = {}
    for number, name in enumerate(split.weights):
        rows, columns = split.weights[name]["shape"]
        up, down = split.factors(name) or (torch.zeros(rows, 0), torch.zeros(0, columns))
        more = added[number % len(added)]
        up = torch.cat((up.float(), torch.zeros(rows, more)), dim=1)
        down = torch.cat((down.float(), torch.zeros(more, columns)))
        up, down = (f + size * torch.randn(f.shape, generator=generator) for f in (up, down))
        gain = 1 + 0.3 * torch.rand(rows, generator=generator) if gains else None
        trained[name] = Trained(up, down, gain)
    return trained


def as_model(folder, trained, **parts):
    return TrainedModel(open_split(folder), trained.__getitem__, **parts)


def files_of(folder):
    """Tensors of all weight files of a folder, by name."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def residual(folder, name):
    """Q by docs/format.md, float64."""
    parts = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "np") as file:
            parts |= {key.removeprefix(name): file.get_tensor(key) for key in file.keys() if key.startswith(name)}  # noqa: SIM118
    state = json.loads(parts[".quant_state.bitsandbytes__nf4"].tobytes())
    scales = parts[".absmax"]
    if ".nested_absmax" in parts:
        nested = parts[".nested_absmax"].repeat(state["nested_blocksize"])[: scales.size]
        scales = parts[".nested_quant_map"][scales] * nested + np.float32(state["nested_offset"])
    size = int(np.prod(state["shape"]))
    values = parts[".quant_map"].astype(np.float64)[unpacked(parts[""].reshape(-1), size)]
    return (values * scales.astype(np.float64).repeat(state["blocksize"])[:size]).reshape(state["shape"])


def dense(folder, name, trained):
    """W', float64."""
    product = trained.up_OK.double().numpy() @ trained.down_KI.double().numpy()
    gain = 1.0 if trained.gain_O is None else trained.gain_O.double().numpy()[:, None]
    return gain * (residual(folder, name) + product)


def roundoff(folder, name, trained):
    """How far float32 may be off `dense`, each element: a rounding for each of K products and sums, and 4 more."""
    rank = trained.up_OK.shape[1]
    up, down = (factor.double().abs().numpy() for factor in (trained.up_OK, trained.down_KI))
    sizes = np.abs(residual(folder, name)) + up @ down
    gain = 1.0 if trained.gain_O is None else np.abs(trained.gain_O.double().numpy()[:, None])
    return (2 * rank + 4) * 2.0**-24 * gain * sizes


def dense_model(source, replaced, dtype=torch.float64, auto=transformers.AutoModelForCausalLM, **options):
    """The source's model with other weights: a float64 array for each module path."""
    model = auto.from_pretrained(source, dtype=dtype, **options)
    for path, weight in replaced.items():
        model.get_submodule(path).weight.data = torch.from_numpy(weight).to(dtype)
    return model


def trained_weights(folder, trained):
    """W' of every module path, float64."""
    return {name.removesuffix(".weight"): dense(folder, name, trained[name]) for name in trained}


def outputs(model):
    """Logits in float64. In eval mode bitsandbytes repacks its weights on some CPUs, so only its modules train."""
    model.eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()
    with torch.no_grad():
        return model(input_ids=IDS)[0].double()


def base_in_float32(folder, auto=transformers.AutoModelForCausalLM, **options):
    """The 4-bit model of a result, computing in float32."""
    model = auto.from_pretrained(folder, **options)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model


def assert_same_outputs(model, exact, rounding):
    """`model` computes in float32 what `exact` does in float64; `rounding` is how far a dense float32 model is off."""
    assert (outputs(model) - exact).abs().max().item() <= ROUNDINGS * rounding


def exact_outputs(source, replaced, auto=transformers.AutoModelForCausalLM):
    """Logits of the dense model in float64, and how far the same model in float32 is off."""
    exact = outputs(dense_model(source, replaced, auto=auto))
    in_float32 = outputs(dense_model(source, replaced, torch.float32, auto=auto))
    return exact, (in_float32 - exact).abs().max().item()


def products(trained, stored):
    """B A - B0 A0 and |B| |A| + |B0| |A0|, float64."""
    parts = [(trained.up_OK.double().numpy(), trained.down_KI.double().numpy())]
    if stored is not None:
        parts.append(tuple(factor.double().numpy() for factor in stored))
    first, *rest = (up @ down for up, down in parts)
    size = sum(np.linalg.norm(up) * np.linalg.norm(down) for up, down in parts)
    return first - sum(rest), size
