"""A random model whose tensors are drawn when they are needed, and how it is written without holding it in memory."""

import copy
import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from random_weights import draw_codes, draw_factors, draw_gaussian, draw_scales, draw_weight, generator_of
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from qsvd.decompose.split import Split
from qsvd.errors import first_line
from qsvd.files.layout import adapter_tensors, digest, residual_tensors
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.safetensors import DTYPE_NAMES, Entry, NewTensor, write_stream
from qsvd.files.source import Checkpoint, other_files
from qsvd.numerics.codec import PackedBlocks
from qsvd.options import Quantize
from qsvd.plan.weights import Source, plan_model
from qsvd.prepare.outputs import copied_tensor, write_outputs
from qsvd.prepare.quantize import QuantizeRun, prepare_quantize
from qsvd.prepare.quantizing.resources import check_resources

BLOCK = re.compile(r"(.*?\.\d+)\.")  # "model.layers.7" of a tensor's name
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DRAW = 1  # raised with every change of the values that a seed gives

SHAPES: dict[str, Mapping[str, int]] = {
    "llama": {"layers": 24, "hidden": 2560, "ffn": 6912, "heads": 20, "kv_heads": 20, "vocab": 32000},
    "llama-3-8b": {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "llama-3-70b": {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "vocab": 128256},
}


@dataclass(frozen=True)
class DrawnEntry(Entry):
    """A tensor that is made each time it is read, always with the same values, on a device of its maker's choice."""

    make: Callable[[], Tensor] = field(repr=False, compare=False)


class DrawnCheckpoint(Checkpoint):
    """A checkpoint in no files."""

    def read_part(self, part: Source) -> Tensor:
        entry = self.tensors[part.tensor]
        assert isinstance(entry, DrawnEntry), "all are drawn"
        assert part == Source(part.tensor), "whole tensors are drawn"
        return entry.make()


@dataclass(frozen=True)
class RandomModel:
    """A random checkpoint, and the names of its tensors by shard."""

    source: Checkpoint
    shards: tuple[tuple[str, ...], ...]


def llama_config(shape: Mapping[str, int]) -> PreTrainedConfig:
    """Return the config of a Llama 3 of this shape: keys as in SHAPES, head not tied to the embedding.

    Raises:
        ValueError: a size is below 1, or transformers refuses the shape.
    """
    wrong = [f"--{name.replace('_', '-')} {size}" for name, size in shape.items() if size < 1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: give 1 or more")
    try:
        return LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"transformers makes no Llama of {dict(shape)}: {first_line(error)}") from error


def random_model(
    name: str, config: PreTrainedConfig, seed: int, device: torch.device, *, layers_per_shard: int, files: Path | None
) -> RandomModel:
    """Return a model of this config whose tensors are drawn on `device`, in the dtype of the config, or bfloat16.

    Args:
        name: The name of the model in reports.
        layers_per_shard: Blocks in one shard; tensors before and after the blocks have their own shards.
        files: Folder of a tokenizer to copy.

    Raises:
        ValueError: qsvd cannot split a model of this config, layers_per_shard is below 1, or `files` is not a folder.
    """
    if layers_per_shard < 1:
        raise ValueError(f"--layers-per-shard {layers_per_shard} is below 1")
    if files is not None and not files.is_dir():
        raise ValueError(f"--tokenizer {files} is not a folder")
    config = copy.deepcopy(config)
    dtype = config.dtype = config.dtype if config.dtype in DTYPES else torch.bfloat16
    plan = plan_model(config)
    config.architectures = config.architectures or [plan.architecture]
    split = {f"{spec.module}.weight" for spec in plan.weights}
    shapes = {name: shape for name, shape in plan.shapes.items() if name not in plan.tied}
    shards = _shards(list(shapes), layers_per_shard)
    entries = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        make = partial(_drawn, tensor, shapes[tensor], seed, device, dtype, is_split=tensor in split)
        num_bytes = math.prod(shapes[tensor]) * dtype.itemsize
        entries[tensor] = DrawnEntry(tensor, DTYPE_NAMES[dtype], shapes[tensor], num_bytes, make)
    config_json = json.loads(config.to_json_string())
    identity = json.dumps([DRAW, seed, device.type, config_json], sort_keys=True)
    source = DrawnCheckpoint(
        name=f"{name}, random, seed {seed}",
        folder=None,
        revision=None,
        config=config,
        config_json=config_json,
        tensors=entries,
        other_files=other_files(files) if files else (),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    )
    return RandomModel(source, shards)


def write_16_bit(model: RandomModel, out: Path) -> None:
    """Write a 16-bit model in shards, one tensor in memory at a time.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; give a new folder")
    out.mkdir(parents=True)
    source = model.source
    weight_map: dict[str, str] = {}
    for number, names in enumerate(model.shards, start=1):
        file = f"model-{number:05d}-of-{len(model.shards):05d}.safetensors"
        entries = [source.tensors[name] for name in names]
        tensors = [NewTensor(e.name, e.dtype, e.shape, partial(source.read, e.name)) for e in entries]
        write_stream(out / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(entry.num_bytes for entry in source.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for path in source.other_files:
        shutil.copyfile(path, out / path.name)
    (out / "config.json").write_text(json.dumps(source.config_json, indent=2) + "\n")


def write_split(model: RandomModel, options: Quantize) -> None:
    """Write a quantized model with random residuals and components. It has no errors, because no weight is split.

    The same call continues after a stop.

    Args:
        options: The options of the loop have no effect; the seed is that of the draw.

    Raises:
        ValueError: an option cannot be used, or the folder holds something else.
        DoesNotFit: the files do not fit on the disk.
    """
    run = prepare_quantize(options, model.source)
    run = replace(run, options=replace(options, iterations=0))  # which says "drawn" in every record and report
    check_resources(run)
    with OutputFolder(run.out, run.identity) as folder:
        if folder.is_complete:
            return
        for shard in run.shards:
            if (run.out / shard.file).is_file():
                continue
            started = time.perf_counter()
            residuals = [new for number in shard.weights for new in _residual(run, folder, number)]
            folder.write_shard(shard.file, (), [*residuals, *(copied_tensor(run, name) for name in shard.copied)])
            seconds = time.perf_counter() - started
            print(f"{shard.file}: {shard.num_bytes / seconds / 1e6:.0f} MB/s", file=sys.stderr)
        write_outputs(run, folder)


def _residual(run: QuantizeRun, folder: OutputFolder, number: int) -> Iterator[NewTensor]:
    """Yield the tensors of one residual. The small ones are drawn now, the codes when they are written.

    The components are saved with the codes, because their file holds the digest of the residual.
    """
    spec = run.plan.weights[number]
    choice = run.resolved.choices[spec.module]
    scales_of, factors_of, codes_of = (
        generator_of(run.options.seed, f"{part} {spec.module}", run.device) for part in ("scales", "factors", "codes")
    )
    scales, no_codes = draw_scales(spec.shape, choice.codec, scales_of), torch.empty(0, dtype=torch.uint8)
    small = residual_tensors(spec.name, PackedBlocks(no_codes, scales, spec.shape, choice.codec), run.compute_dtype)
    del small[spec.name]

    def codes() -> Tensor:
        drawn = draw_codes(spec.shape, codes_of).view(-1, 1).cpu()
        factors = (factor.to(run.dtype) for factor in draw_factors(spec.shape, choice.rank, factors_of))
        packed = PackedBlocks(drawn, scales, spec.shape, choice.codec)
        split = Split(packed, *factors, iteration=0, history=())
        tensors = adapter_tensors(spec.module, split)
        folder.save_factors(number, tensors, None, digest({spec.name: drawn, **small}))
        return drawn

    yield NewTensor(spec.name, "U8", (math.ceil(math.prod(spec.shape) / 2), 1), codes)
    for name, tensor in small.items():
        yield NewTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor)


def _drawn(
    name: str, shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype, *, is_split: bool
) -> Tensor:
    """Return one tensor of the model: a bias is 0, a norm 1."""
    if len(shape) < 2:
        return torch.full(shape, float(not name.endswith("bias")), dtype=dtype, device=device)
    generator = generator_of(seed, name, device)
    if is_split:
        return draw_weight((shape[0], shape[1]), generator, dtype)
    return draw_gaussian(shape, generator, dtype)


def _shards(names: Sequence[str], layers_per_shard: int) -> tuple[tuple[str, ...], ...]:
    """Return the names by shard: tensors outside the blocks, and `layers_per_shard` blocks together; sorted."""

    def block_of(name: str) -> str:
        found = BLOCK.match(name)
        return found[1] if found else ""

    def groups() -> Iterator[list[str]]:
        for inside, run in groupby(names, key=lambda name: block_of(name) != ""):
            blocks = [list(block) for _, block in groupby(run, key=block_of)]
            step = layers_per_shard if inside else len(blocks)
            for first in range(0, len(blocks), step):
                yield [name for block in blocks[first : first + step] for name in block]

    return tuple(tuple(sorted(group)) for group in groups())
