"""What `qsvd quantize` writes: the tensors of one weight, and the files around the shards, the manifest last."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import groupby
from math import sqrt
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

import qsvd
from qsvd.decompose.split import Split
from qsvd.errors import listing
from qsvd.export.peft import adapter_settings
from qsvd.files.atomic import write_json, write_record, write_text
from qsvd.files.layout import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    adapter_tensors,
    fingerprint,
    packed_config,
    packed_tensors,
    quantization_config,
    residual_tensors,
)
from qsvd.files.quantize_folder import OutputFolder
from qsvd.files.quantized.compressed import compressed_config, compressed_tensors
from qsvd.files.quantized.manifest import FORMATS
from qsvd.files.quantized.padding import with_padding, write_padding
from qsvd.files.readers import content_digest
from qsvd.files.safetensors import NewTensor, TensorEntry, read_header
from qsvd.files.source import copy_files, place_of
from qsvd.files.split_folder import INDEX
from qsvd.files.workspace import ERRORS, MANIFEST, REPORT
from qsvd.inputs.paths import hub_id
from qsvd.numerics.int4 import Int4
from qsvd.numerics.names import spelling
from qsvd.plan.weights import WeightSpec
from qsvd.prepare.quantize import ALLOCATION, QuantizeRun
from qsvd.prepare.using.pages import quantized_page_of
from qsvd.records import WeightError
from qsvd.report.card import card_header, markdown, origin_of
from qsvd.report.errors import from_record, to_markdown, to_record, totals_table
from qsvd.report.page.document import subject_page
from qsvd.report.readme import readme
from qsvd.report.serving import joined_layers

LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft", "safetensors")
TASKS = {  # PEFT's task_type; for classifiers none, since PEFT would look for a head among the factors
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def tensors_of(run: QuantizeRun, spec: WeightSpec, split: Split) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of residual and components under their names in the files, on the CPU."""
    if run.resolved.layout == "compressed-tensors":
        residual = compressed_tensors(spec.name, split.residual)
    elif run.resolved.layout == "bitsandbytes":
        residual = residual_tensors(spec.name, split.residual, run.compute_dtype)
    else:
        residual = packed_tensors(spec.name, split.residual)
    if spec.role == "embedding":
        residual[spec.name] = residual[spec.name].view(spec.shape)
    return {name: tensor.cpu() for name, tensor in residual.items()}, adapter_tensors(spec.module, split)


def copied_tensor(run: QuantizeRun, name: str) -> NewTensor:
    """Return a tensor of the 16-bit model as it is; its bytes are copied or read when they are written."""
    entry = run.checkpoint.tensors[name]
    values = entry if isinstance(entry, TensorEntry) else partial(run.checkpoint.read, name)
    return NewTensor(name, entry.dtype, entry.shape, values)


def error_change(before: float, after: float) -> str:
    """Return in words how much components changed the Frobenius error; both are sums of squares over weights."""
    percent = 100 * (sqrt(after / before) - 1) if before else 0.0
    return f"error {percent:+.1f} % by components"


def write_outputs(run: QuantizeRun, folder: OutputFolder, padding: tuple[str, int] | None = None) -> None:
    """Write the files of a complete quantized model, then delete the folder of unfinished work. May run again.

    A weight whose record is null was drawn, not split: it has no error, and the report says so.

    Args:
        padding: The padding token and its number, which every reader of the model is told; None changes nothing.
    """
    digests = {spec.name: folder.residual_sha256(number) for number, spec in enumerate(run.weights)}
    sources = {spec.name: folder.source_digest(number) for number, spec in enumerate(run.weights)}
    base = fingerprint(digests)
    records = [folder.weight_record(number) for number in range(len(run.weights))]
    errors = [from_record(record) for record in records if record is not None]
    if run.header.rank > 0:
        _write_adapter(run, folder, base)
    quantization = _quantization(run)
    config = with_padding(run.checkpoint.config_json, padding)
    write_json(run.out / "config.json", config | {"quantization_config": quantization})
    _write_index(run)
    copy_files(run.checkpoint.other_files, run.out)
    write_padding(run.out, padding)
    write_text(run.out / ERRORS, "".join(f"{json.dumps(to_record(error))}\n" for error in errors))
    write_text(run.out / "report.md", to_markdown(run.header, errors) if errors else _unmeasured(run))
    if run.table is not None:
        write_text(run.out / ALLOCATION, run.table)
    write_text(run.out / "README.md", _card(run, quantization, errors))
    write_text(run.out / REPORT, subject_page(quantized_page_of(run.out, run.header, errors)))
    write_record(run.out / MANIFEST, _manifest(run, digests, sources, base))
    folder.close()


def _card(run: QuantizeRun, quantization: dict[str, Any], errors: list[WeightError]) -> str:
    """Return OUT/README.md: a model card."""
    source, architecture, library = run.checkpoint, run.plan.architecture, run.quantizer
    origin = origin_of(source.folder, hub_id(source.name, source.revision), architecture)
    tags = ["quantization", *(["4-bit", library] if library != "qsvd" else ["mixed-precision"])]
    widths, table = {spec.module: spec.shape[1] for spec in run.plan.weights}, ""
    if errors:
        table = totals_table(run.header, errors)
    text = readme(run.header, str(run.out), architecture, quantization, widths, table)
    return card_header(origin, "quantized", "transformers", tags) + text


def _write_adapter(run: QuantizeRun, folder: OutputFolder, base: str) -> None:
    """Write the components next to the model: transformers then loads both, also after the folder was moved."""
    metadata = {"qsvd_base_fingerprint": base}
    folder.write_adapter(ADAPTER_TENSORS, range(len(run.plan.weights)), metadata)
    task = next((task for ending, task in TASKS.items() if run.plan.architecture.endswith(ending)), None)
    ranks = {module: choice.rank for module, choice in run.resolved.choices.items() if choice.rank}
    config = adapter_settings(ranks, (), task, base=None)
    write_json(run.out / ADAPTER_CONFIG, config)


def _quantization(run: QuantizeRun) -> dict[str, Any]:
    """Return the quantization_config of config.json."""
    if run.quantizer == "qsvd":
        stacks = {spec.module: spec.stack for spec in run.weights}
        return packed_config(run.everything, run.compute_dtype, stacks, () if any(stacks.values()) else run.misplaced)
    if run.quantizer == "compressed-tensors":
        codec = next(iter(run.resolved.choices.values())).codec
        assert isinstance(codec, Int4), "the layout says so"
        return compressed_config(codec, run.skipped)
    nested, skipped = run.header.codec == "nf4+dq", list(run.skipped)
    whole, _ = joined_layers(skipped, [spec.module for spec in run.plan.weights])
    return quantization_config(
        [*skipped, *whole], double_quant=nested, dtype=run.compute_dtype, has_components=run.header.rank > 0
    )


def misplaced_layers(run: QuantizeRun) -> str:
    """Return a warning if qsvd alone will open OUT because of PEFT; "" if not, or if a budget is not solved yet."""
    if run.allocation is None or any(spec.stack for spec in run.weights) or not run.misplaced:
        return ""
    return (
        f"warning: PEFT would put the components of {listing(run.misplaced)} on the experts, since their names are "
        "similar; qsvd alone will open the folder. --exclude these layers too, or give --rank 0, for plain transformers"
    )


def parted_layers(run: QuantizeRun) -> str:
    """Return a warning if vLLM will change a layer that stays in 16 bits; "" if it does not."""
    if run.allocation is None or run.quantizer == "qsvd" or not run.plan.architecture.endswith("ForCausalLM"):
        return ""
    _, parted = joined_layers(run.skipped, [spec.module for spec in run.plan.weights])
    if not parted:
        return ""
    does = "quantizes that part while it loads the model" if run.quantizer == "bitsandbytes" else "refuses the model"
    return (
        f"warning: --include or --exclude leaves a part of {listing(parted)} in 16 bits; vLLM computes the parts as "
        f"one layer and {does}. Choose all parts or none (q, k and v; gate and up), or serve the merged model"
    )


def _write_index(run: QuantizeRun) -> None:
    """Write the index of the shards; next to an adapter one shard has one too, since vLLM reads all files otherwise."""
    if len(run.shards) == 1 and run.header.rank == 0:
        return
    headers = {shard.file: read_header(run.out / shard.file) for shard in run.shards}
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    total = sum(entry.num_bytes for header in headers.values() for entry in header.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(run.out / INDEX, index)


def _unmeasured(run: QuantizeRun) -> str:
    return f"# {markdown(run.header.model)}\n\n{run.header.method}.\n\nNo weight was split, so no error was measured.\n"


def _manifest(run: QuantizeRun, digests: dict[str, str], sources: dict[str, str], base: str) -> dict[str, Any]:
    file_of = {number: shard.file for shard in run.shards for number in shard.weights}
    weights = {
        spec.name: {
            "module": spec.module,
            "shape": list(spec.shape),
            "role": spec.role,
            "codec": spelling(run.everything.choices[spec.module].codec),
            "rank": run.everything.choices[spec.module].rank,
            "file": file_of[number],
            "residual_sha256": digests[spec.name],
            "source_digest": sources[spec.name],
        }
        | ({"tower": True} if spec.is_tower else {})
        | _origin(run, spec)
        for number, spec in enumerate(run.weights)
    }
    tables = {table.name: weights.pop(table.name) for table in run.tables}
    checkpoint = run.checkpoint
    return {
        "format": FORMATS[-1],
        "fingerprint": base,
        "source": {
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "architecture": run.plan.architecture,
        },
        "run": run.identity,
        "versions": {"qsvd": qsvd.__version__} | {name: version(name) for name in LIBRARIES},
        "header": asdict(run.header),
        "weights": weights,
        "files": {name: content_digest(run.out / name) for name in _read_back(run)},
    } | _more(run, tables)


def _more(run: QuantizeRun, tables: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the manifest that not every model has."""
    has_no_place = run.resolved.layout == "compressed-tensors"
    dtype = {"dtype": str(run.compute_dtype).removeprefix("torch.")} if has_no_place else {}
    return dtype | ({"tables": tables} if tables else {})


def _read_back(run: QuantizeRun) -> list[str]:
    """Return the files of OUT that qsvd and the libraries read, by their places in it."""
    names = ["config.json", ERRORS, *(shard.file for shard in run.shards), INDEX, ADAPTER_TENSORS, ADAPTER_CONFIG]
    names += [place_of(file) for file in run.checkpoint.other_files if not file.name.startswith(("LICENSE", "NOTICE"))]
    return [name for name in names if (run.out / name).is_file()]


def _origin(run: QuantizeRun, spec: WeightSpec) -> dict[str, Any]:
    """Return where a weight that is not one tensor of the checkpoint is from, so that an export can put it back."""
    if not spec.sources:
        return {}
    sources = [asdict(source) | {"shape": list(run.checkpoint.tensors[source.tensor].shape)} for source in spec.sources]
    return ({"stack": spec.stack} if spec.stack else {}) | {"sources": sources}


# What `qsvd quantize --dry-run` prints.


def planned_tables(run: QuantizeRun) -> RenderableType:
    """Return tables of the options, the layers and the sizes of a run."""
    options = Table("option", "value", title="Options", title_justify="left")
    for name, value in asdict(run.options).items():
        options.add_row(f"--{name.replace('_', '-')}", str(value))
    options.add_row("(device)", str(run.device))
    weights = Table("layers", "count", "role", "shape", "codec", "rank", title="Layers", title_justify="left")
    for name, count, *others in _alike(run):
        weights.add_row(name, str(count), *others)
    sizes = Table("part", "MB", title="Sizes", title_justify="left")
    for name, num_bytes in (
        ("weights to quantize, in the 16-bit model", run.sizes.source),
        ("residual", run.sizes.residual),
        ("components", run.sizes.factors),
        ("copied", run.sizes.copied),
        ("maximum on disk during the run", run.sizes.disk),
    ):
        sizes.add_row(name, f"{num_bytes / 1e6:,.1f}")
    lines = [f"Coverage: {run.header.reach}"]
    lines += [f"Left: {left.pattern} ({left.size})" for left in run.header.coverage.left]
    if run.header.remainder:
        lines.append(f"Copied, since the model has no such tensors: {run.header.remainder}")
    lines.append(
        "Files: " + ", ".join(shard.file for shard in run.shards[:3]) + (" ..." if len(run.shards) > 3 else "")
    )
    return Group(options, weights, sizes, *map(Text, lines))


def _alike(run: QuantizeRun) -> Iterator[tuple[str, int, str, str, str, str]]:
    """Yield layers that differ in their number only, "model.layers.0-31.mlp.up_proj": how many, what each becomes."""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for spec in run.weights:
        choice = run.everything.choices[spec.module]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", spec.module)
        shape = f"{spec.shape[0]} x {spec.shape[1]}"
        numbers.setdefault((pattern, spec.role, shape, spelling(choice.codec), str(choice.rank)), []).append(spec.layer)
    for (pattern, role, shape, codec, rank), layers in numbers.items():
        yield pattern.replace("*", _ranges(layers), 1), len(layers), role, shape, codec, rank


def _ranges(numbers: Sequence[int]) -> str:
    """Return "0-2,5" for 0, 1, 2 and 5."""
    runs = groupby(enumerate(sorted({*numbers})), key=lambda placed: placed[1] - placed[0])
    parts = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
